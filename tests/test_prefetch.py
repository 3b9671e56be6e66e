import threading
import time

import pytest

from jmx8.checkpoint.prefetch import prefetch


def test_items_come_in_order_from_another_thread():
    threads = []

    def items():
        for i in range(50):
            threads.append(threading.current_thread())
            yield i

    assert list(prefetch(items(), 3)) == list(range(50))
    assert set(threads) == {threads[0]} != {threading.current_thread()}
    assert not threads[0].is_alive()


def test_no_more_are_made_than_may_wait():
    made = []

    def items():
        for i in range(20):
            made.append(i)
            yield i

    taken = prefetch(items(), 3)
    next(taken)
    deadline = time.monotonic() + 10
    while len(made) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    # One was taken, three wait, and one more is in the thread's hands.
    assert len(made) == 5
    assert list(taken) == list(range(1, 20))


def test_an_error_comes_after_the_items_before_it():
    def items():
        yield 1
        yield 2
        raise OSError("disk")

    taken = []
    with pytest.raises(OSError, match="disk"):
        for item in prefetch(items(), 5):
            taken.append(item)
    assert taken == [1, 2]


def test_the_thread_ends_when_no_more_are_wanted():
    thread = []

    def items():
        thread.append(threading.current_thread())
        while True:
            yield 0

    taken = prefetch(items(), 2)
    next(taken)
    taken.close()
    assert not thread[0].is_alive()

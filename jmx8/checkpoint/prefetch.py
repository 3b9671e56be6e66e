"""Doing two things at once: an iterator that runs ahead in a thread of its own."""

import queue
import threading
from collections.abc import Generator, Iterable
from typing import Any, TypeVar


Item = TypeVar("Item")

_POLL_SECONDS = 0.1


def prefetch(items: Iterable[Item], depth: int) -> Generator[Item]:
    """Yields `items`, which are made in another thread, `depth` ahead at most.

    Args:
        items: What to iterate over; its own code runs in that thread.
        depth: How many finished items may wait to be taken, at least 1.

    Yields:
        The items, in order.

    Raises:
        BaseException: What iterating over `items` raises, in its place in the order.
    """
    results: queue.Queue[tuple[Item | None, BaseException | None, bool]]
    results = queue.Queue(depth)
    stopped = threading.Event()
    thread = threading.Thread(
        target=_fill, args=(items, results, stopped), daemon=True, name="jmx8-prefetch"
    )
    thread.start()
    try:
        while True:
            item, error, is_last = results.get()
            if error is not None:
                raise error
            if is_last:
                return
            yield item  # pyright: ignore[reportReturnType]
            del item  # or it would be held while the next one is waited for
    finally:
        stopped.set()
        thread.join()


def _fill(items: Iterable[Any], results: queue.Queue, stopped: threading.Event) -> None:
    try:
        for item in items:
            if not _put(results, (item, None, False), stopped):
                return
            del item
    # Whatever it is, it is raised again where the items are wanted.
    except BaseException as error:  # noqa: BLE001
        _put(results, (None, error, True), stopped)
    else:
        _put(results, (None, None, True), stopped)


def _put(results: queue.Queue, result: Any, stopped: threading.Event) -> bool:
    """Waits for a place, and tells whether there was one before the end."""
    while not stopped.is_set():
        try:
            results.put(result, timeout=_POLL_SECONDS)
            return True
        except queue.Full:
            continue
    return False

"""The per-user cache: whole files, each made once."""

import pathlib
import signal
import subprocess
import sys
import textwrap
import threading

import pytest

from jmx8.kernels._cache import cache_folder, lock, make_once, write_whole


def python(code: str, *args: object) -> subprocess.Popen:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def names(folder: pathlib.Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock"))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"JMX8_CACHE_DIR": "/a", "XDG_CACHE_HOME": "/b"}, "/a/x/y"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/jmx8/x/y"),
        ({"HOME": "/c"}, "/c/.cache/jmx8/x/y"),
    ],
)
def test_folder_follows_the_environment(environment, expected, monkeypatch):
    for name in ("JMX8_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_folder("x", "y") == pathlib.Path(expected)


def test_folder_that_cannot_be_written_says_what_to_set(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write.*set JMX8_CACHE_DIR"):
        write_whole(tmp_path / "file" / "x", b"")


def test_write_whole_replaces(tmp_path):
    write_whole(tmp_path / "sub" / "x", b"old and long")
    write_whole(tmp_path / "sub" / "x", b"new")
    assert (tmp_path / "sub" / "x").read_bytes() == b"new"
    assert names(tmp_path / "sub") == ["x"]


def test_failed_make_leaves_nothing(tmp_path):
    def make(path):
        path.write_bytes(b"half")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        make_once(tmp_path / "x", make)
    assert names(tmp_path) == []


_MAKE_SLOWLY = """
    import pathlib, sys, time
    from jmx8.kernels._cache import make_once

    def make(path):
        with open(sys.argv[2], "a") as log:
            log.write("made\\n")
        path.write_bytes(b"first half, ")
        print("started", flush=True)
        time.sleep(float(sys.argv[3]))
        path.write_bytes(b"first half, second half")

    print(make_once(pathlib.Path(sys.argv[1]), make).read_text())
"""


def test_many_processes_make_it_once(tmp_path):
    path, log = tmp_path / "x", tmp_path / "log"
    processes = [python(_MAKE_SLOWLY, path, log, 0.5) for _ in range(3)]
    outputs = [process.communicate()[0].splitlines() for process in processes]
    assert [lines[-1] for lines in outputs] == ["first half, second half"] * 3
    assert log.read_text() == "made\n"


def test_killed_process_leaves_no_part_and_no_lock(tmp_path):
    path, log = tmp_path / "x", tmp_path / "log"
    process = python(_MAKE_SLOWLY, path, log, 600)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not path.exists()
    assert make_once(path, lambda p: p.write_bytes(b"whole")).read_bytes() == b"whole"
    assert names(tmp_path) == ["log", "x"]


def test_threads_wait_for_each_other_and_say_so(tmp_path, caplog):
    order = []

    def second():
        with lock(tmp_path / "x"):
            order.append("second")

    thread = threading.Thread(target=second)
    with lock(tmp_path / "x"):
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert "waiting for another process" in caplog.text

"""The per-user cache: whole files only, each made by one process at a time."""

import contextlib
import logging
import os
import pathlib
from collections.abc import Callable, Iterator


_log = logging.getLogger("jmx8")


def cache_folder(*parts: str) -> pathlib.Path:
    """Returns a folder of the cache, which need not exist yet.

    `JMX8_CACHE_DIR` says where the cache is; without it `$XDG_CACHE_HOME/jmx8`, and
    without that `~/.cache/jmx8`.
    """
    if root := os.environ.get("JMX8_CACHE_DIR"):
        return pathlib.Path(root, *parts)
    caches = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(caches, "jmx8", *parts)


@contextlib.contextmanager
def lock(path: pathlib.Path) -> Iterator[None]:
    """Keeps every other process and thread that locks the same `path` waiting.

    The kernel releases it when its holder dies, however that happens.
    """
    import fcntl  # Not on Windows, where the XLA backends run all the same.

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path.with_name(f".{path.name}.lock"), "w")
    except OSError as error:
        raise OSError(
            f"cannot write to the cache folder {path.parent} ({error.strerror}); set "
            "JMX8_CACHE_DIR to a folder that can be written to."
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log.warning("waiting for another process that makes %s", path)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_whole(path: pathlib.Path, data: bytes) -> None:
    """Writes a file such that no reader ever sees a part of it."""
    with lock(path):
        _replace(path, lambda partial: partial.write_bytes(data))


def update_whole(path: pathlib.Path, change: Callable[[bytes | None], bytes]) -> None:
    """Writes what `change` makes of a file's bytes, None if there is no file.

    Of several processes that change it, each sees what the one before it wrote.
    """
    with lock(path):
        data = change(path.read_bytes() if path.exists() else None)
        _replace(path, lambda partial: partial.write_bytes(data))


def make_once(
    path: pathlib.Path, make: Callable[[pathlib.Path], object]
) -> pathlib.Path:
    """Returns `path`, which `make(p)` writes to a temporary path `p` if it is missing.

    Of several processes that want it, one makes it and the others wait.
    """
    if not path.exists():
        with lock(path):
            if not path.exists():
                _replace(path, make)
    return path


def _replace(path: pathlib.Path, make: Callable[[pathlib.Path], object]) -> None:
    # Whoever holds the lock owns this name, also after a predecessor that was killed.
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        make(partial)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)

"""A checkpoint folder that is being written: whole files only, and continued.

The order on disk is: a record of what is to be written, the shards one after the
other, the other files, the index, and `config.json` as the last, without which nothing
takes the folder for a checkpoint. What exists under its own name is whole.
"""

import contextlib
import dataclasses
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from .errors import CheckpointError, read_json_object
from .formats import Format
from .items import convert, Item
from .plan import CHUNK_BYTES
from .prefetch import prefetch
from .reader import SafetensorsFile
from .shards import (
    INDEX,
    index_text,
    is_finished,
    partial_path,
    Shard,
    ShardWriter,
    split_into_shards,
    write_file,
)
from .stream import Progress


RECORD = ".jmx8.json"
_CONFIG = "config.json"

# How many chunks may wait between reading and converting, and as many between
# converting and writing.
_DEPTH = 4


@dataclasses.dataclass(frozen=True)
class Output:
    """All that a folder will hold.

    Attributes:
        folder: The folder.
        form: The format of its weights.
        items: Its weights.
        shards: The files that they are in; every item is within one.
        files: The contents of its other files by name, `config.json` among them.
        job: What it is made of and how, as JSON values. A folder is continued only by
            the same job. None if it cannot be continued.
        check_finite: Whether NaN and infinity in what is quantized are refused.
    """

    folder: Path
    form: Format
    items: tuple[Item, ...]
    shards: tuple[Shard, ...]
    files: Mapping[str, bytes]
    job: Mapping[str, Any] | None
    check_finite: bool = True

    @property
    def num_bytes(self) -> int:
        return sum(item.num_bytes for item in self.items)

    def items_of(self, shard: Shard) -> list[Item]:
        """Returns the items whose tensors are in a shard."""
        return [i for i in self.items if i.targets[0].name in shard.tensors]


def make_shards(
    items: Sequence[Item], form: Format, shard_bytes: int
) -> tuple[Shard, ...]:
    """Distributes items over files of about a size.

    Raises:
        CheckpointError: If two tensors would have one name.
    """
    groups = [item.tensors(form) for item in items]
    seen: dict[str, str] = {}
    for item, group in zip(items, groups, strict=True):
        for info in group:
            if info.name in seen:
                raise CheckpointError(
                    f"{item.label}: would be written as {info.name}, and so would "
                    f"{seen[info.name]}"
                )
            seen[info.name] = item.label
    return tuple(split_into_shards(groups, shard_bytes))


def write_output(output: Output, progress: Progress | None = None) -> bool:
    """Writes a folder, or what is missing of it.

    Args:
        output: What to write.
        progress: Called after every chunk with the bytes of the sources that are done,
            the bytes in all, and the name of the tensor.

    Returns:
        Whether anything was missing.

    Raises:
        CheckpointError: If the folder holds something else, another process writes
            there, the disk is full, or a source cannot be read. What was finished
            stays.
    """
    with _locked(output.folder):
        if _check_folder(output):
            return False
        missing = [s for s in output.shards if not is_finished(output.folder, s)]
        _check_room(output, missing)
        write_file(output.folder / RECORD, _record_text(output))
        make_sink = lambda shard: ShardWriter(output.folder, shard)
        _stream(output, missing, make_sink, progress)
        files = dict(output.files)
        if len(output.shards) > 1:
            files[INDEX] = index_text(output.shards).encode()
        for name in sorted(files, key=lambda name: name == _CONFIG):
            write_file(output.folder / name, files[name])
        return True


def verify_output(output: Output, progress: Progress | None = None) -> None:
    """Reads a finished folder and its sources again, and compares every byte.

    Args:
        output: What was written.
        progress: As for `write_output`.

    Raises:
        CheckpointError: If anything differs; the message names the first such tensor.
    """
    files = dict(output.files)
    if len(output.shards) > 1:
        files[INDEX] = index_text(output.shards).encode()
    for name, content in files.items():
        path = output.folder / name
        if not path.is_file() or path.read_bytes() != content:
            raise CheckpointError(f"{path}: differs from what was to be written")
    for shard in output.shards:
        if not is_finished(output.folder, shard):
            path = output.folder / shard.file_name
            raise CheckpointError(f"{path}: missing, or its header or size differs")
    make_sink = lambda shard: _Comparison(output.folder, shard)
    _stream(output, output.shards, make_sink, progress)


@runtime_checkable
class _Sink(Protocol):
    def write(self, name: str, start: int, rows: np.ndarray) -> None: ...
    def finish(self) -> None: ...
    def discard(self) -> None: ...


class _Comparison:
    """Compares what would be written with what a file holds."""

    def __init__(self, folder: Path, shard: Shard):
        self._file = SafetensorsFile(folder / shard.file_name)

    def write(self, name: str, start: int, rows: np.ndarray) -> None:
        stored = self._file.read_rows(name, start, start + len(rows))
        same = stored.dtype == rows.dtype and np.array_equal(
            stored.view(np.uint8), np.ascontiguousarray(rows).view(np.uint8)
        )
        if not same:
            raise CheckpointError(
                f"{self._file.path}: {name}: differs from its source in rows {start} "
                f"to {start + len(rows) - 1}"
            )

    def finish(self) -> None:
        pass

    def discard(self) -> None:
        pass


def _stream(
    output: Output,
    shards: Sequence[Shard],
    make_sink: Callable[[Shard], _Sink],
    progress: Progress | None,
) -> None:
    """Reads, converts and writes the items of some shards, all three at once."""
    total = output.num_bytes
    done = total - sum(i.num_bytes for s in shards for i in output.items_of(s))
    with _Background() as background:
        for shard in shards:
            sink = background.open(make_sink, shard)
            items = output.items_of(shard)
            for item, start, rows in prefetch(_read(items), _DEPTH):
                pieces = convert(
                    item, output.form, start, rows, check_finite=output.check_finite
                )
                for piece in pieces:
                    background.submit(sink.write, *piece)
                if progress is not None:
                    share = item.num_bytes * (start + len(rows)) // item.num_rows
                    progress(done + share, total, item.targets[0].name)
                if start + len(rows) == item.num_rows:
                    done += item.num_bytes
            background.submit(sink.finish)


def _read(items: Sequence[Item]) -> Iterator[tuple[Item, int, Any]]:
    for item in items:
        for start, rows in item.read(CHUNK_BYTES):
            yield item, start, rows


class _Background:
    """Calls functions one after the other in another thread, a few of them waiting.

    An error of one is raised by the next `submit`, or on leaving; no later one runs.
    """

    def __enter__(self) -> "_Background":
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="jmx8-write")
        self._waiting: deque[Future] = deque()
        self._sink: _Sink | None = None
        return self

    def open(self, make_sink: Callable[[Shard], _Sink], shard: Shard) -> _Sink:
        """Makes a sink after everything before it, and waits for it."""
        self._wait(0)
        self._sink = make_sink(shard)
        return self._sink

    def submit(self, function: Callable[..., None], *args: Any) -> None:
        self._waiting.append(self._pool.submit(function, *args))
        self._wait(2 * _DEPTH)

    def _wait(self, most: int) -> None:
        while len(self._waiting) > most:
            self._waiting.popleft().result()

    def __exit__(self, kind, *_) -> None:
        try:
            if kind is None:
                self._wait(0)
        except BaseException:
            kind = BaseException
            raise
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)
            if kind is not None and self._sink is not None:
                self._sink.discard()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Makes a folder and keeps other writers out of it."""
    import fcntl  # not on every system, and for this alone

    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"{folder}: {error.strerror}") from None
    try:
        # Ends with the process, however that ends.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise CheckpointError(f"{folder}: another process is writing there") from None
    finally:
        os.close(descriptor)


def _record_text(output: Output) -> str:
    return json.dumps({"job": output.job}, indent=1) + "\n"


def _check_folder(output: Output) -> bool:
    """Tells whether a folder is finished; raises if it is not this job's."""
    folder, record = output.folder, output.folder / RECORD
    if not record.exists():
        # A record that was not finished is all that a first run may have left.
        found = {p.name for p in folder.iterdir()} - {partial_path(record).name}
        if found:
            raise CheckpointError(
                f"{folder}: holds {sorted(found)[0]!r} already; name a folder that "
                "does not exist or is empty"
            )
        return False
    job = read_json_object(record).get("job")
    if output.job is None or not isinstance(job, dict) or job != output.job:
        raise CheckpointError(
            f"{folder}: holds other output{_difference(job, output.job)}; delete it or "
            "name another folder"
        )
    names = [*output.files, *([INDEX] if len(output.shards) > 1 else ())]
    return all((folder / name).is_file() for name in names) and all(
        is_finished(folder, shard) for shard in output.shards
    )


def _difference(old: Any, new: Mapping[str, Any] | None) -> str:
    if not isinstance(old, dict) or new is None:
        return ""
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return f", made with another {' and another '.join(keys)}"


def _check_room(output: Output, missing: Sequence[Shard]) -> None:
    needed = sum(shard.size for shard in missing)
    status = os.statvfs(output.folder)
    free = status.f_bavail * status.f_frsize
    # What a stopped run has left is overwritten, so its room counts as free.
    for shard in missing:
        partial = partial_path(output.folder / shard.file_name)
        if partial.is_file():
            free += partial.stat().st_size
    if needed > free:
        raise CheckpointError(
            f"{output.folder}: {needed} bytes are to be written and the disk has room "
            f"for {free}. Nothing was begun; make room, or name a folder on another "
            "disk"
        )

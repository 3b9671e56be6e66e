"""Writing safetensors files so that a stop at any moment loses nothing.

A file gets its name when it is whole: it is filled under a temporary name, flushed to
the disk, and renamed. Its header is known beforehand, so that tensors may be filled in
any order, a few rows at a time.
"""

import contextlib
import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .errors import CheckpointError
from .reader import DTYPES, TensorInfo


INDEX = "model.safetensors.index.json"

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Written data is flushed in portions, in the background: the disk is busy while more is
# being made, and the page cache does not fill with what waits for it.
_FLUSH_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Shard:
    """One file that is to be written.

    Attributes:
        file_name: Its name in the folder.
        header: Its first bytes: the length field and the header.
        tensors: Its tensors by name, in the order of the data.
        size: Its bytes in all.
    """

    file_name: str
    header: bytes
    tensors: Mapping[str, TensorInfo]
    size: int


def make_shard(file_name: str, tensors: Iterable[TensorInfo]) -> Shard:
    """Returns the file that holds some tensors.

    Args:
        file_name: Its name.
        tensors: Names, dtypes and shapes. Their offsets do not count.
    """
    # Every tensor is aligned to its element this way, whatever comes before it.
    ordered = sorted(tensors, key=lambda info: -info.dtype.itemsize)
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for info in ordered:
        entries[info.name] = {
            "dtype": _DTYPE_NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [position, position + info.nbytes],
        }
        position += info.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    placed, offset = {}, len(header)
    for info in ordered:
        placed[info.name] = TensorInfo(info.name, info.dtype, info.shape, offset)
        offset += info.nbytes
    return Shard(file_name, header, placed, offset)


def split_into_shards(
    groups: Sequence[Sequence[TensorInfo]], shard_bytes: int
) -> list[Shard]:
    """Distributes tensors over files.

    Args:
        groups: Tensors, in groups that stay in one file.
        shard_bytes: After how many bytes the next file begins. A file is larger only if
            its single group is.

    Returns:
        The files, named as Hugging Face names them.
    """
    portions: list[list[TensorInfo]] = [[]]
    filled = 0
    for group in groups:
        size = sum(info.nbytes for info in group)
        if portions[-1] and filled + size > shard_bytes:
            portions.append([])
            filled = 0
        portions[-1] += group
        filled += size
    if len(portions) == 1:
        return [make_shard("model.safetensors", portions[0])]
    count = len(portions)
    return [
        make_shard(f"model-{i:05}-of-{count:05}.safetensors", portion)
        for i, portion in enumerate(portions, start=1)
    ]


def index_text(shards: Sequence[Shard]) -> str:
    """Returns the content of `model.safetensors.index.json`."""
    weight_map = {
        name: shard.file_name for shard in shards for name in sorted(shard.tensors)
    }
    total = sum(info.nbytes for shard in shards for info in shard.tensors.values())
    return _json_text({"metadata": {"total_size": total}, "weight_map": weight_map})


def _json_text(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


class ShardWriter:
    """Fills one file under a temporary name.

    Attributes:
        path: The name that it will have.
        shard: What it will hold.

    Raises:
        CheckpointError: If the disk has no room for it; then nothing is left of it.
    """

    def __init__(self, folder: Path, shard: Shard):
        self.path = folder / shard.file_name
        self.shard = shard
        self._partial = partial_path(self.path)
        self._unflushed = 0
        self._flushes = ThreadPoolExecutor(1, thread_name_prefix="jmx8-flush")
        self._flush: Future | None = None
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        self._file = os.open(self._partial, flags, 0o666)
        with self._removed_if_full():
            # Where it can be asked for, a lack of room shows here and not at the end.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file, 0, shard.size)
            self._write_at(0, memoryview(shard.header))

    def write(self, name: str, start: int, rows: np.ndarray) -> None:
        """Writes rows `[start, start + m)` of a tensor seen as a matrix."""
        info = self.shard.tensors[name]
        num_rows, columns = info.matrix_shape
        expected = (len(rows), columns)
        if rows.dtype != info.dtype or rows.shape != expected:
            raise ValueError(
                f"ShardWriter: {name}: rows must be {info.dtype}{list(expected)}, got "
                f"{rows.dtype}{list(rows.shape)}."
            )
        if not 0 <= start <= start + len(rows) <= num_rows:
            raise ValueError(
                f"ShardWriter: {name}: rows {start} to {start + len(rows)} are not in "
                f"[0, {num_rows}]."
            )
        offset = info.offset + start * columns * info.dtype.itemsize
        data = np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
        with self._removed_if_full():
            self._write_at(offset, data.data)

    def finish(self) -> None:
        """Flushes the file to the disk and gives it its name."""
        with self._removed_if_full():
            self._wait_for_flush()
            os.fsync(self._file)
        self._close()
        os.replace(self._partial, self.path)
        flush_folder(self.path.parent)

    def discard(self) -> None:
        """Removes the unfinished file."""
        with contextlib.suppress(OSError):
            self._wait_for_flush()
        self._close()
        self._partial.unlink(missing_ok=True)

    def _close(self) -> None:
        self._flushes.shutdown()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _wait_for_flush(self) -> None:
        if self._flush is not None:
            self._flush.result()

    def _write_at(self, offset: int, data: memoryview) -> None:
        while data:  # one write takes at most 2 GiB on Linux
            count = os.pwrite(self._file, data, offset)
            data, offset = data[count:], offset + count
            self._unflushed += count
        if self._unflushed >= _FLUSH_BYTES:
            self._wait_for_flush()
            self._flush = self._flushes.submit(os.fsync, self._file)
            self._unflushed = 0

    @contextlib.contextmanager
    def _removed_if_full(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.discard()
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise CheckpointError(
                f"{self.path}: {error.strerror}: the file takes {self.shard.size} "
                "bytes. Files that were finished before it are whole and stay; make "
                "room and run the same again, which continues after them"
            ) from None


def partial_path(path: Path) -> Path:
    """Returns the temporary name of a file: hidden, and no `*.safetensors`."""
    return path.with_name(f".{path.name}.partial")


def write_file(path: Path, content: bytes | str) -> None:
    """Writes a small file as a whole or not at all."""
    data = content.encode() if isinstance(content, str) else content
    partial = partial_path(path)
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(f"{path}: {error.strerror}") from None
    os.replace(partial, path)
    flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Makes the names of a folder's files durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_finished(folder: Path, shard: Shard) -> bool:
    """Whether a file of this name, header and size is there.

    It has its name only if it was finished, so its data need not be looked at.
    """
    path = folder / shard.file_name
    if not path.is_file() or path.stat().st_size != shard.size:
        return False
    with path.open("rb") as file:
        return file.read(len(shard.header)) == shard.header

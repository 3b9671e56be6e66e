"""Lazy reader of one safetensors file.

The `safetensors` package cannot hand float8 or bfloat16 tensors to numpy, and memory
mapping keeps every page that was touched resident. This reader checks the whole header
when a file is opened and afterwards reads the rows that are asked for, nothing else.

File format: 8 bytes, the little-endian length of the header; the header, a JSON object
`{name: {"dtype", "shape", "data_offsets": [begin, end]}}`; the data, to which the
offsets are relative and which they must cover without overlap or holes.
"""

import io
import math
import mmap
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from .errors import CheckpointError, parse_json_object


DTYPES: Mapping[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}

_MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
_MAX_SIZE = 2**48  # numpy refuses larger ones, even of empty arrays
_MAX_AXES = 16
_FIELDS = {"dtype", "shape", "data_offsets"}


class TensorInfo(NamedTuple):  # headers have thousands, and it is made fastest
    """What a header says about one tensor.

    Attributes:
        name: Name in the file.
        dtype: Its numpy dtype; bfloat16 and float8 are those of ml_dtypes.
        shape: Its shape.
        offset: First byte, counted from the start of the file.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """The shape with all axes but the last merged: `[rows, columns]`."""
        return math.prod(self.shape[:-1]), self.shape[-1] if self.shape else 1


class SafetensorsFile:
    """A safetensors file whose header has been checked and whose data is on disk.

    Attributes:
        path: The file.
        tensors: What the header says about each tensor, in the order of the data.
        metadata: The header's `__metadata__`, empty if there is none.

    Raises:
        CheckpointError: If the header and the file do not fit together in every
            respect; the message names the file and the tensor.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        try:
            status = self.path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{self.path}: not a regular file")
            size = status.st_size
            with self.path.open("rb") as file:
                self.metadata, self.tensors = parse(file, self.path, size)
        except OSError as error:
            raise CheckpointError(f"{self.path}: {error.strerror}") from None

    def read(self, name: str) -> np.ndarray:
        """Returns one tensor as a new array of its own dtype and shape."""
        info = self.tensors[name]
        rows, _ = info.matrix_shape
        return self.read_rows(name, 0, rows).reshape(info.shape)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Returns rows `[start, stop)` of a tensor seen as a matrix.

        Args:
            name: Name of the tensor.
            start: First row of the tensor with all axes but the last merged.
            stop: One past the last row.

        Returns:
            New array `[stop - start, columns]`. Only these bytes are read.

        Raises:
            CheckpointError: If the file is shorter now than when it was opened.
        """
        info = self.tensors[name]
        rows, columns = info.matrix_shape
        if not 0 <= start <= stop <= rows:
            raise ValueError(
                f"read_rows: rows must lie in [0, {rows}], got {start=}, {stop=}."
            )
        row_bytes = columns * info.dtype.itemsize
        num_bytes = (stop - start) * row_bytes
        if not num_bytes:
            return np.empty((stop - start, columns), info.dtype)
        # Pages of its own, which go back to the system as soon as the array is freed;
        # the C library would keep them for later. JAX takes aligned memory as it is.
        pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            # A fault for each 4 KiB would take longer than reading them.
            pages.madvise(mmap.MADV_HUGEPAGE)
        with self.path.open("rb", buffering=0) as file:
            file.seek(info.offset + start * row_bytes)
            _read_exactly(file, memoryview(pages), self.path, name)
        return np.frombuffer(pages, info.dtype).reshape(stop - start, columns)

    def iter_rows(self, name: str, num_bytes: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yields all rows of a tensor, as in `read_rows`, a few at a time.

        Args:
            name: Name of the tensor.
            num_bytes: How many bytes to read at once at most, if a row is not more.

        Yields:
            The index of the first row, and the rows.
        """
        info = self.tensors[name]
        rows, columns = info.matrix_shape
        if not info.nbytes:
            # Of how many rows, a header may say anything: they take no bytes.
            yield 0, self.read_rows(name, 0, rows)
            return
        most = max(1, num_bytes // max(1, columns * info.dtype.itemsize))
        # As equal as can be: every other shape is another compilation for the reader.
        step = math.ceil(rows / math.ceil(rows / most))
        for start in range(0, rows, step):
            yield start, self.read_rows(name, start, min(start + step, rows))

    def __repr__(self) -> str:
        return f"SafetensorsFile({str(self.path)!r}, {len(self.tensors)} tensors)"


def parse(
    file: io.BufferedIOBase, path: Path, size: int
) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    """Returns the metadata and the tensors of an open file of `size` bytes.

    Raises:
        CheckpointError: If the header and the file do not fit together.
    """
    header, data_start = _read_header(file, path, size)
    metadata = _parse_metadata(header.pop("__metadata__", {}), path)
    return metadata, _parse_tensors(header, path, data_start, size)


def _read_exactly(file: Any, view: memoryview, path: Path, name: str) -> None:
    while view:  # one read returns at most 2 GiB on Linux
        count = file.readinto(view)
        if not count:
            raise CheckpointError(f"{path}: {name}: the file ends inside this tensor")
        view = view[count:]


def _read_header(
    file: io.BufferedIOBase, path: Path, size: int
) -> tuple[dict[str, Any], int]:
    """Returns the parsed header and the offset of the first byte of data."""
    if size < 8:
        raise CheckpointError(
            f"{path}: not a safetensors file: {size} bytes, shorter than the length "
            "field that every one starts with"
        )
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if length > _MAX_HEADER_BYTES or length > size - 8:
        limit = min(_MAX_HEADER_BYTES, size - 8)
        raise CheckpointError(
            f"{path}: not a safetensors file, or truncated: the header claims {length} "
            f"bytes where at most {limit} can be{_pickle_hint(start)}"
        )
    data = file.read(length)
    if len(data) != length:
        raise CheckpointError(f"{path}: the file ends inside its header")
    return parse_json_object(data, f"{path}: header"), 8 + length


def _pickle_hint(start: bytes) -> str:
    """Returns a remark on a file that begins as torch.save makes them."""
    if start.startswith((b"PK\x03\x04", b"\x80\x02")):
        return ". It looks like a file of torch.save, which is not read"
    return ""


def _parse_metadata(value: Any, path: Path) -> dict[str, str]:
    if not isinstance(value, dict) or not all(
        isinstance(text, str) for text in value.values()
    ):
        raise CheckpointError(f"{path}: header: __metadata__ must map names to strings")
    return value


def _parse_tensors(
    header: dict[str, Any], path: Path, data_start: int, size: int
) -> dict[str, TensorInfo]:
    """Returns every tensor of a header in the order of the data, or raises."""
    ranges = []
    for name, entry in header.items():
        info, end = _parse_entry(name, entry, path, data_start)
        if end > size:
            raise CheckpointError(
                f"{path}: {name}: its data ends at byte {end} and the file at byte "
                f"{size}: truncated, or a wrong header"
            )
        ranges.append((info.offset, end, name, info))
    ranges.sort(key=lambda item: item[:3])
    position, previous = data_start, None
    for begin, end, name, _ in ranges:
        if begin < position:
            raise CheckpointError(
                f"{path}: {name}: its data overlaps that of {previous}"
            )
        if begin > position:
            raise CheckpointError(
                f"{path}: {name}: {begin - position} bytes before its data belong to "
                "no tensor"
            )
        position, previous = end, name
    if position != size:
        raise CheckpointError(
            f"{path}: {size - position} bytes at the end belong to no tensor"
        )
    return {name: info for _, _, name, info in ranges}


def _parse_entry(
    name: str, entry: Any, path: Path, data_start: int
) -> tuple[TensorInfo, int]:
    """Returns one tensor and where its data ends, counted from the file's start."""
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        raise CheckpointError(
            f"{path}: {name}: header must give dtype, shape and data_offsets"
        )
    dtype_name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
        raise CheckpointError(
            f"{path}: {name}: unknown dtype {dtype_name!r}; known: {', '.join(DTYPES)}"
        )
    if not _is_list_of_sizes(shape) or len(shape) > _MAX_AXES:
        raise CheckpointError(
            f"{path}: {name}: shape must be a list of at most {_MAX_AXES} sizes in "
            f"[0, 2**48), got {shape!r}"
        )
    if not _is_list_of_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(
            f"{path}: {name}: data_offsets must be [begin, end] with "
            f"0 <= begin <= end, got {offsets!r}"
        )
    begin, end = offsets
    info = TensorInfo(name, DTYPES[dtype_name], tuple(shape), data_start + begin)
    if info.nbytes != end - begin:
        raise CheckpointError(
            f"{path}: {name}: {dtype_name} of shape {list(shape)} takes "
            f"{info.nbytes} bytes, data_offsets {offsets} hold {end - begin}"
        )
    return info, data_start + end


def _is_list_of_sizes(value: Any) -> bool:
    # bool is an int to isinstance, and `true` is no size.
    if not isinstance(value, list):
        return False
    for v in value:
        if type(v) is not int or not 0 <= v < _MAX_SIZE:
            return False
    return True

"""The weights of a checkpoint: tensors, or elements that belong together with scales.

What a weight is, its own tensors say: their names, dtypes and shapes. So a checkpoint
may mix formats and unquantized layers, and a config that is wrong about a layer is no
harm.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from .._mxfp8 import BLOCK_SIZE
from .errors import CheckpointError
from .folder import CheckpointFolder, Source
from .formats import E8M0_DTYPES, FP8_BLOCKS, scale_names, TORCHAO_NAMES
from .reader import SafetensorsFile


_E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
_FLOAT_SCALES = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16))

# Rows and columns of elements that share a scale. The second is MXFP8 of a transposed
# weight `[..., k, n]`.
_ROWS, _COLUMNS, _SQUARE = (1, BLOCK_SIZE), (BLOCK_SIZE, 1), FP8_BLOCKS.block

# Scales of a quantized key-value cache. jmx8's is not quantized and needs none.
_CACHE_SCALES = (".k_scale", ".v_scale", ".kv_scale", ".q_scale")


class MXRows(NamedTuple):
    """Rows of a weight in MXFP8, as bytes of the host.

    Attributes:
        elements: E4M3 `[m, k]`; k need not be a multiple of 32.
        codes: E8M0 codes as uint8, `[m, ceil(k / 32)]`.
    """

    elements: np.ndarray
    codes: np.ndarray

    def __len__(self) -> int:
        return len(self.elements)

    def dequantize(self) -> np.ndarray:
        """Returns the values as float32; code 255 is NaN."""
        scales = self.codes.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
        scales = np.repeat(scales, BLOCK_SIZE, axis=1)[:, : self.elements.shape[1]]
        with np.errstate(over="ignore"):
            return self.elements.astype(np.float32) * scales


@dataclasses.dataclass(frozen=True)
class Weight:
    """One weight of a checkpoint.

    Attributes:
        name: Its name, without what a format adds to it.
        source: The tensor, or that of its elements.
        scales: The tensor of its scales, None if it is not quantized.
        block: Rows and columns of elements of the tensor that share a scale.
        transposed: Whether the tensor is `[..., k, n]`.
        requantized: Whether it is read as float32, for its scales are not powers of
            two.
    """

    name: str
    source: Source
    scales: Source | None = None
    block: tuple[int, int] = _ROWS
    transposed: bool = False
    requantized: bool = False

    def __str__(self) -> str:
        return str(self.source)

    @property
    def is_mxfp8(self) -> bool:
        """Whether its elements are read as they are, and codes."""
        return self.scales is not None and not self.requantized

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape `[..., n, k]` of the weight."""
        shape = self.source.info.shape
        return (*shape[:-2], shape[-1], shape[-2]) if self.transposed else shape

    @property
    def size(self) -> int:
        return math.prod(self.source.info.shape)

    @property
    def nbytes(self) -> int:
        """Bytes on disk, scales included."""
        scales = 0 if self.scales is None else self.scales.info.nbytes
        return self.source.info.nbytes + scales

    def iter_rows(self, num_bytes: int) -> Iterator[tuple[int, np.ndarray | MXRows]]:
        """Yields all rows in order, a few at a time.

        Of a transposed weight one matrix is read at once, of others `num_bytes`.

        Args:
            num_bytes: About how many bytes a piece has at most, if a row has not more.

        Yields:
            The index of the first row, counted with all axes but the last merged, and
            the rows: `MXRows` if `is_mxfp8`, otherwise an array `[m, k]` of the
            tensor's dtype or, requantized, of float32.
        """
        if self.transposed:
            yield from self._iter_transposed(num_bytes)
            return
        file, name = self.source.file, self.source.info.name
        for start, rows in file.iter_rows(name, num_bytes):
            yield start, self._join(rows, self._scale_rows(start, len(rows)))

    def _join(self, rows: np.ndarray, scales: np.ndarray | None) -> np.ndarray | MXRows:
        """Returns elements `[m, k]` with their scales `[m, ceil(k / 32)]`."""
        if scales is None:
            return rows
        if not self.requantized:
            return MXRows(rows, as_codes(scales))
        scales = np.repeat(scales.astype(np.float32), BLOCK_SIZE, axis=1)
        return rows.astype(np.float32) * scales[:, : rows.shape[1]]

    def _scale_rows(self, start: int, count: int) -> np.ndarray | None:
        """Returns the scales of rows of the tensor, one for every 32 columns."""
        if self.scales is None:
            return None
        file, name = self.scales.file, self.scales.info.name
        if self.block == _ROWS or not count:
            return file.read_rows(name, start, start + count)
        height, columns = self.source.info.shape[-2:]
        matrix, row = np.divmod(np.arange(start, start + count), height)
        block_rows = matrix * -(-height // self.block[0]) + row // self.block[0]
        first = int(block_rows[0])
        blocks = file.read_rows(name, first, int(block_rows[-1]) + 1)
        blocks = np.repeat(blocks, self.block[1] // BLOCK_SIZE, axis=1)
        return blocks[block_rows - first, : -(-columns // BLOCK_SIZE)]

    def _iter_transposed(
        self, num_bytes: int
    ) -> Iterator[tuple[int, np.ndarray | MXRows]]:
        file, name = self.source.file, self.source.info.name
        *stack, height, width = self.source.info.shape
        step = max(1, num_bytes // max(1, height * self.source.info.dtype.itemsize))
        for matrix in range(math.prod(stack)):
            rows = file.read_rows(name, matrix * height, (matrix + 1) * height).T
            scales = self._transposed_scales(matrix)
            for start in range(0, width, step):
                part = slice(start, min(start + step, width))
                yield (
                    matrix * width + start,
                    self._join(
                        np.ascontiguousarray(rows[part]),
                        None if scales is None else scales[part],
                    ),
                )

    def _transposed_scales(self, matrix: int) -> np.ndarray | None:
        """Returns scales `[n, ceil(k / 32)]` of one matrix of a transposed tensor."""
        if self.scales is None:
            return None
        file, name = self.scales.file, self.scales.info.name
        height, width = self.source.info.shape[-2:]
        count = -(-height // self.block[0])
        blocks = file.read_rows(name, matrix * count, (matrix + 1) * count).T
        blocks = np.repeat(blocks, self.block[1], axis=0)[:width]
        blocks = np.repeat(blocks, self.block[0] // BLOCK_SIZE, axis=1)
        return np.ascontiguousarray(blocks[:, : -(-height // BLOCK_SIZE)])


def as_codes(scales: np.ndarray) -> np.ndarray:
    """Returns scales, exponents or floats that are powers of two, as E8M0 codes."""
    if scales.dtype in E8M0_DTYPES:
        return scales.view(np.uint8)
    bits = scales.astype(np.float32).view(np.uint32)
    return (bits >> 23).astype(np.uint8)  # 2**-127 is subnormal: field 0, code 0


def is_power_of_two(scales: np.ndarray) -> np.ndarray:
    """Tells which floats are powers of two that E8M0 has, `2**-127` to `2**127`."""
    bits = scales.astype(np.float32).view(np.uint32)
    normal = (bits & 0x807FFFFF == 0) & (bits > 0) & (bits < 0x7F800000)
    return normal | (bits == 0x400000)


def find_weights(folder: CheckpointFolder) -> dict[str, Weight]:
    """Finds the weights of a checkpoint from the headers alone.

    Args:
        folder: The checkpoint.

    Returns:
        Every weight by name, ordered as the data lies on disk. Scales of a quantized
        key-value cache are left out.

    Raises:
        CheckpointError: If elements have no scales, several, or some that do not fit.
            All such problems are listed.
    """
    sources = folder.sources
    weights: dict[str, Weight] = {}
    problems: list[str] = []
    used: set[str] = set()
    for stored_name, source in sources.items():
        if source.info.dtype != _E4M3:
            continue
        name, candidates = _names(stored_name)
        found = [scale for scale in candidates if scale in sources]
        used.update((stored_name, *found))
        try:
            weights[name] = _pair(name, source, found, candidates, sources)
        except CheckpointError as error:
            problems += error.problems
    for name, source in sources.items():
        if name not in used and not name.endswith(_CACHE_SCALES):
            if name in weights:
                problems.append(f"{source}: given twice, {weights[name]} is it too")
            weights[name] = Weight(name, source)
    if problems:
        raise CheckpointError(problems)
    order = {id(source): i for i, source in enumerate(sources.values())}
    return dict(sorted(weights.items(), key=lambda item: order[id(item[1].source)]))


def _names(stored_name: str) -> tuple[str, list[str]]:
    """Returns the name of a weight and the names that its scales may have."""
    elements, scales = TORCHAO_NAMES
    if stored_name.endswith(elements):
        module = stored_name.removesuffix(elements)
        return f"{module}.weight", [module + scales]
    return stored_name, scale_names(stored_name)


def _pair(
    name: str,
    source: Source,
    found: list[str],
    candidates: list[str],
    sources: Mapping[str, Source],
) -> Weight:
    """Returns the weight of a tensor of elements, or raises what is wrong with it."""
    if not found:
        raise CheckpointError(
            f"{source}: its elements are float8_e4m3fn, and the checkpoint has no "
            f"scales for them; looked for {', '.join(candidates)}"
        )
    if len(found) > 1:
        raise CheckpointError(
            f"{source}: has several tensors of scales: {', '.join(found)}"
        )
    scales = sources[found[0]]
    if _is_swizzled(source.file, name):
        raise CheckpointError(
            f"{scales}: scales are swizzled for a kernel; they must be linear, "
            "[..., n, k / 32]. Save the tensor with is_swizzled_scales=False"
        )
    block = _block(source, scales)
    return Weight(name, source, scales, block, transposed=block == _COLUMNS)


def _is_swizzled(file: SafetensorsFile, name: str) -> bool:
    """Tells what the metadata of a file of torchao says about a tensor."""
    if name not in file.metadata:
        return False
    try:
        fields = json.loads(file.metadata[name])
        return bool(fields["_data"]["is_swizzled_scales"])
    except (ValueError, TypeError, LookupError, RecursionError):
        return False  # a file that says nothing is read by its shapes


def _block(source: Source, scales: Source) -> tuple[int, int]:
    """Returns which rows and columns share a scale, from shapes and dtypes."""
    shape, given = source.info.shape, scales.info.shape
    dtype = scales.info.dtype
    if dtype not in E8M0_DTYPES + _FLOAT_SCALES:
        raise CheckpointError(
            f"{scales}: scales must be uint8, float8_e8m0fnu, float32 or bfloat16, got "
            f"{dtype}"
        )
    wanted: dict[tuple[int, int], list[int]] = {}
    blocks = (_ROWS, _SQUARE, _COLUMNS) if dtype in E8M0_DTYPES else (_SQUARE,)
    *stack, height, width = (1, 1, *shape)  # a vector fits no block, see below
    for block in blocks if len(shape) >= 2 else ():
        rows, columns = -(-height // block[0]), -(-width // block[1])
        wanted[block] = [*stack[2:], rows, columns]
        if list(given) == wanted[block]:
            return block
    forms = [f"{b[0]} x {b[1]} need {size}" for b, size in wanted.items()]
    raise CheckpointError(
        f"{scales}: {dtype} scales of shape {list(given)} do not fit elements of shape "
        f"{list(shape)}: blocks of {', of '.join(forms) or '1 x 32 need 2 axes'}"
    )


def settle_scales(
    weights: Iterable[Weight], *, requantize: bool, num_bytes: int = 2**20
) -> dict[str, Weight]:
    """Reads all scales that are floats and decides which weights keep their bytes.

    Args:
        weights: Weights of a checkpoint.
        requantize: Whether a weight that has other scales than powers of two may be
            rounded anew.
        num_bytes: How much is read at once.

    Returns:
        The weights by name. Those that must be rounded anew are `requantized`.

    Raises:
        CheckpointError: If there are any, and `requantize` is false. All are listed.
    """
    result: dict[str, Weight] = {}
    problems: list[str] = []
    for weight in weights:
        result[weight.name] = weight
        reason = _first_odd_scale(weight.scales, num_bytes)
        if reason is None:
            continue
        result[weight.name] = dataclasses.replace(weight, requantized=True)
        if not requantize:
            problems.append(
                f"{weight.scales}: {reason}, so the weight is no MXFP8. Ask to "
                "requantize it (requantize=True, --requantize), which rounds it anew"
            )
    if problems:
        raise CheckpointError(problems)
    return result


def _first_odd_scale(scales: Source | None, num_bytes: int) -> str | None:
    if scales is None or scales.info.dtype in E8M0_DTYPES:
        return None
    for start, rows in scales.file.iter_rows(scales.info.name, num_bytes):
        odd = np.argwhere(~is_power_of_two(rows))
        if len(odd):
            row, column = odd[0]
            value: Any = rows[row, column]
            return (
                f"scale {float(value):.9g} in row {start + row}, column {column} is "
                "not a power of two"
            )
    return None

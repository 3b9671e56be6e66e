"""What is written to a checkpoint: where its rows come from, and what they become."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._mx_array import BLOCK_SIZE, MXArray, quantize
from ..kernels._prepared import is_prepared
from .errors import not_finite
from .formats import Format
from .reader import TensorInfo
from .stored import MXRows


ELEMENTS = np.dtype(jnp.float8_e4m3fn)

# Rows of a source, a few at a time, from the first to the last.
Rows = np.ndarray | MXRows
ReadRows = Callable[[int], Iterator[tuple[int, Rows]]]


class Target(NamedTuple):
    """The rows of a source that make up one weight of the output.

    Attributes:
        start: First row of the source, with all axes but the last merged.
        name: Name of the weight.
        shape: Its shape, `[..., n, k]`.
    """

    start: int
    name: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Item:
    """One source, and the weights that are written of it.

    Attributes:
        label: The source, for messages.
        targets: The weights; they divide its rows among them, in order.
        dtype: What an unquantized weight is stored as; None writes MXFP8.
        read: Yields the source's rows.
        num_bytes: Size of the source.
    """

    label: str
    targets: tuple[Target, ...]
    dtype: np.dtype | None
    read: ReadRows
    num_bytes: int

    @property
    def num_rows(self) -> int:
        """Rows of the source, at least 1."""
        return max(1, sum(math.prod(t.shape[:-1]) for t in self.targets))

    def tensors(self, form: Format) -> list[TensorInfo]:
        """Returns the tensors of the output, in a format."""
        result = []
        for target in self.targets:
            dtype = ELEMENTS if self.dtype is None else self.dtype
            result.append(TensorInfo(target.name, dtype, target.shape, 0))
            if self.dtype is None:
                *rows, k = target.shape
                shape = (*rows, -(-k // BLOCK_SIZE))
                name = form.scale_name(target.name)
                result.append(TensorInfo(name, form.scale_dtypes[0], shape, 0))
        return result


class Piece(NamedTuple):
    """Rows of one tensor of the output."""

    name: str
    start: int
    rows: np.ndarray


def convert(
    item: Item, form: Format, start: int, rows: Rows, *, check_finite: bool
) -> list[Piece]:
    """Returns what is written of some rows of an item.

    Args:
        item: The item.
        form: Format of the output.
        start: Index of the first row in the source.
        rows: The rows, as `item.read` yields them.
        check_finite: Whether NaN and infinity in what is quantized are refused.

    Raises:
        CheckpointError: If there are any.
    """
    if item.dtype is None and not isinstance(rows, MXRows):
        rows = _quantize_rows(item, start, rows, check_finite)
    pieces = []
    for target in item.targets:
        columns = target.shape[-1] if target.shape else 1
        count = math.prod(target.shape[:-1])
        first = max(start, target.start)
        last = min(start + len(rows), target.start + count)
        if first >= last:
            continue
        part = slice(first - start, last - start)
        row = first - target.start
        if isinstance(rows, MXRows):
            codes = rows.codes[part].view(form.scale_dtypes[0])
            pieces.append(Piece(target.name, row, rows.elements[part, :columns]))
            pieces.append(Piece(form.scale_name(target.name), row, codes))
        else:
            pieces.append(Piece(target.name, row, rows[part]))
    return pieces


def _quantize_rows(
    item: Item, start: int, rows: np.ndarray, check_finite: bool
) -> MXRows:
    if check_finite and not is_finite(rows):
        raise not_finite(item.label, start, rows.astype(np.float32))
    w = _quantize(jax.device_put(rows))
    return MXRows(np.asarray(w.elements), np.asarray(w.scales).view(np.uint8))


_quantize = jax.jit(quantize)


def is_finite(rows: np.ndarray) -> bool:
    """Tells whether floats are all finite."""
    # On the bits, in numpy: `isfinite` costs XLA half as much again as quantizing.
    bits = np.dtype(f"u{rows.dtype.itemsize}")
    infinity = np.array(np.inf, rows.dtype).view(bits)
    magnitudes = rows.view(bits) & np.array(-1, f"i{bits.itemsize}").view(bits) // 2
    return bool(np.max(magnitudes, initial=0) < infinity)


def array_item(label: str, leaf: Any, targets: tuple[Target, ...]) -> Item:
    """Returns the item of a parameter in memory.

    Args:
        label: The parameter, for messages.
        leaf: Its value: an array, an `MXArray` that is not transposed, or what
            `prepare` made of one of them.
        targets: The weights that it is written as.
    """
    is_mx = leaf.is_mx if is_prepared(leaf) else isinstance(leaf, MXArray)
    dtype = None if is_mx else np.dtype(leaf.dtype)
    read = functools.partial(_read_array, leaf)
    return Item(label, targets, dtype, read, leaf.nbytes)


def _read_array(leaf: Any, num_bytes: int) -> Iterator[tuple[int, Rows]]:
    """Yields a parameter one matrix after the other, whatever `num_bytes` says."""
    leaf = leaf.canonical() if is_prepared(leaf) else leaf
    start = 0
    stacked = len(leaf.shape) > 2
    for index in range(leaf.shape[0]) if stacked else (...,):
        part = jax.tree.map(lambda x, i=index: _matrix(np.asarray(x[i])), leaf)
        if isinstance(part, MXArray):
            codes = np.asarray(part.scales).view(np.uint8)
            part = MXRows(np.asarray(part.elements), codes)
        yield start, part
        start += len(part)


def _matrix(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, x.shape[-1] if x.ndim else 1)

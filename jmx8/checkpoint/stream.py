"""Fills parameters from disk, a few rows at a time, converting on the device.

Every parameter is allocated once, in its final size, and rows are written into it in
place. The next rows are read while rows are converted. Beside the parameters there are
five chunks of rows at most, whatever the size of a tensor or of a stack of experts.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._mx_array import MXArray, quantize
from .._numerics import BLOCK_SIZE, dequantize_rows
from .errors import not_finite
from .plan import CHUNK_BYTES, Part, Plan
from .prefetch import prefetch
from .stored import MXRows


# The largest code with which no element exceeds float32: 448 * 2**(246 - 127).
_SAFE_CODE = 246

_DEPTH = 2  # chunks that are read ahead

Progress = Callable[[int, int, str], None]
OnChunk = Callable[[str, Array, MXArray], None]


def read_parameters(
    plan: Plan,
    leaves: Mapping[str, Any],
    *,
    check_finite: bool,
    progress: Progress | None = None,
    on_chunk: OnChunk | None = None,
) -> dict[str, Any]:
    """Reads every parameter of a plan.

    Args:
        plan: What to read. Its parts fill every leaf exactly once.
        leaves: For every path a `ShapeDtypeStruct`, or an `MXArray` of them to
            quantize to.
        check_finite: Whether NaN and infinity are refused.
        progress: Called after every chunk with the bytes read so far, the bytes in
            all, and the name of the tensor.
        on_chunk: Called with path, source rows and quantized rows of every chunk that
            is quantized.

    Returns:
        The leaves, with arrays in place of `ShapeDtypeStruct`s.

    Raises:
        CheckpointError: If a weight is not finite or a file has become shorter.
    """
    rows_left = {path: _num_rows(leaf.shape) for path, leaf in leaves.items()}
    targets: dict[str, _Target] = {}
    result: dict[str, Any] = {}
    total = plan.num_bytes
    unchecked: tuple[_Chunk, Array] | None = None
    for chunk in prefetch(_chunks(plan), _DEPTH):
        path = chunk.part.path
        if path not in targets:
            targets[path] = _Target(leaves[path])
        rows = jax.device_put(chunk.rows)  # of MXRows, both arrays
        finite, quantized = targets[path].write(
            rows, chunk.part.start + chunk.start, return_quantized=on_chunk is not None
        )
        if on_chunk is not None and quantized is not None:
            assert not isinstance(rows, MXRows)
            on_chunk(path, rows, quantized)
        # Waiting for the previous chunk, not this one, lets the device work while the
        # next is read, and bounds how many are in flight.
        _wait(unchecked, check_finite)
        unchecked = chunk, finite
        rows_left[path] -= len(chunk.rows)
        if rows_left[path] == 0:
            result[path] = targets.pop(path).finish()
        if progress is not None:
            progress(chunk.done, total, chunk.part.weight.name)
    _wait(unchecked, check_finite)
    assert not targets and len(result) == len(leaves)
    return result


class _Chunk(NamedTuple):
    part: Part
    start: int  # index of the first row in the part
    rows: np.ndarray | MXRows
    done: int  # bytes of all weights up to and with these rows


def _chunks(plan: Plan) -> Iterator[_Chunk]:
    before = 0
    for part in plan.parts:
        weight = part.weight
        num_rows = _num_rows(weight.shape)
        for start, rows in weight.iter_rows(CHUNK_BYTES):
            share = weight.nbytes * (start + len(rows)) // max(1, num_rows)
            yield _Chunk(part, start, rows, before + share)
        before += weight.nbytes


def _wait(unchecked: tuple[_Chunk, Array] | None, check_finite: bool) -> None:
    """Waits until a chunk is written and refuses it if it was not finite."""
    if unchecked is None:
        return
    chunk, finite = unchecked
    if bool(finite) or not check_finite:
        return
    if isinstance(chunk.rows, MXRows):
        rows = chunk.rows.dequantize()
        if np.isfinite(rows).all():
            return  # scales so large that an element could have overflowed
    else:
        rows = chunk.rows.astype(np.float32)
    raise not_finite(chunk.part.weight, chunk.start, rows)


class _Target:
    """A parameter that is being filled.

    Attributes:
        leaf: Its abstract form.
        buffers: Its arrays, in the dtype that they are written in.
    """

    def __init__(self, leaf: Any):
        self.leaf = leaf
        self.parts, self.structure = jax.tree.flatten(leaf)
        self.buffers = _allocate(
            tuple((part.shape, _storage_dtype(part.dtype)) for part in self.parts)
        )

    def write(
        self, rows: Array | MXRows, start: int, *, return_quantized: bool
    ) -> tuple[Array, MXArray | None]:
        """Writes rows in place; returns whether they are finite, and the rows."""
        self.buffers, finite, quantized = _write(
            self.buffers,
            rows,
            np.int32(start),
            dtype=self.leaf.dtype,
            quantized=isinstance(self.leaf, MXArray),
            return_quantized=return_quantized,
        )
        return finite, quantized

    def finish(self) -> Any:
        """Returns the parameter, in its own dtypes."""
        arrays = [
            _view(buffer, part.dtype)
            for buffer, part in zip(self.buffers, self.parts, strict=True)
        ]
        self.buffers = ()
        return jax.tree.unflatten(self.structure, arrays)


@functools.partial(jax.jit, static_argnums=0)
def _allocate(
    specs: tuple[tuple[tuple[int, ...], np.dtype], ...],
) -> tuple[Array, ...]:
    return tuple(jnp.zeros(shape, dtype) for shape, dtype in specs)


@functools.partial(
    jax.jit,
    donate_argnums=0,
    static_argnames=("dtype", "quantized", "return_quantized"),
)
def _write(
    buffers: tuple[Array, ...],
    rows: Any,
    start: Array,
    *,
    dtype: np.dtype,
    quantized: bool,
    return_quantized: bool,
) -> tuple[tuple[Array, ...], Array, MXArray | None]:
    """Writes `[m, k]` rows, converted, into row `start` and following of buffers."""
    w = None
    if isinstance(rows, MXRows):
        parts, finite = _stored_parts(rows, dtype, quantized)
    else:
        w = quantize(rows) if quantized else None
        values = rows if w is not None else rows.astype(dtype)
        parts = (values,) if w is None else (w.elements, w.scales)
        # Counting what is not finite would take eight bytes per element on the CPU.
        finite = jnp.all(jnp.isfinite(values))
    written = []
    for buffer, part in zip(buffers, parts, strict=True):
        part = jax.lax.bitcast_convert_type(part, buffer.dtype)
        matrix = buffer.reshape(-1, buffer.shape[-1])
        matrix = jax.lax.dynamic_update_slice(
            matrix, part, (start, jnp.zeros_like(start))
        )
        written.append(matrix.reshape(buffer.shape))
    return tuple(written), finite, w if return_quantized else None


def _stored_parts(
    rows: Any, dtype: np.dtype, quantized: bool
) -> tuple[tuple[Array, ...], Array]:
    """Returns what to write of rows that are MXFP8, and whether they are finite.

    As MXFP8 these are their own bytes, and "not finite" may only mean: perhaps.
    """
    k = rows.elements.shape[1]
    elements = jax.lax.bitcast_convert_type(rows.elements, jnp.uint8)
    elements = jnp.pad(elements, [(0, 0), (0, -k % BLOCK_SIZE)])
    scales = jax.lax.bitcast_convert_type(rows.codes, jnp.float8_e8m0fnu)
    elements = jax.lax.bitcast_convert_type(elements, jnp.float8_e4m3fn)
    if quantized:
        magnitude = jax.lax.bitcast_convert_type(elements, jnp.uint8) & 0x7F
        finite = jnp.all(magnitude != 0x7F) & jnp.all(rows.codes <= _SAFE_CODE)
        return (elements, scales), finite
    values = dequantize_rows(elements, scales)[:, :k].astype(dtype)
    return (values,), jnp.all(jnp.isfinite(values))


def _num_rows(shape: tuple[int, ...]) -> int:
    return math.prod(shape[:-1])


def _storage_dtype(dtype: np.dtype) -> np.dtype:
    """Returns the dtype in which rows can be updated in place.

    XLA widens a whole float8 or bfloat16 array on the CPU to update a slice of it. On a
    GPU it does not, and there changing the dtype afterwards would be a copy.
    """
    if _platform() != "cpu" or dtype.itemsize > 2:
        return dtype
    return np.dtype(np.uint8 if dtype.itemsize == 1 else np.uint16)


def _view(buffer: Array, dtype: np.dtype) -> Array:
    """Returns a buffer as another dtype of the same size, without a copy."""
    if buffer.dtype == dtype:
        return buffer
    # Host memory of the same alignment is not copied, where XLA's bitcast would be.
    return jax.device_put(np.asarray(buffer).view(dtype))


def _platform() -> str:
    """Returns the platform on which new arrays are placed."""
    return next(iter(jnp.zeros(()).devices())).platform

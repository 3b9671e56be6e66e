"""Weights in the form that FlashInfer's MXFP8 kernels take, made once from `MXArray`s.

Every layout can be undone, bit for bit. What a kernel needs beyond the logical size is
zero elements and zero scale bytes, which add nothing to any sum; the caller pads the
activations alike and cuts the output.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float8e4m3fn, Num, UInt8

from ..._mx_array import BLOCK_SIZE, MXArray
from .._prepared import Layout
from .layouts import (
    interleave_halves,
    invert,
    pack_int32,
    round_up,
    shuffle_rows,
    swap_halves,
    swizzle_scales,
    take_rows,
    unpack_int32,
    unswizzle_scales,
)


# `mxfp8_gemm` wants n and k of at least 128, and multiples of 32.
_DENSE_MINIMUM, _DENSE_MULTIPLE = 128, 32
# Both MoE kernels: a scale tile of 128 rows and 4 blocks must not straddle gate and up,
# nor two experts.
_MOE_MULTIPLE = 128


def padded_dense_shape(n: int, k: int) -> tuple[int, int]:
    """Returns the n and k that `mxfp8_gemm` sees for a logical `[n, k]`."""
    pad = lambda size: max(round_up(size, _DENSE_MULTIPLE), _DENSE_MINIMUM)
    return pad(n), pad(k)


def padded_moe_size(size: int) -> int:
    """Returns the hidden or intermediate size that the MoE kernels see."""
    return round_up(size, _MOE_MULTIPLE)


def dense_cutlass() -> Layout:
    """Returns the layout of `[..., n, k]` for `mxfp8_gemm`.

    Elements `[..., n, k]`, both padded as `padded_dense_shape` says, and 128x4-swizzled
    scale bytes, flat for each element of the leading axes.
    """
    return _DENSE_CUTLASS


@functools.cache  # A layout is static, so there must be one of each.
def moe_cutlass(gated: bool) -> Layout:
    """Returns the layout of a weight for `cutlass_fused_moe`.

    Elements, w13 with the rows of up before those of gate, and 128x4-swizzled scales,
    four bytes to a word, `[e, rows, k / 128]`. The kernel's scales have
    `2 * round_up(i, 128)` rows for each expert where its matmul steps over
    `round_up(2 * i, 128)`, so i must be a multiple of 128: gate, up and the columns of
    w2 are padded.

    Args:
        gated: Whether it is w13 `[e, 2i, h]`, the rows of gate before those of up;
            False for w2 `[e, h, i]` and for w13 `[e, i, h]` without a gate.
    """
    name = "cutlass_fused_moe, up before gate" if gated else "cutlass_fused_moe"
    order = swap_halves if gated else None
    return _moe_layout(name, gated, order, _pack_words, _unpack_words)


@functools.cache
def moe_trtllm(gated: bool) -> Layout:
    """Returns the layout of a weight for `trtllm_fp8_block_scale_moe`.

    Elements, w13 with rows of up and gate in turn, then shuffled; and scale bytes in
    the same order of rows, 128x4-swizzled for each expert, in the shape
    `[e, rows, k / 32]` that they had before. `gated` is as for `moe_cutlass`.
    """
    kernel = "trtllm_fp8_block_scale_moe"
    name = f"{kernel}, gate and up interleaved" if gated else kernel
    pack = lambda scales: swizzle_scales(scales).reshape(scales.shape)
    unpack = lambda scales: unswizzle_scales(
        scales.reshape(*scales.shape[:-2], -1), *scales.shape[-2:]
    )
    return _moe_layout(name, gated, _trtllm_order(gated), pack, unpack)


@functools.cache
def bias_cutlass(gated: bool) -> Layout:
    """Returns the layout of a bias `[e, rows]` of a weight in `moe_cutlass(gated)`."""
    return _bias_layout("cutlass_fused_moe", gated, swap_halves if gated else None)


@functools.cache
def bias_trtllm(gated: bool) -> Layout:
    """Returns the layout of a bias `[e, rows]` of a weight in `moe_trtllm(gated)`."""
    return _bias_layout("trtllm_fp8_block_scale_moe", gated, _trtllm_order(gated))


# The order of so many rows, or None for the order that they are in.
_Order = Callable[[int], np.ndarray] | None


def _trtllm_order(gated: bool) -> _Order:
    if not gated:
        return shuffle_rows
    return lambda rows: swap_halves(rows)[interleave_halves(rows)[shuffle_rows(rows)]]


def _prepare_dense(w: MXArray) -> tuple[Array, ...]:
    n, k = padded_dense_shape(*w.elements.shape[-2:])
    elements, scales = _arrange(w, 1, n, k, None)
    return elements, swizzle_scales(scales)


def _restore_dense(arrays: tuple[Array, ...], like: MXArray) -> MXArray:
    elements, scales = arrays
    n, k = elements.shape[-2:]
    scales = unswizzle_scales(scales, n, k // BLOCK_SIZE)
    return _restore(elements, scales, like, 1, None)


_DENSE_CUTLASS = Layout("mxfp8_gemm", _prepare_dense, _restore_dense)


def _moe_layout(
    name: str,
    gated: bool,
    order: _Order,
    pack: Callable[[Array], Array],
    unpack: Callable[[Array], Array],
) -> Layout:
    halves = 2 if gated else 1

    def prepare(w: MXArray) -> tuple[Array, ...]:
        rows, columns = _padded_moe_shape(w.elements.shape, halves)
        elements, scales = _arrange(w, halves, rows, columns, order and order(rows))
        return elements, pack(scales)

    def restore(arrays: tuple[Array, ...], like: MXArray) -> MXArray:
        elements, scales = arrays
        rows = elements.shape[-2]
        return _restore(elements, unpack(scales), like, halves, order and order(rows))

    return Layout(name, prepare, restore)


def _bias_layout(name: str, gated: bool, order: _Order) -> Layout:
    halves = 2 if gated else 1

    def prepare(bias: Array) -> tuple[Array, ...]:
        rows, _ = _padded_moe_shape((*bias.shape, 1), halves)
        column = bias[..., None]
        return (_pad_and_take(column, halves, rows, 1, order and order(rows))[..., 0],)

    def restore(arrays: tuple[Array, ...], like: jax.ShapeDtypeStruct) -> Array:
        (bias,) = arrays
        rows, column = bias.shape[-1], bias[..., None]
        order_of_rows = order and order(rows)
        return _untake_and_cut(column, halves, like.shape[-1], 1, order_of_rows)[..., 0]

    return Layout(name, prepare, restore)


def _padded_moe_shape(shape: tuple[int, ...], halves: int) -> tuple[int, int]:
    *_, rows, columns = shape
    return halves * padded_moe_size(rows // halves), padded_moe_size(columns)


def _pack_words(scales: UInt8[Array, "*e n c"]) -> Array:
    """Swizzles whole 128x4 tiles and packs them."""
    *batch, rows, cols = scales.shape
    return pack_int32(swizzle_scales(scales)).reshape(*batch, rows, cols // 4)


def _unpack_words(words: Array) -> UInt8[Array, "*e n c"]:
    """Undoes `_pack_words`."""
    *batch, rows, cols = words.shape
    return unswizzle_scales(unpack_int32(words.reshape(*batch, -1)), rows, 4 * cols)


def _arrange(
    w: MXArray, halves: int, n: int, k: int, order: np.ndarray | None
) -> tuple[Float8e4m3fn[Array, "*e n k"], UInt8[Array, "*e n c"]]:
    """Returns elements and linear scale bytes, padded to `[n, k]`, rows in `order`."""
    # As bytes: XLA's CPU compiler would widen FP8 to move it, and round it again.
    as_bytes = lambda a: jax.lax.bitcast_convert_type(a, jnp.uint8)
    elements = _pad_and_take(as_bytes(w.elements), halves, n, k, order)
    scales = _pad_and_take(as_bytes(w.scales), halves, n, k // BLOCK_SIZE, order)
    return jax.lax.bitcast_convert_type(elements, jnp.float8_e4m3fn), scales


def _restore(
    elements: Float8e4m3fn[Array, "*e n k"],
    scales: UInt8[Array, "*e n c"],
    like: MXArray,
    halves: int,
    order: np.ndarray | None,
) -> MXArray:
    """Undoes `_arrange`."""
    n, k = like.elements.shape[-2:]
    as_bytes = jax.lax.bitcast_convert_type(elements, jnp.uint8)
    as_bytes = _untake_and_cut(as_bytes, halves, n, k, order)
    scales = _untake_and_cut(scales, halves, n, k // BLOCK_SIZE, order)
    return MXArray(
        jax.lax.bitcast_convert_type(as_bytes, jnp.float8_e4m3fn),
        jax.lax.bitcast_convert_type(scales, jnp.float8_e8m0fnu),
        like.padding,
        like.dtype,
        like.transposed,
    )


def _pad_and_take(
    a: Num[Array, "*e n k"], halves: int, n: int, k: int, order: np.ndarray | None
) -> Num[Array, "*e n2 k2"]:
    """Pads each half of the rows, and the columns, with zeros; then reorders rows."""
    *batch, rows, cols = a.shape
    a = a.reshape(*batch, halves, rows // halves, cols)
    widths = [(0, 0)] * (len(batch) + 1) + [(0, (n - rows) // halves), (0, k - cols)]
    a = jnp.pad(a, widths).reshape(*batch, n, k)
    return a if order is None else take_rows(a, order)


def _untake_and_cut(
    a: Num[Array, "*e n2 k2"], halves: int, n: int, k: int, order: np.ndarray | None
) -> Num[Array, "*e n k"]:
    """Undoes `_pad_and_take`."""
    *batch, rows, cols = a.shape
    a = a if order is None else take_rows(a, invert(order))
    a = a.reshape(*batch, halves, rows // halves, cols)
    return a[..., : n // halves, :k].reshape(*batch, n, k)

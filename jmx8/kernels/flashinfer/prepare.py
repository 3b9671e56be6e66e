"""Weights in the form that FlashInfer's MXFP8 kernels take, made once from `MXArray`s.

Each `prepare_*` has a `restore_*` that gives back the same `MXArray`, bit for bit. What
a kernel needs beyond the logical size is zero elements and zero scale bytes, which add
nothing to any sum; the caller pads the activations alike and cuts the output.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float8e4m3fn, Int32, Num, UInt8

from ..._mx_array import BLOCK_SIZE, MXArray
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


class DenseWeight(NamedTuple):
    """What `mxfp8_gemm` takes as its second matrix.

    Attributes:
        elements: `[..., n, k]`, n and k padded as `padded_dense_shape` says.
        scales: 128x4-swizzled bytes, flat for each element of the leading axes.
    """

    elements: Float8e4m3fn[Array, "*e n k"]
    scales: UInt8[Array, "*e size"]


class CutlassMoEWeights(NamedTuple):
    """What `cutlass_fused_moe` takes; i and h are multiples of 128.

    Attributes:
        w13: `[e, 2i, h]`, the rows of up before those of gate; `[e, i, h]` without a
            gate.
        w13_scales: 128x4-swizzled, four bytes to a word, `[e, rows, h / 128]`.
        w2: `[e, h, i]`.
        w2_scales: `[e, h, i / 128]`.
    """

    w13: Float8e4m3fn[Array, "*e n h"]
    w13_scales: Int32[Array, "*e n h/128"]
    w2: Float8e4m3fn[Array, "*e h i"]
    w2_scales: Int32[Array, "*e h i/128"]


class TRTLLMMoEWeights(NamedTuple):
    """What `trtllm_fp8_block_scale_moe` takes; i and h are multiples of 128.

    Attributes:
        w13: `[e, 2i, h]`, rows of up and gate in turn (`[e, i, h]` without a gate),
            then shuffled.
        w13_scales: Bytes in the same order of rows, 128x4-swizzled for each expert, in
            the shape `[e, rows, h / 32]` that they had before.
        w2: `[e, h, i]`, shuffled.
        w2_scales: `[e, h, i / 32]`.
    """

    w13: Float8e4m3fn[Array, "*e n h"]
    w13_scales: UInt8[Array, "*e n h/32"]
    w2: Float8e4m3fn[Array, "*e h i"]
    w2_scales: UInt8[Array, "*e h i/32"]


def padded_dense_shape(n: int, k: int) -> tuple[int, int]:
    """Returns the n and k that `mxfp8_gemm` sees for a logical `[n, k]`."""
    pad = lambda size: max(round_up(size, _DENSE_MULTIPLE), _DENSE_MINIMUM)
    return pad(n), pad(k)


def padded_moe_size(size: int) -> int:
    """Returns the hidden or intermediate size that the MoE kernels see."""
    return round_up(size, _MOE_MULTIPLE)


def prepare_dense_cutlass(w: MXArray) -> DenseWeight:
    """Lays out a weight `[..., n, k]` for `mxfp8_gemm`."""
    n, k = padded_dense_shape(*w.elements.shape[-2:])
    elements, scales = _arrange(w, 1, n, k, None)
    return DenseWeight(elements, swizzle_scales(scales))


def restore_dense_cutlass(prepared: DenseWeight, like: MXArray) -> MXArray:
    """Undoes `prepare_dense_cutlass`; `like` has the shape of the result.

    Args:
        prepared: What `prepare_dense_cutlass` returned.
        like: The original, or `jax.eval_shape`'s of it.
    """
    n, k = prepared.elements.shape[-2:]
    scales = unswizzle_scales(prepared.scales, n, k // BLOCK_SIZE)
    return _restore(prepared.elements, scales, like, 1, None)


def prepare_moe_cutlass(w13: MXArray, w2: MXArray) -> CutlassMoEWeights:
    """Lays out the weights of an MoE layer for `cutlass_fused_moe`.

    The kernel's scales have `2 * round_up(i, 128)` rows for each expert where its
    matmul steps over `round_up(2 * i, 128)`, so i must be a multiple of 128: gate, up
    and the columns of `w2` are padded.

    Args:
        w13: `[e, 2i, h]`, the rows of gate before those of up; `[e, i, h]` without a
            gate.
        w2: `[e, h, i]`.
    """
    halves, rows, hidden_size, inner_size = _moe_shape(w13, w2)
    order = swap_halves(rows) if halves == 2 else None
    elements13, scales13 = _arrange(w13, halves, rows, hidden_size, order)
    elements2, scales2 = _arrange(w2, 1, hidden_size, inner_size, None)
    return CutlassMoEWeights(
        elements13, _pack_scales(scales13), elements2, _pack_scales(scales2)
    )


def restore_moe_cutlass(
    prepared: CutlassMoEWeights, w13_like: MXArray, w2_like: MXArray
) -> tuple[MXArray, MXArray]:
    """Undoes `prepare_moe_cutlass`; see `restore_dense_cutlass` for the last two."""
    halves, rows, *_ = _moe_shape(w13_like, w2_like)
    order = swap_halves(rows) if halves == 2 else None
    scales13, scales2 = (
        unswizzle_scales(
            unpack_int32(s.reshape(*s.shape[:-2], -1)), s.shape[-2], 4 * s.shape[-1]
        )
        for s in (prepared.w13_scales, prepared.w2_scales)
    )
    return (
        _restore(prepared.w13, scales13, w13_like, halves, order),
        _restore(prepared.w2, scales2, w2_like, 1, None),
    )


def prepare_moe_trtllm(w13: MXArray, w2: MXArray) -> TRTLLMMoEWeights:
    """Lays out the weights of an MoE layer for `trtllm_fp8_block_scale_moe`.

    Args:
        w13: `[e, 2i, h]`, the rows of gate before those of up; `[e, i, h]` without a
            gate.
        w2: `[e, h, i]`.
    """
    halves, rows, hidden_size, inner_size = _moe_shape(w13, w2)
    order13, order2 = _trtllm_orders(halves, rows, hidden_size)
    elements13, scales13 = _arrange(w13, halves, rows, hidden_size, order13)
    elements2, scales2 = _arrange(w2, 1, hidden_size, inner_size, order2)
    swizzle = lambda scales: swizzle_scales(scales).reshape(scales.shape)
    return TRTLLMMoEWeights(elements13, swizzle(scales13), elements2, swizzle(scales2))


def restore_moe_trtllm(
    prepared: TRTLLMMoEWeights, w13_like: MXArray, w2_like: MXArray
) -> tuple[MXArray, MXArray]:
    """Undoes `prepare_moe_trtllm`; see `restore_dense_cutlass` for the last two."""
    halves, rows, hidden_size, _ = _moe_shape(w13_like, w2_like)
    order13, order2 = _trtllm_orders(halves, rows, hidden_size)
    scales13, scales2 = (
        unswizzle_scales(s.reshape(*s.shape[:-2], -1), s.shape[-2], s.shape[-1])
        for s in (prepared.w13_scales, prepared.w2_scales)
    )
    return (
        _restore(prepared.w13, scales13, w13_like, halves, order13),
        _restore(prepared.w2, scales2, w2_like, 1, order2),
    )


def prepare_bias_cutlass(
    bias: Num[Array, "*e n"], *, gated: bool
) -> Num[Array, "*e padded"]:
    """Pads a bias of `w13`, gate before up, and orders it as `prepare_moe_cutlass`.

    With `gated=False` it serves for the bias of `w2` too.
    """
    halves = 2 if gated else 1
    rows = halves * padded_moe_size(bias.shape[-1] // halves)
    order = swap_halves(rows) if gated else None
    return _pad_and_take(bias[..., None], halves, rows, 1, order)[..., 0]


def prepare_bias_trtllm(
    bias: Num[Array, "*e n"], *, gated: bool
) -> Num[Array, "*e padded"]:
    """Pads a bias of `w13`, gate before up, and orders it as `prepare_moe_trtllm`.

    With `gated=False` it serves for the bias of `w2` too.
    """
    halves = 2 if gated else 1
    rows = halves * padded_moe_size(bias.shape[-1] // halves)
    order, _ = _trtllm_orders(halves, rows, _MOE_MULTIPLE)
    return _pad_and_take(bias[..., None], halves, rows, 1, order)[..., 0]


def _moe_shape(w13: MXArray, w2: MXArray) -> tuple[int, int, int, int]:
    """Returns 2 if gated, else 1; and the padded rows of w13, h and i."""
    rows, (hidden_size, inner_size) = w13.shape[-2], w2.shape[-2:]
    if rows not in (inner_size, 2 * inner_size) or w13.shape[-1] != hidden_size:
        raise ValueError(
            f"With w2 [..., h, i] = {w2.shape}, w13 must be [..., 2i, h] or "
            f"[..., i, h], got {w13.shape}."
        )
    halves = rows // inner_size
    inner_size = padded_moe_size(inner_size)
    return halves, halves * inner_size, padded_moe_size(hidden_size), inner_size


def _trtllm_orders(
    halves: int, rows: int, hidden_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the orders of the rows of w13 and of w2."""
    order = shuffle_rows(rows)
    if halves == 2:
        order = swap_halves(rows)[interleave_halves(rows)[order]]
    return order, shuffle_rows(hidden_size)


def _pack_scales(scales: UInt8[Array, "*e n c"]) -> Int32[Array, "*e n c/4"]:
    """Swizzles whole 128x4 tiles and packs them."""
    *batch, rows, cols = scales.shape
    return pack_int32(swizzle_scales(scales)).reshape(*batch, rows, cols // 4)


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

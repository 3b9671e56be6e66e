"""The W8A16 mixture of experts through FlashInfer's cuTile kernels.

Rows are sorted by expert into blocks, copied there, and go through two grouped matmuls
that widen the weights to bfloat16 in registers. Linear scales and the order
`[gate; up]` are what the kernels read, so the weights need no preparation.
"""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from ..._mx_array import MXArray
from ..xla_activation import Activation, is_gated, SwiGLUOAI
from . import _kernels
from ._launch import Empty, Target
from ._permute import Permutation, permute, power_of_two
from ._tiles import Gemm, Tiles


# FlashInfer's numbers of activations, and the parameter that means no clamp.
_ACTIVATIONS = {
    "silu": (3, 1.0, 0.0, 0.0),
    "gelu": (4, 0.0, 0.0, 0.0),
    "gelu_tanh": (8, 0.0, 0.0, 0.0),
    "relu2": (6, 0.0, 0.0, 0.0),
}
_NO_ACTIVATION = (-1, 0.0, 0.0, 0.0)

# Arrays with more elements are indexed with 64 bits.
_NARROW_SIZE = (1 << 31) - 1


def moe(
    x: Float[Array, "t h"],
    w13: MXArray,
    w2: MXArray,
    topk_ids: Int[Array, "t k"],
    topk_weights: Float[Array, "t k"],
    *,
    activation: Activation,
    apply_router_weight_on_input: bool,
    tiles: Tiles,
    target: Target,
) -> Float[Array, "t h"]:
    """Computes the experts' part of an MoE layer; see `ops.moe.mx_moe`.

    Both matmuls accumulate in float32; gate, up, the activation's output and each
    expert's output are rounded to bfloat16, and the sum over experts is float32 in a
    fixed order.
    """
    num_tokens, top_k = topk_ids.shape
    num_experts = w2.shape[0]
    if num_tokens * top_k == 0:
        return jnp.zeros_like(x)
    places = permute(topk_ids.reshape(-1), num_experts, tiles.rows, target)
    weights = topk_weights.astype(jnp.float32)
    rows_per_token = top_k
    if apply_router_weight_on_input:
        x = (x.astype(jnp.float32)[:, None] * weights[..., None]).astype(x.dtype)
        x, weights = x.reshape(-1, x.shape[-1]), jnp.ones_like(weights)
        rows_per_token = 1
    multiply = functools.partial(
        grouped_matmul,
        places=places,
        num_rows=num_tokens * top_k,
        block_rows=tiles.rows,
        target=target,
    )
    h = pack(x, places, rows_per_token, target)
    h = first_matmul(h, w13, w2.shape[2], activation, tiles, multiply, target)
    # Writing rows where they belong, as FlashInfer does, takes up to twice the time of
    # writing whole tiles. The sum over experts might as well read from anywhere.
    if places.place_of is None:
        out = multiply(h, w2, tiles.second, num_columns=w2.shape[1], scatter=True)
        rows = jnp.moveaxis(out.reshape(num_tokens, top_k, -1), 1, 0)
    else:
        out = multiply(h, w2, tiles.second, num_columns=w2.shape[1])
        rows = out.at[places.place_of.reshape(num_tokens, top_k).T].get(mode="clip")
    is_local = (topk_ids >= 0) & (topk_ids < num_experts)
    return combine(rows, weights, is_local)


def pack(
    x: Float[Array, "r h"], places: Permutation, rows_per_token: int, target: Target
) -> Float[Array, "places h"]:
    """Copies each routed row to its place; the other places become zeros."""
    packed = Empty((places.slots.size, x.shape[1]), x.dtype)
    kernel = _kernels.PACK_WIDE if _is_wide(x, packed) else _kernels.PACK
    return kernel(
        (-(-packed.shape[0] // 16), -(-packed.shape[1] // 128)),
        target,
        X=x,
        SLOTS=places.slots,
        OUT=packed,
        TOP_K=rows_per_token,
        MX=False,
    )


def first_matmul(h, w13, intermediate_size, activation, tiles, multiply, target):
    """Computes `activation(w13 @ h)`, in one kernel or two."""
    parameters = _activation_parameters(activation)
    if not is_gated(activation):
        return multiply(
            h, w13, tiles.first, num_columns=intermediate_size, activation=parameters
        )
    if tiles.fused and intermediate_size % tiles.first.n == 0:
        return multiply(
            h,
            w13,
            tiles.first,
            num_columns=intermediate_size,
            activation=parameters,
            gated=True,
        )
    h = multiply(h, w13, tiles.first, num_columns=2 * intermediate_size)
    out = Empty((h.shape[0], intermediate_size), h.dtype)
    tile = min(power_of_two(intermediate_size), 1024)
    num_tiles = -(-intermediate_size // tile)
    kind, *numbers = parameters
    kernel = _kernels.ACTIVATION_WIDE if _is_wide(h, out) else _kernels.ACTIVATION
    return kernel(
        (h.shape[0], num_tiles),
        target,
        X=h,
        OUT=out,
        activation_type=kind,
        **dict(zip(("param1", "param2", "param3"), numbers, strict=True)),
        I=intermediate_size,
        TILE_I=tile,
        NUM_TILES=num_tiles,
    )


def _activation_parameters(activation: Activation) -> tuple[int, float, float, float]:
    if activation == "swigluoai":
        activation = SwiGLUOAI()
    if not isinstance(activation, SwiGLUOAI):
        return _ACTIVATIONS[activation]
    limit = 0.0 if activation.limit is None else float(activation.limit)
    return (3, float(activation.alpha), float(activation.beta), limit)


def grouped_matmul(
    x: Float[Array, "places k"],
    w: MXArray,
    gemm: Gemm,
    *,
    places: Permutation,
    num_rows: int,
    block_rows: int,
    target: Target,
    num_columns: int,
    activation: tuple[int, float, float, float] = _NO_ACTIVATION,
    gated: bool = False,
    scatter: bool = False,
    out_dtype: DTypeLike = jnp.bfloat16,
) -> Float[Array, "rows n"]:
    """Multiplies each block of rows by its expert's weights.

    With `scatter` the result has one row for each routed row, and rows that have no
    place are not written; without, one for each place.
    """
    out = Empty((num_rows if scatter else x.shape[0], num_columns), out_dtype)
    num_blocks = -(-places.slots.size // block_rows)
    grid_n = -(-num_columns // gemm.n)
    wide = _is_wide(x, w.elements, out)
    kernel = _kernels.GEMM_WIDE if wide else _kernels.GEMM
    kind, *numbers = activation
    return kernel(
        (num_blocks, grid_n),
        target,
        hints=gemm.hints,
        X=x,
        W=w.elements,
        WS=w.scales,
        EXPERTS=places.block_expert,
        POST_PAD=places.num_places,
        SLOTS=places.slots,
        OUT=out,
        TM=block_rows,
        TN=gemm.n,
        TK=gemm.k,
        A8=False,
        MX=True,
        W4=False,
        BF16_DEQUANT=target.arch in ("sm_89", "sm_90"),
        GATED=gated,
        ACT=kind,
        **dict(zip(("P1", "P2", "P3"), numbers, strict=True)),
        SCATTER=scatter,
        WRITE_AMAX=False,
        GRID_N=1,  # Read with WRITE_AMAX only; a constant, so as to compile once.
        assignments=num_rows,
    )


def _is_wide(*arrays: Array | Empty) -> bool:
    size = lambda a: functools.reduce(lambda m, n: m * n, a.shape, 1)
    return max(map(size, arrays)) > _NARROW_SIZE


def combine(
    rows: Float[Array, "k t h"],
    weights: Float[Array, "t k"],
    is_local: Bool[Array, "t k"],
) -> Float[Array, "t h"]:
    """Sums what a token's experts returned by weight, in float32 and in order."""
    total = jnp.zeros(rows.shape[1:], jnp.float32)
    for k in range(rows.shape[0]):
        term = rows[k].astype(jnp.float32) * weights[:, k, None]
        # The rows of absent experts hold whatever was there before.
        total += jnp.where(is_local[:, k, None], term, 0.0)
    return total.astype(rows.dtype)

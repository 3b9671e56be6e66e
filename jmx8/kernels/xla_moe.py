"""Pure-XLA mixture of experts that computes only what the routing asks for.

`lax.ragged_dot` expands to a product over all experts on GPUs. Here the (token, expert)
pairs are sorted by expert and laid out in tiles of equally many rows, each tile
belonging to one expert, so that the cost is that of the routed tokens plus at most one
partly filled tile for each active expert. Tiles are worked through a few at a time;
those that no token needs are skipped.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

from .._device import default_device
from .._mx_array import dequantize, MXArray
from .xla_activation import Activation, apply_activation
from .xla_matmul import compute_dtype, dot_rows, fake_quantize


# Where values are rounded when activations are MXFP8: as FlashInfer's kernels
# `cutlass_fused_moe` and `trtllm_fp8_block_scale_moe` do.
Numerics = Literal["cutlass", "trtllm"]

# Bound on the widened weights that exist at one time on an accelerator.
_CHUNK_BYTES = 1 << 29


@dataclasses.dataclass(frozen=True)
class TilingConfig:
    """How the routed rows are cut up.

    Attributes:
        tile_rows: Rows of a tile; all of one expert.
        chunk_tiles: Tiles that one step works on.
    """

    tile_rows: int
    chunk_tiles: int


def select_tiling(
    num_rows: int, num_experts: int, expert_size: int, platform: str
) -> TilingConfig:
    """Chooses the tiling for `num_rows` routed rows.

    Args:
        num_rows: Tokens times experts per token.
        num_experts: Experts of the layer.
        expert_size: Weights of one expert.
        platform: As `jax.Device.platform` has it.
    """
    fair_share = -(-num_rows // num_experts)
    # The smallest power of two that holds an expert's fair share.
    tile_rows = min(max(16, 1 << (fair_share - 1).bit_length()), 512)
    if platform == "cpu":
        # A step of one tile is one plain matmul. Experts above their fair share should
        # not be widened twice, unless the matmul is what takes the time.
        return TilingConfig(tile_rows * 2 if 16 < tile_rows < 128 else tile_rows, 1)
    if fair_share <= 2:
        # XLA fuses widening into a product with one row, and with no other.
        tile_rows = 1
    # Chunks of equal size for what even routing fills, and a little more; or one for
    # the most there can be.
    largest_chunk = max(1, _CHUNK_BYTES // (2 * expert_size))
    most = _max_tiles(num_rows, num_experts, tile_rows)
    if most <= largest_chunk:
        return TilingConfig(tile_rows, most)
    expected = min(most, max(num_experts, num_rows // tile_rows) * 21 // 20)
    num_chunks = -(-expected // largest_chunk)
    return TilingConfig(tile_rows, -(-expected // num_chunks))


def _max_tiles(num_rows: int, num_experts: int, tile_rows: int) -> int:
    """Returns how many tiles the least even routing takes."""
    # Every active expert fills its tiles but for at most tile_rows - 1 rows of one.
    active = min(num_experts, num_rows)
    return (num_rows + active * (tile_rows - 1)) // tile_rows


def moe(
    x: Float[Array, "t h"],
    w13: MXArray | Float[Array, "e n h"],
    w2: MXArray | Float[Array, "e h i"],
    topk_ids: Int[Array, "t k"],
    topk_weights: Float[Array, "t k"],
    w13_bias: Float[Array, "e n"] | None,
    w2_bias: Float[Array, "e h"] | None,
    *,
    activation: Activation,
    apply_router_weight_on_input: bool,
    quantize_activations: bool,
    numerics: Numerics = "cutlass",
    tiling: TilingConfig | None = None,
) -> Float[Array, "t h"]:
    """Computes the experts' part of an MoE layer; see `ops.moe.mx_moe`.

    Both matmuls accumulate in float32, and so do the biases, the activation and the sum
    over experts. The activation's output and each expert's output are rounded to the
    dtype of `x`. With `quantize_activations`, `numerics` says what happens instead:

    - "cutlass": The matmuls' outputs and the biases are rounded to the dtype of `x`,
      and then added in float32. The activation's output is rounded to the dtype of `x`
      and then quantized. An expert's output is not rounded once more after its bias.
    - "trtllm": The biases are added to the accumulators and the activation's output is
      quantized from float32. An expert's output is rounded after its bias.

    Ids outside `[0, e)` contribute nothing.
    """
    top_k, dtype, num_rows = topk_ids.shape[1], x.dtype, topk_ids.size
    num_experts, *expert_shape = w13.shape
    if num_rows == 0:
        return jnp.zeros_like(x)
    if tiling is None:
        size = expert_shape[0] * expert_shape[1]
        tiling = select_tiling(num_rows, num_experts, size, default_device().platform)
    operands = (x, w13, w2, topk_ids, topk_weights, w13_bias, w2_bias)
    weights = topk_weights.astype(jnp.float32)
    if quantize_activations and not apply_router_weight_on_input:
        x = fake_quantize(x)  # once per token, not once per row

    def tokens_of(rows):
        tokens = x[rows // top_k]
        if not apply_router_weight_on_input:
            return tokens
        factors = weights.reshape(-1)[rows][..., None]
        tokens = (tokens.astype(jnp.float32) * factors).astype(dtype)
        return fake_quantize(tokens) if quantize_activations else tokens

    rounding = numerics if quantize_activations else None
    # "cutlass" has rounded an expert's output before its bias.
    is_rounded = rounding == "cutlass" and w2_bias is not None
    out_dtype = jnp.dtype(jnp.float32) if is_rounded else dtype
    expert = functools.partial(
        _apply_experts,
        w13=w13,
        w2=w2,
        w13_bias=w13_bias,
        w2_bias=w2_bias,
        activation=activation,
        dtype=dtype,
        out_dtype=out_dtype,
        rounding=rounding,
    )
    zeros = jnp.broadcast_to(_varying_zero(operands, out_dtype), x.shape[1:])
    tile_experts, row_of_slot, slot_of_row = _assign_slots(
        topk_ids.reshape(-1), num_experts, tiling
    )
    chunks = (
        tile_experts.reshape(-1, tiling.chunk_tiles),
        row_of_slot.reshape(-1, tiling.chunk_tiles, tiling.tile_rows),
    )
    out = _scan_chunks(
        lambda experts, rows: expert(tokens_of(rows), experts),
        chunks,
        lambda experts: experts < num_experts,
        zeros,
    )
    factors = jnp.ones_like(weights) if apply_router_weight_on_input else weights
    return _combine(out, slot_of_row, factors).astype(dtype)


def ragged_dot(
    x: Float[Array, "m k"],
    w: MXArray,
    ids: Int[Array, "m 1"],
    *,
    out_dtype: DTypeLike,
    quantize_activations: bool,
) -> Float[Array, "m n"]:
    """Multiplies each row by the weight of its own group, `[n, k]` of `[g, n, k]`.

    Computes only that, like `moe`. Rows whose id is outside `[0, g)` give zeros.
    """
    num_groups, n, k = w.shape
    if x.shape[0] == 0:
        return jnp.zeros((0, n), out_dtype)
    tiling = select_tiling(ids.size, num_groups, n * k, default_device().platform)
    zeros = jnp.broadcast_to(_varying_zero((x, w, ids), jnp.dtype(out_dtype)), (n,))
    dtype = x.dtype
    if quantize_activations:
        x = fake_quantize(x)
    tile_groups, row_of_slot, slot_of_row = _assign_slots(
        ids.reshape(-1), num_groups, tiling
    )
    chunks = (
        tile_groups.reshape(-1, tiling.chunk_tiles),
        row_of_slot.reshape(-1, tiling.chunk_tiles, tiling.tile_rows),
    )

    def apply(groups, rows):
        wide = compute_dtype(dtype)
        return dot_rows(x[rows].astype(wide), _take(w, groups, wide), out_dtype)

    out = _scan_chunks(apply, chunks, lambda groups: groups < num_groups, zeros)
    ones = jnp.ones(ids.shape, jnp.float32)
    return _combine(out, slot_of_row, ones).astype(out_dtype)


def _scan_chunks(apply, chunks, is_used, zeros):
    """Returns `[slots, h]`: `apply` of the experts and rows of one chunk after another.

    Chunks of which no tile is used give zeros.
    """

    # Recomputed in the backward pass: widened weights must never be stored.
    @jax.checkpoint
    def chunk(_, tiles):
        experts, rows = tiles
        # Unused tiles are last, so the first of a chunk speaks for all.
        return None, jax.lax.cond(
            is_used(experts[0]),
            lambda: apply(experts, rows),
            lambda: jnp.broadcast_to(zeros, (*rows.shape, *zeros.shape)),
        )

    _, out = jax.lax.scan(chunk, None, chunks)
    return out.reshape(-1, *zeros.shape)


def _combine(
    out: Float[Array, "slots h"],
    slot_of_row: Int[Array, " r"],
    factors: Float[Array, "t k"],
) -> Float[Array, "t h"]:
    """Sums what a token's experts returned, in float32; absent experts are zeros."""
    num_slots, hidden_size = out.shape
    # A gather instead of a scatter: the sum over experts has one fixed order.
    rows = out[jnp.minimum(slot_of_row, num_slots - 1)].astype(jnp.float32)
    rows = rows.reshape(*factors.shape, hidden_size) * factors[..., None]
    is_local = (slot_of_row < num_slots).reshape(factors.shape)
    return jnp.sum(jnp.where(is_local[..., None], rows, 0), axis=1)


def _varying_zero(operands: Any, dtype: jnp.dtype) -> Array:
    """Returns a zero that varies over the mesh axes that any operand varies over.

    Inside `shard_map` the branches of a condition must agree in that.
    """
    empty = lambda a: jax.lax.stop_gradient(a).reshape(-1)[:0].astype(dtype)
    leaves = jax.tree.leaves(operands)
    return functools.reduce(jnp.add, [jnp.sum(empty(leaf)) for leaf in leaves])


def _assign_slots(
    experts: Int[Array, " r"], num_experts: int, tiling: TilingConfig
) -> tuple[Int[Array, " tiles"], Int[Array, " slots"], Int[Array, " r"]]:
    """Gives each routed row a slot in a tile of its expert.

    Returns the expert of each tile, `num_experts` for unused ones, which come last; the
    row in each slot, 0 for empty ones; and the slot of each row, the number of slots
    for rows whose expert is not here.
    """
    tile_rows, chunk_tiles = tiling.tile_rows, tiling.chunk_tiles
    (num_rows,) = experts.shape
    num_tiles = _max_tiles(num_rows, num_experts, tile_rows)
    num_tiles = -(-num_tiles // chunk_tiles) * chunk_tiles
    num_slots = num_tiles * tile_rows

    is_local = (experts >= 0) & (experts < num_experts)
    experts = jnp.where(is_local, experts, num_experts).astype(jnp.int32)
    order = jnp.argsort(experts, stable=True)
    sizes = jnp.bincount(experts, length=num_experts + 1)[:num_experts]
    tiles = -(-sizes // tile_rows)
    last_tile = jnp.cumsum(tiles)
    ids = jnp.arange(num_tiles, dtype=last_tile.dtype)
    tile_experts = jnp.searchsorted(last_tile, ids, side="right").astype(jnp.int32)

    first_slot = (last_tile - tiles) * tile_rows
    first_rank = jnp.cumsum(sizes) - sizes
    shift = jnp.append(first_slot - first_rank, 0).astype(jnp.int32)
    sorted_experts = experts[order]
    slots = jnp.arange(num_rows, dtype=jnp.int32) + shift[sorted_experts]
    slots = jnp.where(sorted_experts < num_experts, slots, num_slots)
    row_of_slot = jnp.zeros(num_slots, jnp.int32).at[slots].set(order, mode="drop")
    slot_of_row = jnp.zeros(num_rows, jnp.int32).at[order].set(slots)
    return tile_experts, row_of_slot, slot_of_row


def _apply_experts(
    x, experts, *, w13, w2, w13_bias, w2_bias, activation, dtype, out_dtype, rounding
):
    """Applies expert `experts[c]` to the rows `x[c]`, `[c, rows, h]`."""
    matmul = functools.partial(
        _expert_matmul, experts, dtype=dtype, rounds_products=rounding == "cutlass"
    )
    h = apply_activation(matmul(x, w13, w13_bias), activation)
    if rounding != "trtllm":
        h = h.astype(dtype)
    if rounding is not None:
        h = fake_quantize(h)
    return matmul(h, w2, w2_bias).astype(out_dtype)


def _expert_matmul(experts, x, w, bias, *, dtype, rounds_products):
    """Returns `x @ w.T + bias` in float32, product and bias rounded first if asked."""
    wide = compute_dtype(dtype)
    out = dot_rows(x.astype(wide), _take(w, experts, wide), jnp.float32)
    terms = [out] if bias is None else [out, bias[experts][:, None]]
    if rounds_products:
        # The barrier keeps XLA from taking the two conversions for none.
        terms = jax.lax.optimization_barrier([a.astype(dtype) for a in terms])
    return functools.reduce(jnp.add, [a.astype(jnp.float32) for a in terms])


def _take(w, experts, dtype):
    """Returns the weights of some experts, widened to `dtype`."""
    pick = lambda a: jnp.take(a, experts, axis=0, mode="clip")
    if not isinstance(w, MXArray):
        return pick(w).astype(dtype)
    # As bytes: XLA's CPU compiler would widen FP8 to pick from it, and round it again.
    bitcast = jax.lax.bitcast_convert_type
    pick_bytes = lambda a: bitcast(pick(bitcast(a, jnp.uint8)), a.dtype)
    return dequantize(jax.tree.map(pick_bytes, w), dtype)

"""Pure-XLA mixture of experts that computes only what the routing asks for.

`lax.ragged_dot` expands to a product over all experts on GPUs. Here the (token, expert)
pairs are sorted by expert and laid out in tiles of equally many rows, each tile
belonging to one expert, so that the cost is that of the routed tokens plus at most one
partly filled tile for each active expert. Tiles are worked through a few at a time;
those that no token needs are skipped.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .._device import default_device
from .._mx_array import dequantize, MXArray
from .xla_activation import Activation, apply_activation
from .xla_matmul import compute_dtype, dot_rows, fake_quantize


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
    tiling: TilingConfig | None = None,
) -> Float[Array, "t h"]:
    """Computes the experts' part of an MoE layer; see `ops.moe.mx_moe`.

    Both matmuls accumulate in float32; the activation's output and each expert's
    output are rounded to the dtype of `x`, the sum over experts is float32. Ids outside
    `[0, e)` contribute nothing.
    """
    num_tokens, top_k = topk_ids.shape
    num_rows = num_tokens * top_k
    num_experts, *expert_shape = w13.shape
    if num_rows == 0:
        return jnp.zeros_like(x)
    if tiling is None:
        size = expert_shape[0] * expert_shape[1]
        tiling = select_tiling(num_rows, num_experts, size, default_device().platform)
    tile_experts, row_of_slot, slot_of_row = _assign_slots(
        topk_ids.reshape(-1), num_experts, tiling
    )
    in_tiles = (-1, tiling.chunk_tiles, tiling.tile_rows)
    weights = topk_weights.astype(jnp.float32)
    if quantize_activations and not apply_router_weight_on_input:
        x = fake_quantize(x)  # once per token, not once per row

    def tokens_of(rows):
        tokens = x[rows // top_k]
        if not apply_router_weight_on_input:
            return tokens
        factors = weights.reshape(-1)[rows][..., None]
        tokens = (tokens.astype(jnp.float32) * factors).astype(x.dtype)
        return fake_quantize(tokens) if quantize_activations else tokens

    expert = functools.partial(
        _apply_experts,
        w13=w13,
        w2=w2,
        w13_bias=w13_bias,
        w2_bias=w2_bias,
        activation=activation,
        quantize_activations=quantize_activations,
    )

    operands = (x, w13, w2, topk_ids, topk_weights, w13_bias, w2_bias)
    zero = _varying_zero(operands, x.dtype)

    # Recomputed in the backward pass: widened weights must never be stored.
    @jax.checkpoint
    def chunk(_, tile):
        experts, rows = tile
        # Unused tiles are last, so the first of a chunk speaks for all.
        return None, jax.lax.cond(
            experts[0] < num_experts,
            lambda: expert(tokens_of(rows), experts),
            lambda: jnp.broadcast_to(zero, (*rows.shape, x.shape[-1])),
        )

    _, out = jax.lax.scan(
        chunk,
        None,
        (tile_experts.reshape(in_tiles[:2]), row_of_slot.reshape(in_tiles)),
    )
    factors = jnp.ones_like(weights) if apply_router_weight_on_input else weights
    return _combine(out.reshape(-1, x.shape[-1]), slot_of_row, factors)


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
    return jnp.sum(jnp.where(is_local[..., None], rows, 0), axis=1).astype(out.dtype)


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
    x, experts, *, w13, w2, w13_bias, w2_bias, activation, quantize_activations
):
    """Applies expert `experts[c]` to the rows `x[c]`, `[c, rows, h]`."""
    dtype = compute_dtype(x.dtype)
    h = dot_rows(x.astype(dtype), _take(w13, experts, dtype), jnp.float32)
    if w13_bias is not None:
        h = h + w13_bias[experts].astype(jnp.float32)[:, None]
    h = apply_activation(h, activation).astype(x.dtype)
    if quantize_activations:
        h = fake_quantize(h)
    out = dot_rows(h.astype(dtype), _take(w2, experts, dtype), jnp.float32)
    if w2_bias is not None:
        out = out + w2_bias[experts].astype(jnp.float32)[:, None]
    return out.astype(x.dtype)


def _take(w, experts, dtype):
    """Returns the weights of some experts, widened to `dtype`."""
    pick = lambda a: jnp.take(a, experts, axis=0, mode="clip")
    if not isinstance(w, MXArray):
        return pick(w).astype(dtype)
    # As bytes: XLA's CPU compiler would widen FP8 to pick from it, and round it again.
    bitcast = jax.lax.bitcast_convert_type
    pick_bytes = lambda a: bitcast(pick(bitcast(a, jnp.uint8)), a.dtype)
    return dequantize(jax.tree.map(pick_bytes, w), dtype)

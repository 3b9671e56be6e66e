"""Sorts routed rows by expert, through FlashInfer's permutation kernels."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from . import _kernels
from ._launch import Empty, Target


# FlashInfer's measured choices; see `_cutile_permute_shape` there.
_SMALL_ROWS = 24
_TILE_SIZE = 1 << 14

# An id that no histogram counts and whose slot lies outside every buffer, where the
# kernels store nothing.
_NOWHERE = 1 << 30


class Permutation(NamedTuple):
    """Routed rows in blocks that each belong to one expert.

    Attributes:
        slots: For each place in the blocks the routed row that it holds; the number of
            routed rows where it holds none.
        block_expert: The expert of each block.
        num_places: Places in use, `[1]`; the blocks beyond are never computed.
        place_of: The place of each routed row; of any value for a row that has none.
            None for few rows, for which nobody needs it.
    """

    slots: Int[Array, " places"]
    block_expert: Int[Array, " blocks"]
    num_places: Int[Array, " 1"]
    place_of: Int[Array, " r"] | None


class _Histogram(NamedTuple):
    """How the routed rows are cut up for counting."""

    num_bins: int
    chunk_rows: int
    num_chunks: int
    padded_chunks: int
    chunks_per_slab: int

    @property
    def num_slabs(self) -> int:
        return self.padded_chunks // self.chunks_per_slab


def power_of_two(n: int) -> int:
    """Returns the smallest power of two that is at least `n`, for positive `n`."""
    return 1 << (n - 1).bit_length()


def num_places(num_rows: int, num_experts: int, block_rows: int) -> int:
    """Returns how many places the least even routing takes."""
    return num_rows + min(num_rows, num_experts) * (block_rows - 1)


def permute(
    ids: Int[Array, " r"], num_experts: int, block_rows: int, target: Target
) -> Permutation:
    """Sorts routed rows by expert, stably.

    Args:
        ids: Expert of each routed row, of any value. Rows whose id is not in
            `[0, num_experts)` get no place; among few rows they get one with expert 0
            instead, and whoever uses the result leaves them out.
        num_experts: Number of experts.
        block_rows: Rows of a block.
        target: What the kernels are compiled for.
    """
    (num_rows,) = ids.shape
    places = num_places(num_rows, num_experts, block_rows)
    is_local = (ids >= 0) & (ids < num_experts)
    # The kernel for few rows has no way to drop one.
    elsewhere = 0 if num_rows <= _SMALL_ROWS else _NOWHERE
    ids = jnp.where(is_local, ids, elsewhere).astype(jnp.int32)
    if num_rows <= _SMALL_ROWS:
        return _permute_few(ids, num_experts, block_rows, places, target)
    return _permute_many(ids, num_experts, block_rows, places, target)


def _permute_few(ids, num_experts, block_rows, places, target):
    num_blocks = -(-places // block_rows)
    slots, block_expert, total = _kernels.PERMUTE_SMALL(
        (1, 1),
        target,
        TOPK_IDS=ids,
        SORTED_SLOTS=_ints(places),
        BLOCK_EXPERT=_ints(num_blocks),
        NUM_POST_PAD=_ints(1),
        numel=ids.size,
        em=places,
        num_blocks=num_blocks,
        E=num_experts,
        EPOW2=power_of_two(num_experts),
        CHUNK_SIZE=max(8, power_of_two(ids.size)),
        NBPOW2=power_of_two(num_blocks),
        BLOCK_SIZE=block_rows,
    )
    return Permutation(slots, block_expert, total, None)


def _permute_many(ids, num_experts, block_rows, places, target):
    num_rows = ids.size
    counting = _histogram(num_rows, num_experts)
    rows: dict[str, Any] = {
        "EPOW2": counting.num_bins,
        "CHUNK_SIZE": counting.chunk_rows,
    }
    # The kernels for many slabs read the padding of the histogram, and write the
    # experts of used blocks only.
    is_long = counting.num_slabs > 2
    size = counting.num_bins * counting.padded_chunks
    ranks, histogram = _kernels.PERMUTE_CHUNK_RANK(
        (counting.num_chunks, 1),
        target,
        TOPK_IDS=ids,
        RANKS=_ints(num_rows),
        HIST=jnp.zeros(size, jnp.int32)
        if is_long
        else _ints(counting.num_bins * counting.num_chunks),
        numel=num_rows,
        **rows,
    )
    scan = _scan_long if is_long else _scan_short
    offsets, base, total, block_expert = scan(
        histogram, counting, num_experts, block_rows, -(-places // block_rows), target
    )
    slots = _kernels.PERMUTE_SCATTER(
        (counting.num_chunks, 1),
        target,
        TOPK_IDS=ids,
        RANKS=ranks,
        BASE=base,
        SORTED_SLOTS=jnp.full(places, num_rows, jnp.int32),
        numel=num_rows,
        **rows,
    )
    block_expert = _kernels.PERMUTE_BLOCK_EXPERT(
        (num_experts, 1),
        target,
        PAD_OFFSETS=offsets,
        BLOCK_EXPERT=block_expert,
        BLOCK_SIZE=block_rows,
    )
    return Permutation(
        slots, block_expert, total, place_of_rows(ids, base, ranks, counting)
    )


def place_of_rows(
    ids: Int[Array, " r"],
    base: Int[Array, " bins"],
    ranks: Int[Array, " r"],
    counting: _Histogram,
) -> Int[Array, " r"]:
    """Returns where the kernel for many rows stores each row.

    `base` has the first place of each chunk's rows of each expert, `ranks` the rank of
    a row among them.
    """
    chunks = jnp.arange(ids.size, dtype=jnp.int32) // counting.chunk_rows
    return base.at[chunks * counting.num_bins + ids].get(mode="clip") + ranks


def _scan_short(histogram, counting, num_experts, block_rows, num_blocks, target):
    """Turns counts into first places, in one thread block."""
    return _kernels.PERMUTE_SCAN(
        (1, 1),
        target,
        HIST=histogram,
        PAD_OFFSETS=_ints(num_experts + 1),
        BASE=_ints(counting.num_bins * counting.padded_chunks),
        NUM_POST_PAD=_ints(1),
        BLOCK_EXPERT=_ints(num_blocks),
        num_blocks=num_blocks,
        E=num_experts,
        EPOW2=counting.num_bins,
        CHUNKS_PER_SLAB=counting.chunks_per_slab,
        NUM_SLABS=counting.num_slabs,
        BLOCK_SIZE=block_rows,
        NBPOW2=power_of_two(num_blocks),
    )


def _scan_long(histogram, counting, num_experts, block_rows, num_blocks, target):
    """Turns counts into first places, one thread block for each slab."""
    slabs: dict[str, Any] = {
        "EPOW2": counting.num_bins,
        "CHUNKS_PER_SLAB": counting.chunks_per_slab,
    }
    totals = _kernels.PERMUTE_SCAN_PARTIALS(
        (counting.num_slabs, 1),
        target,
        HIST=histogram,
        SLAB_TOTALS=_ints(counting.num_slabs * counting.num_bins),
        **slabs,
    )
    totals, offsets, total = _kernels.PERMUTE_SCAN_COMBINE(
        (1, 1),
        target,
        SLAB_TOTALS=totals,
        PAD_OFFSETS=_ints(num_experts + 1),
        NUM_POST_PAD=_ints(1),
        E=num_experts,
        EPOW2=counting.num_bins,
        NUM_SLABS=counting.num_slabs,
        BLOCK_SIZE=block_rows,
    )
    base = _kernels.PERMUTE_SCAN_BASES(
        (counting.num_slabs, 1),
        target,
        HIST=histogram,
        SLAB_TOTALS=totals,
        BASE=_ints(histogram.size),
        **slabs,
    )
    return offsets, base, total, jnp.zeros(num_blocks, jnp.int32)


def _histogram(num_rows: int, num_experts: int) -> _Histogram:
    """Chooses how many rows each thread block counts."""
    num_bins = power_of_two(num_experts)
    most = max(8, _TILE_SIZE // num_bins)
    if num_rows >= 128 * most:
        chunk_rows = min(32, max(8, most // 2))
    elif num_rows >= 32 * most:
        chunk_rows = most
    else:
        wanted_chunks = max(8, _TILE_SIZE // (4 * num_bins))
        chunk_rows = max(8, power_of_two(num_rows) // wanted_chunks)
        chunk_rows = min(max(8, most // 2), chunk_rows)
    num_chunks = -(-num_rows // chunk_rows)
    padded_chunks = power_of_two(num_chunks)
    chunks_per_slab = max(1, min(padded_chunks, _TILE_SIZE // num_bins))
    return _Histogram(num_bins, chunk_rows, num_chunks, padded_chunks, chunks_per_slab)


def _ints(size: int) -> Empty:
    return Empty((size,), jnp.int32)

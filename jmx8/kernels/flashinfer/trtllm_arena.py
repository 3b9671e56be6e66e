"""How much memory `trtllm_fp8_block_scale_moe` allocates while it runs.

The kernel's tokens, each once for each of its experts, are sorted by expert and padded
to tiles of equally many rows. Everything below is an allocation of FlashInfer's
launcher, in its order; a test compares the list with the launcher's source.
"""

from typing import NamedTuple

from .layouts import round_up


# Of rows of a tile, those that FlashInfer has MXFP8 kernels for.
TILE_ROWS = (8, 16, 32, 64, 128, 256)

# The bridge aligns every allocation.
_ALIGNMENT = 128
# FlashInfer allocates at least this for the output of each matmul.
_MIN_OUTPUT_BYTES = 128 << 10
# The two matmuls' own scratch memory. Their kernels are not FlashInfer's and are not
# public in this version; in the last public one it is 0 for MXFP8. Should one need
# more, the call fails and says so.
_MATMUL_BYTES = 1 << 20


class Sizes(NamedTuple):
    """What the allocations depend on.

    Attributes:
        num_tokens: Tokens.
        top_k: Experts per token.
        num_experts: Experts that ids can name.
        num_local_experts: Experts that are here.
        hidden_size: Columns of the output.
        inner_size: Columns between the matmuls.
    """

    num_tokens: int
    top_k: int
    num_experts: int
    num_local_experts: int
    hidden_size: int
    inner_size: int


def default_tile_rows(sizes: Sizes) -> int:
    """Returns the rows of a tile that the launcher picks if it is not told: one step
    below the fewest that hold an expert's fair share."""
    fair_share = sizes.num_tokens * sizes.top_k / sizes.num_local_experts
    last = len(TILE_ROWS) - 1
    i = next((i for i, rows in enumerate(TILE_ROWS) if rows >= fair_share), last)
    return TILE_ROWS[max(i - 1, 0)]


def max_tiles(sizes: Sizes, tile_rows: int) -> int:
    """Returns how many tiles the least even routing takes."""
    num_rows = sizes.num_tokens * sizes.top_k
    active = min(sizes.num_experts, num_rows)
    return active + (num_rows - active) // tile_rows


def arena_bytes(sizes: Sizes, tactic: tuple[int, int], *, gives_weights: bool) -> int:
    """Returns a bound on what one call allocates.

    Args:
        sizes: Of the call.
        tactic: Rows of a tile and number of a configuration; -1 for the default.
        gives_weights: Whether the weights of the experts are an operand; else the
            kernel allocates its own.
    """
    tile_rows = default_tile_rows(sizes) if -1 in tactic else tactic[0]
    num_rows = sizes.num_tokens * sizes.top_k
    tiles = max_tiles(sizes, tile_rows)
    padded_rows = tiles * tile_rows
    at_least = lambda row_bytes: max(padded_rows, -(-_MIN_OUTPUT_BYTES // row_bytes))
    inner_rows = at_least(sizes.inner_size)
    outer_rows = at_least(2 * sizes.hidden_size)
    allocations = (
        4 * sizes.num_experts,  # tokens of each expert
        4,  # padded rows in all
        4 * num_rows,  # where each row went
        4 * (padded_rows + 1),  # the token of each padded row
        4 * num_rows,  # ids
        4 * max(2 * sizes.num_experts, 512),  # histogram
        4 * tiles,  # the expert of each tile
        4 * tiles,  # the end of each tile
        4,  # tiles in use
        0 if gives_weights else 2 * num_rows,
        _MATMUL_BYTES,
        inner_rows * sizes.inner_size,
        round_up(inner_rows, 128) * round_up(sizes.inner_size // 32, 4),
        outer_rows * sizes.hidden_size * 2,
    )
    return sum(round_up(num_bytes, _ALIGNMENT) for num_bytes in allocations)

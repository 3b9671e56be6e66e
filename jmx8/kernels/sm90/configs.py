"""Which configuration a matmul runs with, by how much there is to do.

The table is `configs.json`, which `benchmarks/tune_sm90.py` measures and writes.
"""

import functools
import itertools
import json
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple


class GemmConfig(NamedTuple):
    """How a matmul is computed; `csrc/kernels.h` says what the fields mean."""

    kernel: int
    tile_rows: int
    variant: int
    split_k: int


# What tactics that were measured belong to: changes when a configuration comes to mean
# something else, or is gone.
VERSION = "4"

# The variants of each number of tile rows, and those that a first expert matmul can
# have, with a gather and a gate: of gemm_mma.cu and of gemm_wgmma.cu.
_MMA = {1: (1, 2, 3, 5), 8: (2, 4, 6, 7, 8, 9), 16: (4, 6, 7, 8), 32: (7, 10)}
_MMA_FIRST = (2, 4, 6)
_WGMMA = {
    **{8: (0, 2), 16: (0, 2), 32: (0, 1, 2, 6)},
    **{64: (0, 1, 2, 4, 6), 128: (0, 2, 4, 6), 256: (5,)},
}
_WGMMA_FIRST = (0, 2, 4, 5)
# With the columns of their activations mixed, which only both matmuls of a layer can
# have: the variant 4 of each number of tile rows in another form.
_MIXED, _UNMIXED = 8, 4
MIXED_PAIRS = tuple((GemmConfig(1, rows, _MIXED, 1),) * 2 for rows in (64, 128))
_WGMMA_SPLIT_K = (1, 2, 4, 8)
# Those whose sums leave no room in shared memory for another thread block's.
_WGMMA_WHOLE_K = ((128, 4), (256, 5))


def _compiled() -> Iterator[GemmConfig]:
    for rows, variants in _MMA.items():
        yield from (GemmConfig(0, rows, variant, 1) for variant in variants)
    for rows, variants in _WGMMA.items():
        for variant, split_k in itertools.product(variants, _WGMMA_SPLIT_K):
            if split_k == 1 or (rows, variant) not in _WGMMA_WHOLE_K:
                yield GemmConfig(1, rows, variant, split_k)


CONFIGS = tuple(_compiled())
FIRST_CONFIGS = tuple(
    c for c in CONFIGS if c.variant in (_MMA_FIRST, _WGMMA_FIRST)[c.kernel]
)


def dense_config(m: int, n: int, k: int) -> GemmConfig:
    """Returns the configuration for x `[m, k]` and w `[n, k]`."""
    entries = _nearest(_table()["dense"], {"n": n, "k": k})
    # A tile for fewer rows would read the weights more than once.
    enough = [entry for entry in entries if entry["m"] >= m]
    best = min(enough, key=_rows) if enough else max(entries, key=_rows)
    return GemmConfig(*best["config"])


def ragged_config(num_rows: int, num_experts: int, n: int, k: int) -> GemmConfig:
    """Returns the configuration of a layer's first half, of weights `[e, n, k]`."""
    return _unmixed(moe_configs(num_rows, num_experts, k, n // 2)[0])


def moe_configs(
    num_rows: int, num_experts: int, h: int, i: int
) -> tuple[GemmConfig, GemmConfig]:
    """Returns the configurations of a layer's two matmuls, of equal `tile_rows`.

    Args:
        num_rows: Tokens times experts per token.
        num_experts: Experts of the layer.
        h: Hidden size.
        i: Intermediate size.
    """
    entries = _nearest(_table()["moe"], {"h": h, "i": i})
    # What counts is how full the tiles are.
    rows = max(1, num_rows) / num_experts
    (best, *_) = _nearest(entries, {"rows_per_expert": rows})
    return _possible(_pair(best), h, i)


def tile_sizes(rows: int | float) -> set[int]:
    """Returns the numbers of tile rows that could suit so many rows."""
    sizes = {config.tile_rows for config in CONFIGS}
    return {s for s in sizes if min(rows / 4, 64) <= s <= max(8, 4 * rows)}


def dense_candidates(m: int) -> list[GemmConfig]:
    """Returns those that are the fastest for something, and could be for m rows."""
    sizes = tile_sizes(m)
    fastest = (GemmConfig(*entry["config"]) for entry in _table()["dense"])
    return _distinct(c for c in fastest if c.tile_rows in sizes)


def moe_candidates(h: int, i: int) -> list[tuple[GemmConfig, GemmConfig]]:
    """Returns the pairs that go together of those that are the fastest somewhere.

    Args:
        h: Hidden size.
        i: Intermediate size.
    """
    fastest = [_possible(_pair(entry), h, i) for entry in _table()["moe"]]
    mixed = [pair for pair in fastest if pair in MIXED_PAIRS]
    firsts, seconds = zip(*(p for p in fastest if p not in MIXED_PAIRS), strict=True)
    pairs = itertools.product(_distinct(firsts), _distinct(seconds))
    return _distinct([p for p in pairs if p[0].tile_rows == p[1].tile_rows] + mixed)


@functools.cache
def _table() -> dict[str, Any]:
    path = pathlib.Path(__file__).with_name("configs.json")
    return json.loads(path.read_text())


def _pair(entry: dict[str, Any]) -> tuple[GemmConfig, GemmConfig]:
    return GemmConfig(*entry["first"]), GemmConfig(*entry["second"])


def _possible(
    pair: tuple[GemmConfig, GemmConfig], h: int, i: int
) -> tuple[GemmConfig, GemmConfig]:
    """Returns the pair without mixing if there are no whole groups of 64 columns."""
    if h % 64 == 0 and i % 64 == 0:
        return pair
    first, second = map(_unmixed, pair)
    return first, second


def _unmixed(config: GemmConfig) -> GemmConfig:
    is_mixed = config.kernel == 1 and config.variant == _MIXED
    return config._replace(variant=_UNMIXED) if is_mixed else config


def _rows(entry: dict[str, Any]) -> int:
    return entry["m"]


def _distinct(items: Any) -> list[Any]:
    return list(dict.fromkeys(items))


def _nearest(entries: Sequence[Any], sizes: Mapping[str, int | float]) -> list[Any]:
    """Returns the entries whose sizes are nearest as ratios."""
    distance = lambda entry: math.hypot(
        *(math.log(entry[name] / size) for name, size in sizes.items())
    )
    least = min(map(distance, entries))
    return [entry for entry in entries if distance(entry) == least]

"""Which tiles the grouped matmuls run with, by how much there is to do."""

import dataclasses
import functools
import json
import math
import pathlib
from typing import Any


@dataclasses.dataclass(frozen=True)
class Gemm:
    """Tiles of one grouped matmul.

    Attributes:
        n: Output columns of a tile.
        k: Elements along the contraction that one step takes.
        occupancy: Thread blocks per multiprocessor that the compiler plans for.
        warps: Warps of a thread block that multiply; 0 for the compiler's choice.
    """

    n: int
    k: int
    occupancy: int
    warps: int = 0

    @property
    def hints(self) -> tuple[tuple[str, int], ...]:
        """What the compiler is told."""
        warps = (("num_worker_warps", self.warps),) if self.warps else ()
        return (("occupancy", self.occupancy), *warps)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How an MoE layer is cut up.

    Attributes:
        rows: Rows of a block, which all belong to one expert.
        first: The matmul of gate and up.
        second: The matmul back to the hidden size.
        fused: Whether the first applies the activation. One thread block then computes
            the same columns of gate and of up.
    """

    rows: int
    first: Gemm
    second: Gemm
    fused: bool


# Block sizes that a table may name.
BLOCK_ROWS = (16, 32, 64, 128, 256)


@functools.cache
def _table() -> dict[str, Any]:
    """Returns what `benchmarks/tune_cutile.py` found."""
    path = pathlib.Path(__file__).with_name("tiles.json")
    return json.loads(path.read_text())


def moe_tiles(arch: str, routed: tuple[int, ...], num_experts: int) -> Tiles:
    """Returns the tiles for an MoE layer.

    Args:
        arch: As compilers call it.
        routed: Shape of the routing result, tokens and experts of each.
        num_experts: Experts of the layer.
    """
    rows = _table()["moe"].get(arch) or _table()["moe"]["unmeasured"]
    num_rows = max(1, math.prod(routed))
    # Measured for one number of experts: what counts is how full the blocks are.
    entry = _nearest(rows, num_rows / num_experts, "rows_per_expert")
    first, second = Gemm(**entry["first"]), Gemm(**entry["second"])
    return Tiles(entry["block_rows"], first, second, entry["fused"])


def dense_tiles(arch: str, num_rows: int) -> tuple[int, Gemm]:
    """Returns block size and tiles for a matmul with one weight matrix."""
    rows = _table()["dense"].get(arch) or _table()["dense"]["unmeasured"]
    entry = _nearest(rows, float(max(1, num_rows)), "rows")
    return entry["block_rows"], Gemm(**entry["gemm"])


def _nearest(rows: list[dict[str, Any]], size: float, key: str) -> dict[str, Any]:
    """Returns the entry measured at the size that is nearest as a ratio."""
    distance = lambda row: abs(math.log(row[key] / size))
    return min(rows, key=distance)

"""The backend "sm90" of `mx_ragged_dot`: the first half of a layer of experts."""

import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

from ..._mx_array import MXArray
from .._ffi import Output
from . import configs, dense, kernels
from .moe import as_int32, MOST_EXPERTS


def unsupported(
    x: Float[Array, "m k"], w: MXArray, ids: Int[Array, "m 1"], *, out_dtype: DTypeLike
) -> str | None:
    """Returns why `run` cannot run here, None if it can."""
    del ids
    if problem := dense.unsupported(x, w, out_dtype=out_dtype):
        return problem
    if w.shape[0] > MOST_EXPERTS:
        return f"it sorts into at most {MOST_EXPERTS} groups, not {w.shape[0]}"
    return None


def run(
    x: Float[Array, "m k"], w: MXArray, ids: Int[Array, "m 1"], *, out_dtype: DTypeLike
) -> Float[Array, "m n"]:
    """Computes `x[i] @ w[ids[i]].T`; zeros for ids outside `[0, g)`.

    Accumulated in float32. Two runs give the same bits.
    """
    num_groups, n, k = w.shape
    config = configs.ragged_config(ids.size, num_groups, n, k)
    slot_rows, slot_of_row, tiles, num_tiles = kernels.permute(
        as_int32(ids, num_groups),
        num_experts=num_groups,
        tile_rows=config.tile_rows,
        row_divisor=1,
    )
    rows = kernels.gemm(
        x,
        w,
        None,
        Output((ids.size, n), out_dtype),
        config,
        tiles=tiles,
        num_tiles=num_tiles,
        slot_rows=slot_rows,
    )
    # Slots of no row are not written; what is there may be anything.
    return jnp.where(slot_of_row >= 0, rows[slot_of_row[:, 0]], 0)

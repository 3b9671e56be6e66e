"""The backend "sm90" of `mx_matmul`."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float

from ..._mx_array import MXArray
from .._ffi import Output
from .._prepared import PreparedWeights
from ..tactics import Tactic
from ..xla_matmul import add_bias
from . import configs, kernels, library
from .configs import GemmConfig, VERSION as VERSION


def unsupported(
    x: Float[Array, "*g m k"],
    w: MXArray | PreparedWeights,
    bias: Float[Array, "*g r n"] | None = None,
    *,
    out_dtype: DTypeLike,
) -> str | None:
    """Returns why `run` cannot run here, None if it can."""
    del bias
    if problem := library.why_not_here():
        return problem
    if not isinstance(w, MXArray):
        return f"the weights are laid out for {w.layout.name}"
    if x.dtype != jnp.bfloat16:
        return f"it multiplies bfloat16 activations, and x is {x.dtype}"
    if jnp.dtype(out_dtype) not in (jnp.bfloat16, jnp.float32):
        return f"it returns bfloat16 or float32, not {jnp.dtype(out_dtype)}"
    if x.size == 0 or w.size == 0:
        return "there is nothing to compute"
    return None


def tactics(
    x: Any, w: MXArray, *operands: Any, **options: Any
) -> tuple[Sequence[GemmConfig]]:
    """Returns the configurations that `run` takes, the default first.

    `x` `[*g, m, k]` may be abstract.
    """
    del operands, options
    default = _default_config(x, w)
    others = (c for c in configs.dense_candidates(x.shape[-2]) if c != default)
    return ((default, *others),)


def _default_config(x: Any, w: MXArray) -> GemmConfig:
    *groups, n, k = w.shape
    return configs.dense_config(x.shape[-2], math.prod(groups) * n, k)


def run(
    x: Float[Array, "*g m k"],
    w: MXArray,
    bias: Float[Array, "*g r n"] | None = None,
    *,
    out_dtype: DTypeLike,
    tactic: Tactic | None = None,
) -> Float[Array, "*g m n"]:
    """Computes `x @ w.T + bias`; see `ops.matmul.mx_matmul`.

    Two runs give the same bits.
    """
    config = _default_config(x, w) if tactic is None else GemmConfig(*tactic[0])
    if bias is not None and bias.shape[-2] != 1:
        # One for each row, from a batched bias: not in the kernel.
        return add_bias(_product(x, w, None, jnp.float32, config), bias, out_dtype)
    return _product(x, w, bias, out_dtype, config)


def _product(x, w, bias, out_dtype, config):
    *groups, m, k = x.shape
    n, num_groups = w.shape[-2], math.prod(groups)
    rows = x.reshape(num_groups * m, k)
    out = Output((num_groups * m, n), out_dtype)
    if not groups:
        bias = None if bias is None else bias.reshape(n)
        return kernels.gemm(rows, w, bias, out, config)
    tiles = _group_tiles(num_groups, m, config.tile_rows)
    w = MXArray(
        w.elements.reshape(num_groups, n, k),
        w.scales.reshape(num_groups, n, -1),
        dtype=w.dtype,
    )
    result = kernels.gemm(
        rows,
        w,
        None if bias is None else bias.reshape(num_groups, n),
        out,
        config,
        tiles=jnp.asarray(tiles),
        num_tiles=jnp.full(1, len(tiles), jnp.int32),
    )
    return result.reshape(*groups, m, n)


def _group_tiles(num_groups: int, m: int, tile_rows: int) -> np.ndarray:
    """Returns tiles `[tiles, 4]` of groups of m rows each, as `permute` makes them."""
    edges = np.append(np.arange(0, m, tile_rows), m)
    group = np.repeat(np.arange(num_groups), edges.size - 1)
    first = np.tile(edges[:-1], num_groups) + group * m
    size = np.tile(np.diff(edges), num_groups)
    return np.stack([group, first, size, 0 * size], axis=1).astype(np.int32)

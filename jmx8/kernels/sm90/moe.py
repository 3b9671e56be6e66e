"""The backend "sm90" of `mx_moe`.

Four kernels in one call: the routed rows are sorted by expert; the first matmul gathers
the tokens and applies the activation; the second one follows; and the rows of a token
are summed. Each starts while the one before it ends. For some configurations a fifth
mixes the columns of the tokens while the rows are sorted.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..._mx_array import MXArray
from ..tactics import Tactic
from ..xla_activation import Activation
from . import configs, kernels, library
from .configs import GemmConfig, VERSION as VERSION


MOST_EXPERTS = 1024


def unsupported(
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
) -> str | None:
    """Returns why `run` cannot run here, None if it can."""
    if problem := library.why_not_here():
        return problem
    if not (isinstance(w13, MXArray) and isinstance(w2, MXArray)):
        return "the weights are not MXFP8"
    if x.dtype != jnp.bfloat16:
        return f"it multiplies bfloat16 activations, and x is {x.dtype}"
    if w2.shape[1] % 8:
        return f"it takes hidden sizes that are multiples of 8, not {w2.shape[1]}"
    if w2.shape[0] > MOST_EXPERTS:
        return f"it sorts by at most {MOST_EXPERTS} experts, not {w2.shape[0]}"
    if topk_ids.size == 0 or w13.size == 0:
        return "there is nothing to compute"
    if topk_ids.size >= 1 << 31:
        return f"{topk_ids.size} routed rows are more than 32 bits can number"
    return None


def tactics(
    x: Any, w13: MXArray, w2: MXArray, topk_ids: Any, *operands: Any, **options: Any
) -> tuple[Sequence[tuple[GemmConfig, GemmConfig]]]:
    """Returns the configurations of both matmuls that `run` takes, default first.

    The operands are those of `run`, which may be abstract.
    """
    del x, w13, operands, options
    default = _default_configs(w2, topk_ids)
    _, h, i = w2.shape
    others = (pair for pair in configs.moe_candidates(h, i) if pair != default)
    return ((default, *others),)


def _default_configs(w2, topk_ids):
    num_experts, h, i = w2.shape
    return configs.moe_configs(topk_ids.size, num_experts, h, i)


def run(
    x: Float[Array, "t h"],
    w13: MXArray,
    w2: MXArray,
    topk_ids: Int[Array, "t k"],
    topk_weights: Float[Array, "t k"],
    w13_bias: Float[Array, "e n"] | None,
    w2_bias: Float[Array, "e h"] | None,
    *,
    activation: Activation,
    apply_router_weight_on_input: bool,
    tactic: Tactic | None = None,
) -> Float[Array, "t h"]:
    """Computes the experts' part of an MoE layer; see `ops.moe.mx_moe`.

    Both matmuls accumulate in float32, and so does the sum over experts; the
    activation's output and each expert's output are rounded to bfloat16. Two runs give
    the same bits.
    """
    num_experts, h, _ = w2.shape
    pair = _default_configs(w2, topk_ids) if tactic is None else tactic[0]
    first, second = (GemmConfig(*config) for config in pair)
    weights = topk_weights.astype(jnp.float32)
    if apply_router_weight_on_input:
        x = (x.astype(jnp.float32)[:, None] * weights[..., None]).astype(x.dtype)
        x, weights = x.reshape(-1, h), None
    return kernels.moe(
        _pad_last(x, w13.padding),
        w13,
        w13_bias,
        w2,
        w2_bias,
        as_int32(topk_ids, num_experts),
        weights,
        first,
        second,
        activation=activation,
    )


def _pad_last(a: Float[Array, "r k"], padding: int) -> Float[Array, "r padded"]:
    return jnp.pad(a, [(0, 0), (0, padding)]) if padding else a


def as_int32(ids: Int[Array, "t k"], num_experts: int) -> Int[Array, "t k"]:
    """Returns the ids as int32; those outside the range stay outside."""
    if ids.dtype.itemsize >= 4 and ids.dtype != jnp.int32:
        # Before the cast, which could wrap one into the range.
        ids = jnp.where((ids >= 0) & (ids < num_experts), ids, num_experts)
    return ids.astype(jnp.int32)

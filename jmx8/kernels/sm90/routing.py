"""The backend "sm90" of `route`: everything in one launch."""

from typing import get_args

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .._ffi import Output
from ..xla_routing import RoutingMethod
from . import kernels, library


_MOST_EXPERTS = 512
_MOST_CHOSEN = 16

# As `enum class Scores` numbers them.
_SCORES = {name: number for number, name in enumerate(get_args(RoutingMethod))}


def unsupported(
    logits: Float[Array, "t e"],
    correction_bias: Float[Array, "*t e"] | None,
    *,
    top_k: int,
    **options: object,
) -> str | None:
    """Returns why `run` cannot run here, None if it can."""
    del correction_bias, options
    if problem := library.why_not_here():
        return problem
    if logits.dtype not in (jnp.bfloat16, jnp.float32):
        return f"it takes bfloat16 or float32 logits, and these are {logits.dtype}"
    num_tokens, num_experts = logits.shape
    if num_experts > _MOST_EXPERTS or top_k > _MOST_CHOSEN:
        return (
            f"it chooses at most {_MOST_CHOSEN} of at most {_MOST_EXPERTS} experts, "
            f"not {top_k} of {num_experts}"
        )
    if num_tokens == 0:
        return "there is nothing to compute"
    return None


def run(
    logits: Float[Array, "t e"],
    correction_bias: Float[Array, "*t e"] | None,
    *,
    method: RoutingMethod,
    top_k: int,
    renormalize: bool,
    num_groups: int,
    topk_groups: int,
    scaling_factor: float,
) -> tuple[Int[Array, "t k"], Float[Array, "t k"]]:
    """Computes `ops.routing.route` for logits `[t, e]` and a bias `[e]` or `[t, e]`."""
    bias = None if correction_bias is None else correction_bias.astype(jnp.float32)
    shape = (logits.shape[0], top_k)
    ids, weights = kernels.ROUTE(
        logits=logits,
        bias=bias,
        ids=Output(shape, jnp.int32),
        weights=Output(shape, jnp.float32),
        scores=_SCORES[method],
        num_groups=num_groups,
        topk_groups=topk_groups,
        renormalize=renormalize,
        scaling_factor=float(scaling_factor),
    )
    return ids, weights

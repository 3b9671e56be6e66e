"""Routing: which experts a token goes to, and with which weights.

Routing is an op of its own so that every rule works with every expert kernel.

| family | arguments of `route` |
|---|---|
| Qwen3-MoE, Qwen3-Next | `"softmax"`, `renormalize=norm_topk_prob` |
| Mixtral | `"softmax"`, `renormalize=True`, or `"topk_softmax"`, the same function |
| OLMoE | `"softmax"`, `renormalize=False` |
| gpt-oss | `"topk_softmax"` (the router's bias is part of the logits) |
| DeepSeek-V3, GLM-4.5, Nemotron-H | `"sigmoid"`, `renormalize=True`, `correction_bias`, `num_groups`, `topk_groups`, `scaling_factor` |
| MiniMax-M2, MiniMax-M3 | `"sigmoid"`, `renormalize=True`, `correction_bias`; M3 scales |
| DeepSeek-V4 | `"sqrtsoftplus"`, `renormalize=True`, `correction_bias`, `scaling_factor` |
| Llama-4 | `"sigmoid"`, `top_k=1`, `renormalize=False`; the weight multiplies the expert's input |
"""  # noqa: E501

import math
from typing import get_args

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .._types import Implementation
from ..kernels import xla_routing
from ..kernels.sm90 import routing as sm90
from ..kernels.xla_routing import RoutingMethod as RoutingMethod
from . import _dispatch


def fold_routing(axis_size, batched, logits, bias):
    """Folds a batch axis into the tokens; a batched bias becomes one per token."""
    logits_batched, bias_batched = batched
    if not logits_batched:
        logits = jnp.broadcast_to(logits, (axis_size, *logits.shape))
    num_tokens = logits.shape[1]
    if bias_batched:
        bias = bias[:, None] if bias.ndim == 2 else bias
        bias = jnp.broadcast_to(bias, logits.shape).reshape(-1, bias.shape[-1])
    elif bias is not None and bias.ndim == 2:
        bias = jnp.tile(bias, (axis_size, 1))

    def unfold(out):
        return tuple(x.reshape(axis_size, num_tokens, x.shape[-1]) for x in out)

    return (logits.reshape(-1, logits.shape[-1]), bias), unfold


_ROUTE = _dispatch.Op(
    "route",
    (
        _dispatch.Backend(
            "sm90", sm90.unsupported, sm90.run, "does everything in one launch"
        ),
        _dispatch.xla_backend(xla_routing.route),
    ),
    fold_routing,
    xla_routing.route,
)

OPS = (_ROUTE,)


def route(
    router_logits: Float[Array, "*batch e"],
    method: RoutingMethod,
    top_k: int,
    *,
    renormalize: bool = True,
    correction_bias: Float[Array, " e"] | None = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    scaling_factor: float = 1.0,
    implementation: Implementation | None = None,
) -> tuple[Int[Array, "*batch k"], Float[Array, "*batch k"]]:
    """Chooses `top_k` experts per token and weighs them.

    In order: scores from the logits, in float32; `correction_bias` added, for the
    choice only; all but the best `topk_groups` of `num_groups` equal groups dropped, a
    group counting as much as its two best experts; the `top_k` best experts taken, of
    equal ones the lower index; their scores, without the bias, divided by their sum if
    `renormalize`; multiplied by `scaling_factor`.

    Args:
        router_logits: `[..., num_experts]`.
        method: How a logit becomes a score: "softmax" over all experts, "topk_softmax"
            over the chosen ones (so `renormalize` has no effect), "sigmoid", or
            "sqrtsoftplus", the square root of softplus.
        top_k: Experts per token.
        renormalize: Whether the weights of a token sum to `scaling_factor`.
        correction_bias: `[num_experts]`; None for none.
        num_groups: Number of groups that the experts form, in order.
        topk_groups: Number of groups that stay.
        scaling_factor: Multiplies the weights.
        implementation: Which backend runs; None chooses, see `explain`.

    Returns:
        `topk_ids` `[..., top_k]` int32, best first, and `topk_weights` `[..., top_k]`
        float32.

    Raises:
        ValueError: If the method or the implementation is unknown, or counts or shapes
            do not fit together.
        NotImplementedError: If the named implementation cannot run these operands.
    """
    num_experts = router_logits.shape[-1]
    check_routing(
        "route",
        num_experts,
        correction_bias,
        method=method,
        top_k=top_k,
        num_groups=num_groups,
        topk_groups=topk_groups,
    )
    options = {
        "method": method,
        "top_k": top_k,
        "renormalize": renormalize,
        "num_groups": num_groups,
        "topk_groups": topk_groups,
        "scaling_factor": scaling_factor,
    }
    batch = router_logits.shape[:-1]
    logits = router_logits.reshape(math.prod(batch), num_experts)
    topk_ids, topk_weights = _dispatch.call(
        _ROUTE, implementation, options, logits, correction_bias
    )
    return topk_ids.reshape(*batch, top_k), topk_weights.reshape(*batch, top_k)


def check_routing(
    name: str,
    num_experts: int,
    correction_bias: Array | None,
    *,
    method: str,
    top_k: int,
    num_groups: int,
    topk_groups: int,
) -> None:
    """Checks that the arguments of `route` fit together."""
    if method not in get_args(RoutingMethod):
        raise ValueError(
            f"{name}: unknown method {method!r}; expected one of "
            f"{list(get_args(RoutingMethod))}."
        )
    if num_groups < 1 or num_experts % num_groups or not 1 <= topk_groups <= num_groups:
        raise ValueError(
            f"{name}: num_groups must divide the number of experts and topk_groups be "
            f"at most num_groups, got {num_experts=}, {num_groups=}, {topk_groups=}."
        )
    available = num_experts // num_groups * topk_groups
    if not 1 <= top_k <= available:
        raise ValueError(
            f"{name}: top_k must be between 1 and the {available} experts that can be "
            f"chosen, got {top_k=} with {num_experts=}, {num_groups=}, {topk_groups=}."
        )
    if correction_bias is not None and correction_bias.shape != (num_experts,):
        raise ValueError(
            f"{name}: correction_bias must have shape ({num_experts},), one value per "
            f"expert, got {correction_bias.shape}."
        )

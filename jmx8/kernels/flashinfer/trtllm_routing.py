"""Routing inside `trtllm_fp8_block_scale_moe`: which of its methods is which of ours.

The kernel's weights are bfloat16, and with groups its correction bias is too; those of
`ops.routing.route` are float32.
"""

import enum
from typing import NamedTuple

from ..xla_routing import RoutingMethod


class RoutingMethodType(enum.IntEnum):
    """FlashInfer's numbers of the rules that turn logits into experts and weights."""

    DEFAULT = 0  # softmax over all, then top-k
    RENORMALIZE = 1  # top-k, then softmax over the chosen
    DEEPSEEK_V3 = 2  # sigmoid, bias, groups, top-k, divided by their sum, scaled
    LLAMA4 = 3  # top-1, then sigmoid
    RENORMALIZE_NAIVE = 4  # softmax over all, top-k, divided by their sum
    TOPK = 5  # top-k of the logits, which are the weights
    SIGMOID_RENORM = 6  # sigmoid, top-k, divided by their sum
    MINIMAX2 = 7  # sigmoid, bias, top-k, divided by their sum, scaled
    SIGMOID = 8  # sigmoid, top-k
    TOPK_SIGMOID = 9  # top-k, then sigmoid


# Methods that read a bias whether there is one or not.
BIASED = (RoutingMethodType.DEEPSEEK_V3, RoutingMethodType.MINIMAX2)

# Pairs of the most experts and the most experts per token that the kernels of a method
# are compiled for; one pair that covers both is enough.
_SMALL = ((256, 8),)
_TIERS = {
    RoutingMethodType.DEFAULT: _SMALL,
    RoutingMethodType.RENORMALIZE: ((2048, 32),),
    RoutingMethodType.DEEPSEEK_V3: ((512, 22),),
    RoutingMethodType.LLAMA4: ((128, 1),),
    RoutingMethodType.RENORMALIZE_NAIVE: ((2048, 32),),
    RoutingMethodType.TOPK: _SMALL,
    RoutingMethodType.SIGMOID_RENORM: _SMALL,
    RoutingMethodType.MINIMAX2: ((512, 22), (896, 16), (1024, 32)),
    RoutingMethodType.SIGMOID: _SMALL,
    RoutingMethodType.TOPK_SIGMOID: _SMALL,
}
# The method to name when ids are given: the kernels of all are then those of this one.
GIVEN = RoutingMethodType.RENORMALIZE


class Routing(NamedTuple):
    """The arguments of `ops.routing.route`, and whether there is a correction bias."""

    method: RoutingMethod
    top_k: int
    renormalize: bool = True
    num_groups: int = 1
    topk_groups: int = 1
    scaling_factor: float = 1.0
    has_bias: bool = False


def method_type(routing: Routing) -> RoutingMethodType | None:
    """Returns the kernel's method that does what `route` does, None if there is none.

    Some are nobody's: `TOPK` weighs by logits; `LLAMA4` and `TOPK_SIGMOID` weigh like
    `SIGMOID`, but where the sigmoid saturates they choose by logits.
    """
    types = RoutingMethodType
    is_grouped = routing.num_groups > 1
    if routing.method == "sigmoid" and routing.renormalize:
        if is_grouped:
            return types.DEEPSEEK_V3
        if routing.has_bias or routing.scaling_factor != 1:
            return types.MINIMAX2
        return types.SIGMOID_RENORM
    if is_grouped or routing.has_bias or routing.scaling_factor != 1:
        return None
    if routing.method == "sigmoid":
        return types.SIGMOID
    if routing.method == "topk_softmax":
        return types.RENORMALIZE
    if routing.method == "softmax":
        return types.RENORMALIZE_NAIVE if routing.renormalize else types.DEFAULT
    return None


def unsupported(routing: Routing, num_experts: int) -> str | None:
    """Returns why the kernel cannot route so, None if it can."""
    found = method_type(routing)
    if found is None:
        return (
            "trtllm_fp8_block_scale_moe has no routing method for "
            f"method={routing.method!r}, renormalize={routing.renormalize}, "
            f"{'a' if routing.has_bias else 'no'} correction bias, "
            f"num_groups={routing.num_groups}, scaling_factor={routing.scaling_factor}"
        )
    return limits(found, routing, num_experts)


def limits(method: RoutingMethodType, routing: Routing, experts: int) -> str | None:
    """Returns which limit of the kernels of a method is exceeded, None if none is."""
    top_k = routing.top_k
    if experts % 4 or experts <= top_k:
        return (
            "trtllm_fp8_block_scale_moe needs a multiple of 4 experts, and more than "
            f"{top_k=}, got {experts}"
        )
    if not any(experts <= e and top_k <= k for e, k in _TIERS[method]):
        return (
            f"trtllm_fp8_block_scale_moe's method {method.name} is compiled for at "
            f"most {_TIERS[method]} (experts, top_k), got ({experts}, {top_k})"
        )
    if method is RoutingMethodType.DEEPSEEK_V3:
        return _group_limits(routing, experts)
    return None


def _group_limits(routing: Routing, experts: int) -> str | None:
    top_k, groups, kept = routing.top_k, routing.num_groups, routing.topk_groups
    size = experts // groups
    # A group counts as much as its two best experts: with one, all would tie.
    fits = groups <= 8 and 2 <= size <= 32 and kept <= 4 and top_k < kept * size
    if groups > 1 and not fits:
        return (
            "trtllm_fp8_block_scale_moe needs at most 8 groups of 2 to 32 experts, "
            "at most 4 groups kept, and more experts in them than top_k, got "
            f"{experts=}, {groups=}, topk_groups={kept}, {top_k=}"
        )
    if experts <= 384 and top_k > 8:
        return (
            "trtllm_fp8_block_scale_moe's method DEEPSEEK_V3 takes top_k up to 8 of at "
            f"most 384 experts, got {top_k=}"
        )
    return None

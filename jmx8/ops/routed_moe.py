"""A mixture-of-experts layer from router logits to output, in one call."""

import functools
import math
import numbers

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._mx_array import MXArray
from .._types import Implementation
from ..kernels import xla_moe, xla_routing
from ..kernels._prepared import PreparedWeights
from ..kernels.flashinfer import backends as flashinfer
from . import _dispatch
from .moe import (
    Activation,
    check_dtype,
    check_weights,
    flashinfer_backend,
    merge_batch,
    shift_ids,
)
from .routing import check_routing, fold_routing, RoutingMethod


_NAME = "mx_routed_moe_w8a8"


def _fold(
    axis_size, batched, x, w13, w2, logits, bias, first_experts, w13_bias, w2_bias
):
    """Folds a batch axis of the tokens into t, and one of the weights into e."""
    num_tokens = x.shape[-2]
    # Each token has the logits of its own layer, so ids are shifted after routing.
    (logits, bias), _ = fold_routing(axis_size, batched[3:5], logits, bias)
    operands = (x, w13, w2, first_experts, w13_bias, w2_bias)
    is_token = (True, False, False, True, False, False)
    (x, w13, w2, first_experts, *biases), first = merge_batch(
        axis_size, (*batched[:3], *batched[5:]), operands, is_token
    )
    if first is not None:
        first_experts = first if first_experts is None else first + first_experts
    unfold = lambda out: out.reshape(axis_size, num_tokens, out.shape[-1])
    return (x, w13, w2, logits, bias, first_experts, *biases), unfold


def _layer(
    x,
    w13,
    w2,
    logits,
    correction_bias,
    first_experts,
    w13_bias,
    w2_bias,
    *,
    local_expert_offset,
    num_local_experts,
    activation,
    as_kernel,
    **routing,
):
    """Computes the layer through XLA.

    Args:
        x: Tokens `[t, h]`.
        w13: First weights of the local experts.
        w2: Second weights.
        logits: `[t, num_experts]`.
        correction_bias: `[num_experts]` or `[t, num_experts]`, or None.
        first_experts: Where each token's own local experts begin, if there are those of
            several layers, `[t]`; or None.
        w13_bias: Biases, or None.
        w2_bias: The same.
        local_expert_offset: Id of the first local expert.
        num_local_experts: How many there are, of one layer.
        activation: Between the matmuls.
        as_kernel: Whether values are rounded where `trtllm_fp8_block_scale_moe` rounds;
            otherwise as `route` and `mx_moe` do, which is what is differentiated.
        **routing: As for `xla_routing.route`.
    """
    if as_kernel and correction_bias is not None and routing["num_groups"] > 1:
        correction_bias = _round_to_bf16(correction_bias)
    ids, weights = xla_routing.route(logits, correction_bias, **routing)
    ids = shift_ids(ids - local_expert_offset, first_experts, num_local_experts)
    return xla_moe.moe(
        x,
        w13,
        w2,
        ids,
        _round_to_bf16(weights) if as_kernel else weights,
        w13_bias,
        w2_bias,
        activation=activation,
        apply_router_weight_on_input=False,
        quantize_activations=as_kernel,
        numerics="trtllm",
    )


def _round_to_bf16(a: Float[Array, "..."]) -> Float[Array, "..."]:
    # Not two conversions, which XLA may take for none.
    return jax.lax.reduce_precision(a.astype(jnp.float32), 8, 7)


_ROUTED_MOE_W8A8 = _dispatch.Op(
    _NAME,
    (
        flashinfer_backend(
            "routes and multiplies MXFP8 by MXFP8 in one call, with fetched kernels",
            flashinfer.TRTLLM_ROUTED_MOE,
        ),
        _dispatch.xla_backend(functools.partial(_layer, as_kernel=True)),
    ),
    _fold,
    functools.partial(_layer, as_kernel=False),
    token_operands=(0, 3),
)

OPS = (_ROUTED_MOE_W8A8,)


def mx_routed_moe_w8a8(
    x: Float[Array, "*batch h"],
    w13: MXArray | PreparedWeights | Float[Array, "e n h"],
    w2: MXArray | PreparedWeights | Float[Array, "e h i"],
    router_logits: Float[Array, "*batch num_experts"],
    *,
    method: RoutingMethod,
    top_k: int,
    renormalize: bool = True,
    correction_bias: Float[Array, " num_experts"] | None = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    scaling_factor: float = 1.0,
    activation: Activation = "silu",
    w13_bias: Float[Array, "e n"] | PreparedWeights | None = None,
    w2_bias: Float[Array, "e h"] | PreparedWeights | None = None,
    local_expert_offset: int = 0,
    implementation: Implementation | None = None,
) -> Float[Array, "*batch h"]:
    """As `route` and then `mx_moe_w8a8`, in one call: a kernel may route by itself.

    FlashInfer's `trtllm_fp8_block_scale_moe` does ("flashinfer_trtllm"), on weights
    that `jmx8.prepare(..., implementation="flashinfer_trtllm")` laid out in `MXExperts`
    layers. It rounds elsewhere than what `route` and `mx_moe_w8a8` run, so this is an
    op of its own, and through XLA it rounds where that kernel does: the routing
    weights to bfloat16; the correction bias to bfloat16 if there are groups; the
    activation's output is quantized from float32, biases included; an expert's output
    is rounded to the dtype of `x` after its bias; the sum over experts is float32 and
    rounded once. Gradients are those of `route` and `mx_moe`.

    Args:
        x: Tokens `[..., h]`, bfloat16, float16 or float32.
        w13: First weights of the experts that are here, see `mx_moe_w8a8`.
        w2: Second weights, likewise.
        router_logits: `[..., num_experts]`, of all experts.
        method: See `route`, and so are the following.
        top_k: See `route`.
        renormalize: See `route`.
        correction_bias: See `route`.
        num_groups: See `route`.
        topk_groups: See `route`.
        scaling_factor: See `route`.
        activation: Between the two matmuls.
        w13_bias: See `mx_moe_w8a8`.
        w2_bias: See `mx_moe_w8a8`.
        local_expert_offset: Id of the first expert that is here, for expert
            parallelism; what the others would add is left out. The kernel takes it as
            a constant, so it cannot be traced: where devices of a mesh differ in it,
            `jax.lax.switch` over the index of the device does.
        implementation: Which backend runs. None chooses, see `explain`. A named one is
            never replaced by another.

    Returns:
        Array `[..., h]` of the dtype of `x`.

    Raises:
        TypeError: If dtypes are not floats, or `local_expert_offset` is traced.
        ValueError: If shapes or counts do not fit together, or a name is unknown.
        NotImplementedError: If the named implementation cannot run these operands on
            this device; the message says why.
    """
    routing = {
        "method": method,
        "top_k": top_k,
        "num_groups": num_groups,
        "topk_groups": topk_groups,
    }
    check_dtype(_NAME, "x", x, jnp.floating)
    check_weights(_NAME, x, w13, w2, w13_bias, w2_bias, activation)
    num_experts, num_local_experts = router_logits.shape[-1], w2.shape[0]
    _check_logits(x, router_logits, local_expert_offset, num_local_experts)
    check_routing(_NAME, num_experts, correction_bias, **routing)
    num_tokens = math.prod(x.shape[:-1])
    options = {
        **routing,
        "renormalize": renormalize,
        "scaling_factor": float(scaling_factor),
        "activation": activation,
        "local_expert_offset": int(local_expert_offset),
        "num_local_experts": num_local_experts,
    }
    out = _dispatch.call(
        _ROUTED_MOE_W8A8,
        implementation,
        options,
        x.reshape(num_tokens, x.shape[-1]),
        w13,
        w2,
        router_logits.reshape(num_tokens, num_experts),
        correction_bias,
        None,
        w13_bias,
        w2_bias,
    )
    return out.reshape(x.shape)


def _check_logits(x, router_logits, local_expert_offset, num_local_experts):
    check_dtype(_NAME, "router_logits", router_logits, jnp.floating)
    if router_logits.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"{_NAME}: router_logits must be [..., num_experts] for x [..., h], got "
            f"{x.shape=} and {router_logits.shape=}."
        )
    if not isinstance(local_expert_offset, numbers.Integral):
        raise TypeError(
            f"{_NAME}: local_expert_offset must be an int, since kernels take it as a "
            f"constant, got {local_expert_offset!r}. Use jax.lax.switch over calls "
            "with one offset each, or route and mx_moe_w8a8."
        )
    num_experts, last = router_logits.shape[-1], local_expert_offset + num_local_experts
    if local_expert_offset < 0 or last > num_experts:
        raise ValueError(
            f"{_NAME}: router_logits must be of all experts, those that are here "
            f"included, got {router_logits.shape=} with {local_expert_offset=} and "
            f"{num_local_experts} experts in w2."
        )

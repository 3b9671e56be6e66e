"""W8A8 mixture of experts through FlashInfer's `trtllm_fp8_block_scale_moe`, MxFp8.

It fetches its kernels, and can route by itself. Weights come as
`prepare.moe_trtllm` lays them out. The kernel allocates what it needs while it
runs; here that comes out of scratch memory of a size that `arena_bytes` computes.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from ... import _device
from ..._mx_array import BLOCK_SIZE
from .._ffi import Kernel, Output
from ..xla_activation import Activation, is_gated
from . import modules, quantize, trtllm_routing
from .activation import activation_type, swiglu_parameters
from .layouts import round_up
from .trtllm_arena import arena_bytes, Sizes
from .trtllm_routing import BIASED, Routing, RoutingMethodType


_ARGUMENTS = (
    "routing_input_mode",
    "logits",
    "topk_ids",
    "topk_weights",
    "correction_bias",
    "x",
    "x_scales",
    "w13",
    "w13_scales",
    "gemm1_lora_delta",
    "w13_bias",
    "gemm1_alpha",
    "gemm1_beta",
    "gemm1_clamp_limit",
    "w2",
    "w2_scales",
    "w2_bias",
    "out",
    "num_experts",
    "top_k",
    "num_fused_shared_experts",
    "num_groups",
    "topk_groups",
    "intermediate_size",
    "local_expert_offset",
    "local_num_experts",
    "routed_scaling_factor",
    "routing_method_type",
    "use_shuffled_weight",
    "weight_layout",
    "do_finalize",
    "enable_pdl",
    "config_index",
    "quantization_type",
    "activation_type",
    "norm_topk_prob",
    "routing_replay_out",
    "da_routing_metadata",
    "da_body_workspace",
    "is_da_body_preparation",
    "valid_hidden_size",
    "valid_intermediate_size",
)

# What is the same in every call: MXFP8 weights are shuffled, and K is their last axis.
_CONSTANTS = {
    "gemm1_lora_delta": None,
    "num_fused_shared_experts": 0,
    "use_shuffled_weight": True,
    "weight_layout": 0,  # MajorK
    "do_finalize": True,
    "enable_pdl": quantize.ENABLE_PDL,
    "quantization_type": 2,  # MxFp8
    "norm_topk_prob": True,
    "routing_replay_out": None,
    "da_routing_metadata": (),
    "da_body_workspace": (),
    "is_da_body_preparation": False,
    "valid_hidden_size": None,
    "valid_intermediate_size": None,
}

# FlashInfer's `RoutingInputMode`.
_FROM_LOGITS, _PACKED, _UNPACKED = 0, 1, 2

_DEFAULT_TACTIC = (-1, -1)


class Weights(NamedTuple):
    """Prepared weights, and biases or None.

    Attributes:
        w13: Elements `[e, n, hp]`.
        w13_scales: `[e, n, hp / 32]`.
        w2: Elements `[e, hp, ip]`.
        w2_scales: `[e, hp, ip / 32]`.
        w13_bias: Float32 `[e, n]`, in the layout `prepare.bias_trtllm`.
        w2_bias: Float32 `[e, hp]`, the same.
    """

    w13: Array
    w13_scales: UInt8[Array, "e n hs"]
    w2: Array
    w2_scales: UInt8[Array, "e hp is"]
    w13_bias: Float[Array, "e n"] | None = None
    w2_bias: Float[Array, "e hp"] | None = None


@functools.cache
def _kernel(capability: modules.Capability) -> Kernel:
    name = "trtllm_fp8_block_scale_moe"
    return Kernel(
        name=f"flashinfer.{name}",
        load=lambda: modules.load(modules.TRTLLM_MOE, capability)[name],
        arguments=_ARGUMENTS,
    )


def unsupported(
    x: quantize.Abstract,
    w13: quantize.Abstract,
    w2: quantize.Abstract,
    *,
    activation: Activation,
    apply_router_weight_on_input: bool,
) -> str | None:
    """Returns why the kernel cannot run here, None if it can.

    `unsupported_ids` and `unsupported_logits` tell about its two forms.

    Args:
        x: Tokens `[t, h]`.
        w13: Elements of the first prepared weights `[e, n, hp]`.
        w2: Elements of the second prepared weights `[e, hp, ip]`.
        activation: Between the matmuls.
        apply_router_weight_on_input: Whether the weights multiply the input.
    """
    name = "trtllm_fp8_block_scale_moe"
    num_experts, hidden_size, inner_size = w2.shape
    rows = inner_size * (2 if is_gated(activation) else 1)
    if apply_router_weight_on_input:
        return f"{name} applies the router's weights to the output only"
    if x.dtype != jnp.bfloat16:
        return f"{name} returns bfloat16, not {x.dtype}"
    if activation in ("gelu", "gelu_tanh"):
        return f"{name} has no {activation}: its gated activations are those of SiLU"
    if hidden_size % 128 or inner_size % 128:
        return (
            f"{name} needs hidden and intermediate sizes that are multiples of 128, "
            f"got {hidden_size} and {inner_size}"
        )
    if w13.shape != (num_experts, rows, hidden_size):
        return (
            f"{name} needs w13 of shape {(num_experts, rows, hidden_size)} for "
            f"{w2.shape=}, got {w13.shape}"
        )
    problem = modules.unavailable(modules.TRTLLM_MOE, _device.compute_capability())
    return problem or quantize.unsupported(x.dtype, hidden_size)


def unsupported_ids(top_k: int, num_experts: int) -> str | None:
    """Returns why `moe_w8a8` cannot take that many ids, None if it can."""
    routing = Routing("topk_softmax", top_k)
    experts = _num_ids(top_k, num_experts)
    return trtllm_routing.limits(trtllm_routing.GIVEN, routing, experts)


def unsupported_logits(
    logits: quantize.Abstract,
    correction_bias: quantize.Abstract | None,
    *,
    routing: Routing,
    num_local_experts: int,
    local_expert_offset: int = 0,
) -> str | None:
    """Returns why `route_and_moe_w8a8` cannot route so, None if it can."""
    num_experts, last = logits.shape[-1], local_expert_offset + num_local_experts
    operands = (logits,) if correction_bias is None else (logits, correction_bias)
    for a in operands:
        if a.dtype not in (jnp.float32, jnp.bfloat16):
            return (
                "trtllm_fp8_block_scale_moe routes on float32 and bfloat16, not on "
                f"{a.dtype}"
            )
    if local_expert_offset < 0 or last > num_experts:
        return (
            f"experts {local_expert_offset} to {last - 1} are not all of the router's"
        )
    return trtllm_routing.unsupported(routing, num_experts)


def moe_w8a8(
    x: Float[Array, "t h"],
    topk_ids: Int[Array, "t k"],
    topk_weights: Float[Array, "t k"],
    weights: Weights,
    *,
    activation: Activation,
    packed: bool = False,
    tactic: tuple[int, int] = _DEFAULT_TACTIC,
) -> Float[Array, "t h"]:
    """Computes the experts' part of an MoE layer, the routing given.

    Args:
        x: Tokens `[t, h]`, bfloat16.
        topk_ids: Experts of each token, all different; an id outside `[0, e)`
            contributes nothing.
        topk_weights: Their weights.
        weights: Prepared weights.
        activation: Between the matmuls.
        packed: Whether ids and weights go to the kernel in one word, the weights
            rounded to bfloat16.
        tactic: Rows of a tile and number of a configuration; (-1, -1) for FlashInfer's
            default.

    Returns:
        `[t, h]`, bfloat16.
    """
    num_experts, top_k = weights.w2.shape[0], topk_ids.shape[1]
    is_local = (topk_ids >= 0) & (topk_ids < num_experts)
    ids = jnp.where(is_local, topk_ids, -1).astype(jnp.int32)
    topk_weights = topk_weights.astype(jnp.float32)
    if packed:
        bits = jax.lax.bitcast_convert_type(
            topk_weights.astype(jnp.bfloat16), jnp.uint16
        )
        ids = (ids << 16) | bits.astype(jnp.int32)
        topk_weights = jnp.zeros(0, jnp.bfloat16)  # the kernel unpacks its own
    return _call(
        x,
        weights,
        activation,
        tactic,
        gives_weights=not packed,
        routing_input_mode=_PACKED if packed else _UNPACKED,
        logits=None,
        topk_ids=ids,
        topk_weights=topk_weights,
        correction_bias=None,
        num_experts=_num_ids(top_k, num_experts),
        top_k=top_k,
        num_groups=None,
        topk_groups=None,
        local_expert_offset=0,
        routed_scaling_factor=None,
        routing_method_type=int(trtllm_routing.GIVEN),
    )


def route_and_moe_w8a8(
    x: Float[Array, "t h"],
    logits: Float[Array, "t experts"],
    correction_bias: Float[Array, " experts"] | None,
    weights: Weights,
    *,
    routing: Routing,
    method: RoutingMethodType | None = None,
    activation: Activation,
    local_expert_offset: int = 0,
    tactic: tuple[int, int] = _DEFAULT_TACTIC,
) -> Float[Array, "t h"]:
    """Computes a whole MoE layer but the router's matmul.

    Args:
        x: Tokens `[t, h]`, bfloat16.
        logits: Of all experts, float32 or bfloat16.
        correction_bias: Added for the choice of experts, float32 or bfloat16; or None.
        weights: Prepared weights of the experts from `local_expert_offset` on.
        routing: What `unsupported_logits` has no objection to.
        method: The kernel's method; None for the one that `routing` is.
        activation: Between the matmuls.
        local_expert_offset: Id of the first expert that is here.
        tactic: As for `moe_w8a8`.

    Returns:
        `[t, h]`, bfloat16.
    """
    num_experts = logits.shape[1]
    if method is None:
        method = trtllm_routing.method_type(routing)
    assert method is not None
    if correction_bias is None and method in BIASED:
        correction_bias = jnp.zeros(num_experts, jnp.float32)
    is_grouped = routing.num_groups > 1
    return _call(
        x,
        weights,
        activation,
        tactic,
        gives_weights=False,
        routing_input_mode=_FROM_LOGITS,
        logits=logits,
        topk_ids=jnp.zeros(0, jnp.int32),
        topk_weights=jnp.zeros(0, logits.dtype),
        correction_bias=correction_bias,
        num_experts=num_experts,
        top_k=routing.top_k,
        num_groups=routing.num_groups if is_grouped else None,
        topk_groups=routing.topk_groups if is_grouped else None,
        local_expert_offset=local_expert_offset,
        routed_scaling_factor=routing.scaling_factor if method in BIASED else None,
        routing_method_type=int(method),
    )


def _num_ids(top_k: int, num_experts: int) -> int:
    """Returns how many experts to speak of to a kernel that has `num_experts`."""
    return round_up(max(num_experts, top_k + 1), 4)


def _call(x, weights, activation, tactic, *, gives_weights, **routing):
    num_tokens, size = x.shape
    num_experts, hidden_size, inner_size = weights.w2.shape
    if num_tokens == 0:
        return jnp.zeros_like(x)
    x = quantize.pad_last(x, hidden_size)
    elements, scales = quantize.mxfp8_quantize(x, "linear")
    swiglu = swiglu_parameters(activation, num_experts)
    sizes = Sizes(
        num_tokens,
        routing["top_k"],
        routing["num_experts"],
        num_experts,
        hidden_size,
        inner_size,
    )
    as_float32 = lambda bias: None if bias is None else bias.astype(jnp.float32)
    (out,) = _kernel(quantize.capability())(
        arena=arena_bytes(sizes, tactic, gives_weights=gives_weights),
        x=elements,
        x_scales=scales.reshape(num_tokens, hidden_size // BLOCK_SIZE),
        w13=weights.w13,
        w13_scales=weights.w13_scales,
        w13_bias=as_float32(weights.w13_bias),
        gemm1_alpha=swiglu.alpha,
        gemm1_beta=swiglu.beta,
        gemm1_clamp_limit=swiglu.limit,
        w2=weights.w2,
        w2_scales=weights.w2_scales,
        w2_bias=as_float32(weights.w2_bias),
        out=Output((num_tokens, hidden_size), jnp.bfloat16),
        intermediate_size=inner_size,
        local_num_experts=num_experts,
        config_index=tactic,
        activation_type=activation_type(activation),
        **routing,
        **_CONSTANTS,
    )
    return out[:, :size]

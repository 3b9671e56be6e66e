"""W8A8 mixture of experts through FlashInfer's `cutlass_fused_moe`, MXFP8 x MXFP8.

It is compiled from source, with no kernels to fetch. The module makes a runner for one
combination of dtypes; the runner's functions are what is called. Weights come as
`prepare.moe_cutlass` lays them out.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int, Int32

from ... import _device
from .._ffi import Kernel, Output, Workspace
from ..xla_activation import Activation, is_gated
from . import modules, quantize
from .activation import activation_type, swiglu_parameters


_ARGUMENTS = (
    "out",
    "x",
    "topk_ids",
    "topk_weights",
    "w13",
    "w13_bias",
    "w2",
    "w2_bias",
    "quant_scales",
    "x_scales",
    "swiglu_alpha",
    "swiglu_beta",
    "swiglu_limit",
    "clamped_relu2_limit",
    "situ_beta",
    "situ_linear_beta",
    "swizzled_x_scales",
    "tp_size",
    "tp_rank",
    "ep_size",
    "ep_rank",
    "cluster_size",
    "cluster_rank",
    "enable_alltoall",
    "min_latency_mode",
    "profile_ids",
    "enable_pdl",
    "activation_type",
    "workspace",
)

# The kernel takes ids for what is the first of two equal shards of experts. So an id of
# the second stands for every expert that is not here, and contributes nothing.
_SHARDS = {"tp_size": 1, "tp_rank": 0, "ep_size": 2, "ep_rank": 0}

# What is the same in every call.
_CONSTANTS = {
    **_SHARDS,
    "clamped_relu2_limit": None,
    "situ_beta": None,
    "situ_linear_beta": None,
    "swizzled_x_scales": True,
    "cluster_size": 1,
    "cluster_rank": 0,
    "enable_alltoall": False,
    "min_latency_mode": False,
    "enable_pdl": quantize.ENABLE_PDL,
}

_INT32_MAX = (1 << 31) - 1


def _module(capability: modules.Capability | None) -> modules.Module:
    """Returns the module for a device, or the one whose absence there is told."""
    is_sm103 = capability in modules.CUTLASS_MOE_SM103.capabilities
    return modules.CUTLASS_MOE_SM103 if is_sm103 else modules.CUTLASS_MOE_SM100


@functools.cache
def runner(
    capability: modules.Capability, out_dtype: DTypeLike, deterministic: bool = True
) -> Any:
    """Returns the module's runner, a `tvm_ffi.Module`.

    Args:
        capability: Of the device.
        out_dtype: Of the layer's output and biases: bfloat16 or float16.
        deterministic: Whether experts' outputs are summed in one order; otherwise the
            second matmul adds them up with atomics.
    """
    import tvm_ffi  # pyright: ignore[reportMissingImports]

    module: Any = modules.load(_module(capability), capability)
    fp8 = tvm_ffi.dtype("float8_e4m3fn")
    out = tvm_ffi.dtype(jnp.dtype(out_dtype).name)
    return module["init"](
        fp8,
        fp8,
        out,
        False,  # use_deepseek_fp8_block_scale
        False,  # use_w4_group_scaling
        True,  # use_mxfp8_act_scaling
        False,  # use_packed_weights
        not deterministic,  # use_fused_finalize
        False,  # use_wfp4afp8_humming
    )


def tactics(
    capability: modules.Capability, out_dtype: DTypeLike, deterministic: bool = True
) -> tuple[range, range]:
    """Returns the tactics that `moe_w8a8` has for its two matmuls."""
    run = runner(capability, out_dtype, deterministic)
    first = run["get_gemm1_tactic_count"]()
    return range(first), range(first, first + run["get_gemm2_tactic_count"]())


@functools.cache
def _kernel(
    capability: modules.Capability, out_dtype: DTypeLike, deterministic: bool
) -> Kernel:
    return Kernel(
        name="flashinfer.cutlass_fused_moe",
        load=lambda: runner(capability, out_dtype, deterministic)["run_moe"],
        arguments=_ARGUMENTS,
    )


def unsupported(
    x: quantize.Abstract,
    topk_ids: quantize.Abstract,
    w13: quantize.Abstract,
    w2: quantize.Abstract,
    *,
    activation: Activation,
    apply_router_weight_on_input: bool,
) -> str | None:
    """Returns why `moe_w8a8` cannot run here, None if it can.

    Args:
        x: Tokens `[t, h]`.
        topk_ids: Their experts `[t, k]`.
        w13: Elements of the first prepared weights `[e, n, hp]`.
        w2: Elements of the second prepared weights `[e, hp, ip]`.
        activation: Between the matmuls.
        apply_router_weight_on_input: Whether the weights multiply the input.
    """
    num_experts, hidden_size, inner_size = w2.shape
    rows = inner_size * (2 if is_gated(activation) else 1)
    num_tokens, top_k = topk_ids.shape
    if apply_router_weight_on_input:
        return "cutlass_fused_moe applies the router's weights to the output only"
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cutlass_fused_moe returns bfloat16 or float16, not {x.dtype}"
    if hidden_size % 128 or inner_size % 128:
        return (
            "cutlass_fused_moe needs hidden and intermediate sizes that are multiples "
            f"of 128, got {hidden_size} and {inner_size}"
        )
    if w13.shape != (num_experts, rows, hidden_size):
        return (
            f"cutlass_fused_moe needs w13 of shape {(num_experts, rows, hidden_size)} "
            f"for {w2.shape=}, got {w13.shape}"
        )
    if max(num_tokens, top_k) * 2 * num_experts > _INT32_MAX:
        return "tokens times experts exceed what cutlass_fused_moe can count"
    capability = _device.compute_capability()
    problem = modules.unavailable(_module(capability), capability)
    return problem or quantize.unsupported(x.dtype, hidden_size)


def moe_w8a8(
    x: Float[Array, "t h"],
    topk_ids: Int[Array, "t k"],
    topk_weights: Float[Array, "t k"],
    w13: Array,
    w13_scales: Int32[Array, "e n hs"],
    w2: Array,
    w2_scales: Int32[Array, "e hp is"],
    w13_bias: Float[Array, "e n"] | None = None,
    w2_bias: Float[Array, "e hp"] | None = None,
    *,
    activation: Activation,
    deterministic: bool = True,
    tactics: tuple[int, int] = (-1, -1),
) -> Float[Array, "t h"]:
    """Computes the experts' part of an MoE layer.

    Args:
        x: Tokens `[t, h]`, bfloat16 or float16.
        topk_ids: Experts of each token, all different; an id outside `[0, e)`
            contributes nothing.
        topk_weights: Their weights.
        w13: Elements of the prepared weights `[e, n, hp]`, rows of up before gate.
        w13_scales: Their scales.
        w2: Elements of the prepared weights `[e, hp, ip]`.
        w2_scales: Their scales.
        w13_bias: In the layout `prepare.bias_cutlass`, or None.
        w2_bias: The same.
        activation: Between the matmuls.
        deterministic: Whether two runs give the same bits.
        tactics: Of the two matmuls, -1 for FlashInfer's default; those of the second
            count on from those of the first.

    Returns:
        `[t, h]` of the dtype of `x`.
    """
    num_tokens, top_k = topk_ids.shape
    num_experts, hidden_size, inner_size = w2.shape
    if num_tokens == 0:
        return jnp.zeros_like(x)
    size = x.shape[-1]
    x = quantize.pad_last(x, hidden_size)
    elements, scales = quantize.mxfp8_quantize(x, "128x4")
    key = (quantize.capability(), jnp.dtype(x.dtype), deterministic)
    sizes = (num_tokens, hidden_size, inner_size, num_experts, top_k)
    num_bytes = workspace_bytes(runner(*key), sizes, activation)
    w13_bias, w2_bias = _biases(w13, w2, w13_bias, w2_bias, x.dtype)
    is_local = (topk_ids >= 0) & (topk_ids < num_experts)
    ones = jnp.ones(num_experts, jnp.float32)
    swiglu = swiglu_parameters(activation, num_experts)
    (out,) = _kernel(*key)(
        out=Output((num_tokens, hidden_size), x.dtype),
        x=elements,
        topk_ids=jnp.where(is_local, topk_ids, num_experts).astype(jnp.int32),
        topk_weights=topk_weights.astype(jnp.float32),
        w13=w13,
        w13_bias=w13_bias,
        w2=w2,
        w2_bias=w2_bias,
        quant_scales=(w13_scales, ones, w2_scales, ones),
        x_scales=scales,
        swiglu_alpha=swiglu.alpha,
        swiglu_beta=swiglu.beta,
        swiglu_limit=swiglu.limit,
        profile_ids=tactics,
        activation_type=activation_type(activation),
        workspace=Workspace(num_bytes),
        **_CONSTANTS,
    )
    return out[:, :size]


def workspace_bytes(
    runner: Any, sizes: tuple[int, int, int, int, int], activation: Activation
) -> int:
    """Returns how much scratch memory a call needs.

    Args:
        runner: Of the device and the dtypes.
        sizes: Tokens, hidden size, intermediate size, experts here, experts per token.
        activation: Between the matmuls.
    """
    num_tokens, hidden_size, inner_size, num_experts, top_k = sizes
    return runner["get_workspace_size"](
        num_tokens,
        hidden_size,
        inner_size,
        num_experts * _SHARDS["ep_size"],
        top_k,
        *_SHARDS.values(),
        False,  # min_latency_mode
        activation_type(activation),
    )


def _biases(w13, w2, w13_bias, w2_bias, dtype):
    """Returns both biases or neither: the kernel takes no single one."""
    if w13_bias is None and w2_bias is None:
        return None, None
    return tuple(
        jnp.zeros(w.shape[:2], dtype) if bias is None else bias.astype(dtype)
        for w, bias in ((w13, w13_bias), (w2, w2_bias))
    )

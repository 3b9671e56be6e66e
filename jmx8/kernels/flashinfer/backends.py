"""FlashInfer's Blackwell kernels as backends of the W8A8 ops.

Each backend has three functions of the op's operands: one lays out the weights, one
tells why the backend cannot run, and one runs it. Canonical weights are judged by what
they would be once laid out, so that a reason speaks of the device and the shapes first.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from ..._mx_array import MXArray
from .._prepared import Layout, prepare_weights, PreparedWeights
from . import cutlass_moe, dense, prepare, quantize, trtllm_moe
from ._version import TESTED
from .trtllm_routing import Routing


# Whose tactics these are.
VERSION = f"flashinfer {TESTED}"


def prepare_matmul(x: quantize.Abstract, w: MXArray) -> tuple[Any, ...]:
    """Returns the operands of `matmul_w8a8`."""
    return x, prepare_weights(w, prepare.dense_cutlass())


def matmul_unsupported(
    x: quantize.Abstract, w: MXArray | PreparedWeights, *, out_dtype: DTypeLike
) -> str | None:
    """Returns why `matmul_w8a8` cannot run `x` `[*g, m, k]` here, None if it can."""
    if problem := _laid_out_otherwise(w, prepare.dense_cutlass()):
        return problem
    _, laid_out = _laid_out(prepare_matmul, x, w)
    problem = dense.unsupported(x, laid_out.arrays[0], out_dtype=out_dtype)
    return problem or _not_laid_out(w)


def matmul_tactics(*operands: Any, **options: Any) -> tuple[Sequence[int], ...]:
    """Returns what `matmul_w8a8` takes as its tactic's part, the default first."""
    del operands, options
    return ((-1, *range(dense.num_tactics(quantize.capability()))),)


def matmul_w8a8(
    x: Float[Array, "*g m k"],
    w: PreparedWeights,
    *,
    out_dtype: DTypeLike,
    tactic: tuple[int] = (-1,),
) -> Float[Array, "*g m n"]:
    """Computes `q(x) @ w.T` through `mxfp8_gemm`."""
    return dense.matmul_w8a8(
        x, *w.arrays, n=w.shape[-2], out_dtype=out_dtype, tactic=tactic[0]
    )


@dataclasses.dataclass(frozen=True)
class MoEBackend:
    """One of FlashInfer's MoE kernels, called with the operands of an op.

    These are `(x, w13, w2, *routing, w13_bias, w2_bias)`, with the ids and weights of
    `mx_moe_w8a8` or what `mx_routed_moe_w8a8` makes them of.

    Attributes:
        implementation: The backend's name.
        weight_layout: Of w13 and w2, from whether w13 has a gate.
        bias_layout: Of their biases, likewise.
        kernel_unsupported: Returns why the kernel cannot run
            `(x, *routing, w13, w2)`, the weights as laid out elements; takes the op's
            options.
        kernel: Computes the layer from `(x, *routing, *arrays)`, those of w13, w2 and
            the biases; takes the op's options.
        tactics: What the kernel's keyword `tactic` can be, from the op's operands and
            options; None if it takes none.
    """

    implementation: str
    weight_layout: Callable[[bool], Layout]
    bias_layout: Callable[[bool], Layout]
    kernel_unsupported: Callable[..., str | None]
    kernel: Callable[..., Array]
    tactics: Callable[..., tuple[Sequence[int], ...]] | None = None

    def prepare(self, x: Any, w13: Any, w2: Any, *others: Any) -> tuple[Any, ...]:
        """Returns the operands of `run`."""
        *routing, w13_bias, w2_bias = others
        gated = w13.shape[-2] == 2 * w2.shape[-1]
        lay_out = lambda a, layout: None if a is None else prepare_weights(a, layout)
        return (
            x,
            lay_out(w13, self.weight_layout(gated)),
            lay_out(w2, self.weight_layout(False)),
            *routing,
            lay_out(w13_bias, self.bias_layout(gated)),
            lay_out(w2_bias, self.bias_layout(False)),
        )

    def unsupported(self, *operands: Any, **options: Any) -> str | None:
        """Returns why `run` cannot run these operands here, None if it can."""
        _, w13, w2, *_ = operands
        for w in (w13, w2):
            if isinstance(w, jax.Array | jax.ShapeDtypeStruct):
                return "the weights are not MXFP8"
        gated = w13.shape[-2] == 2 * w2.shape[-1]
        if problem := _laid_out_otherwise(w13, self.weight_layout(gated)):
            return problem
        x, laid_out13, laid_out2, *routing, _, _ = _laid_out(self.prepare, *operands)
        elements = (laid_out13.arrays[0], laid_out2.arrays[0])
        problem = self.kernel_unsupported(x, *routing, *elements, **options)
        if problem is None and (problem := _not_laid_out(w13)):
            return f"{problem}, for implementation={self.implementation!r}"
        return problem

    def run(
        self,
        x: Float[Array, "t h"],
        w13: PreparedWeights,
        w2: PreparedWeights,
        *others: Any,
        **options: Any,
    ) -> Float[Array, "t h"]:
        """Computes the layer."""
        *routing, w13_bias, w2_bias = others
        biases = (bias and bias.arrays[0] for bias in (w13_bias, w2_bias))
        return self.kernel(x, *routing, *w13.arrays, *w2.arrays, *biases, **options)


def _cutlass_unsupported(x, topk_ids, topk_weights, w13, w2, **options):
    del topk_weights
    return cutlass_moe.unsupported(x, topk_ids, w13, w2, **options)


def _cutlass_moe(*operands, activation, apply_router_weight_on_input, tactic=(-1, -1)):
    assert not apply_router_weight_on_input
    return cutlass_moe.moe_w8a8(*operands, activation=activation, tactics=tactic)


def _cutlass_tactics(x, *operands, **options):
    del operands, options
    first, second = cutlass_moe.tactics(quantize.capability(), jnp.dtype(x.dtype))
    return (-1, *first), (-1, *second)


def _trtllm_unsupported(x, topk_ids, topk_weights, w13, w2, **options):
    del topk_weights
    problem = trtllm_moe.unsupported(x, w13, w2, **options)
    return problem or trtllm_moe.unsupported_ids(topk_ids.shape[1], w2.shape[0])


def _trtllm_moe(
    x, topk_ids, topk_weights, *arrays, activation, apply_router_weight_on_input
):
    assert not apply_router_weight_on_input
    weights = trtllm_moe.Weights(*arrays)
    return trtllm_moe.moe_w8a8(
        x, topk_ids, topk_weights, weights, activation=activation
    )


def _trtllm_routed_unsupported(
    x,
    logits,
    correction_bias,
    first_experts,
    w13,
    w2,
    *,
    activation,
    local_expert_offset,
    num_local_experts,
    **routing,
):
    name = "trtllm_fp8_block_scale_moe"
    if first_experts is not None:
        return f"{name} takes one set of experts for all tokens"
    if correction_bias is not None and correction_bias.ndim > 1:
        return f"{name} takes one correction bias for all tokens"
    problem = trtllm_moe.unsupported(
        x, w13, w2, activation=activation, apply_router_weight_on_input=False
    )
    return problem or trtllm_moe.unsupported_logits(
        logits,
        correction_bias,
        routing=Routing(has_bias=correction_bias is not None, **routing),
        num_local_experts=num_local_experts,
        local_expert_offset=local_expert_offset,
    )


def _trtllm_routed_moe(
    x,
    logits,
    correction_bias,
    first_experts,
    *arrays,
    activation,
    local_expert_offset,
    num_local_experts,
    **routing,
):
    del first_experts, num_local_experts  # None; as many as there are weights of
    return trtllm_moe.route_and_moe_w8a8(
        x,
        logits,
        correction_bias,
        trtllm_moe.Weights(*arrays),
        routing=Routing(has_bias=correction_bias is not None, **routing),
        activation=activation,
        local_expert_offset=local_expert_offset,
    )


CUTLASS_MOE = MoEBackend(
    "flashinfer_cutlass",
    prepare.moe_cutlass,
    prepare.bias_cutlass,
    _cutlass_unsupported,
    _cutlass_moe,
    _cutlass_tactics,
)
TRTLLM_MOE = MoEBackend(
    "flashinfer_trtllm",
    prepare.moe_trtllm,
    prepare.bias_trtllm,
    _trtllm_unsupported,
    _trtllm_moe,
)
TRTLLM_ROUTED_MOE = dataclasses.replace(
    TRTLLM_MOE,
    kernel_unsupported=_trtllm_routed_unsupported,
    kernel=_trtllm_routed_moe,
)


def _laid_out(lay_out: Callable[..., tuple[Any, ...]], *operands: Any) -> tuple:
    """Returns the operands with their weights laid out, abstractly if they are not."""
    if any(isinstance(operand, MXArray) for operand in operands):
        return jax.eval_shape(lay_out, *operands)
    return operands


def _laid_out_otherwise(w: Any, layout: Layout) -> str | None:
    if isinstance(w, PreparedWeights) and w.layout != layout:
        return f"the weights are laid out for {w.layout.name}"
    return None


def _not_laid_out(w: Any) -> str | None:
    if isinstance(w, PreparedWeights):
        return None
    return "`jmx8.prepare` must lay out the weights for it, once after loading"

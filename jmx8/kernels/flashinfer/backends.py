"""FlashInfer's Blackwell kernels as backends of the W8A8 ops.

Each backend has three functions of the op's operands: one lays out the weights, one
tells why the backend cannot run, and one runs it. Canonical weights are judged by what
they would be once laid out, so that a reason speaks of the device and the shapes first.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, DTypeLike, Float, Int

from ..._mx_array import MXArray
from .._prepared import Layout, prepare_weights, PreparedWeights
from ..xla_activation import Activation
from . import cutlass_moe, dense, prepare, quantize, trtllm_moe


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


def matmul_w8a8(
    x: Float[Array, "*g m k"], w: PreparedWeights, *, out_dtype: DTypeLike
) -> Float[Array, "*g m n"]:
    """Computes `q(x) @ w.T` through `mxfp8_gemm`."""
    return dense.matmul_w8a8(x, *w.arrays, n=w.shape[-2], out_dtype=out_dtype)


@dataclasses.dataclass(frozen=True)
class MoEBackend:
    """One of FlashInfer's MoE kernels, called with the operands of `mx_moe_w8a8`.

    Attributes:
        weight_layout: Of w13 and w2, from whether w13 has a gate.
        bias_layout: Of their biases, likewise.
        kernel_unsupported: `unsupported` of the kernel's module.
        kernel: Computes the layer from laid out arrays.
    """

    weight_layout: Callable[[bool], Layout]
    bias_layout: Callable[[bool], Layout]
    kernel_unsupported: Callable[..., str | None]
    kernel: Callable[..., Array]

    def prepare(self, x, w13, w2, ids, weights, w13_bias, w2_bias):
        """Returns the operands of `run`."""
        gated = w13.shape[-2] == 2 * w2.shape[-1]
        lay_out = lambda a, layout: None if a is None else prepare_weights(a, layout)
        return (
            x,
            lay_out(w13, self.weight_layout(gated)),
            lay_out(w2, self.weight_layout(False)),
            ids,
            weights,
            lay_out(w13_bias, self.bias_layout(gated)),
            lay_out(w2_bias, self.bias_layout(False)),
        )

    def unsupported(
        self, *operands: Any, activation: Activation, apply_router_weight_on_input: bool
    ) -> str | None:
        """Returns why `run` cannot run these operands here, None if it can."""
        _, w13, w2, *_ = operands
        for w in (w13, w2):
            if isinstance(w, jax.Array | jax.ShapeDtypeStruct):
                return "the weights are not MXFP8"
        gated = w13.shape[-2] == 2 * w2.shape[-1]
        if problem := _laid_out_otherwise(w13, self.weight_layout(gated)):
            return problem
        x, laid_out13, laid_out2, ids, *_ = _laid_out(self.prepare, *operands)
        problem = self.kernel_unsupported(
            x,
            ids,
            laid_out13.arrays[0],
            laid_out2.arrays[0],
            activation=activation,
            apply_router_weight_on_input=apply_router_weight_on_input,
        )
        return problem or _not_laid_out(w13)

    def run(
        self,
        x: Float[Array, "t h"],
        w13: PreparedWeights,
        w2: PreparedWeights,
        topk_ids: Int[Array, "t k"],
        topk_weights: Float[Array, "t k"],
        w13_bias: PreparedWeights | None,
        w2_bias: PreparedWeights | None,
        *,
        activation: Activation,
        apply_router_weight_on_input: bool,
    ) -> Float[Array, "t h"]:
        """Computes the experts' part of an MoE layer."""
        del apply_router_weight_on_input
        biases = (bias and bias.arrays[0] for bias in (w13_bias, w2_bias))
        arrays = (*w13.arrays, *w2.arrays, *biases)
        return self.kernel(x, topk_ids, topk_weights, *arrays, activation=activation)


def _trtllm_unsupported(x, topk_ids, w13, w2, **options):
    problem = trtllm_moe.unsupported(x, w13, w2, **options)
    return problem or trtllm_moe.unsupported_ids(topk_ids.shape[1], w2.shape[0])


def _trtllm_moe(x, topk_ids, topk_weights, *arrays, activation):
    weights = trtllm_moe.Weights(*arrays)
    return trtllm_moe.moe_w8a8(
        x, topk_ids, topk_weights, weights, activation=activation
    )


CUTLASS_MOE = MoEBackend(
    prepare.moe_cutlass,
    prepare.bias_cutlass,
    cutlass_moe.unsupported,
    cutlass_moe.moe_w8a8,
)
TRTLLM_MOE = MoEBackend(
    prepare.moe_trtllm, prepare.bias_trtllm, _trtllm_unsupported, _trtllm_moe
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

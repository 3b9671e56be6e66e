"""The experts' part of a mixture-of-experts layer, from routing result to output."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

from .._mx_array import MXArray
from .._types import Implementation
from ..kernels import xla_moe
from ..kernels._prepared import PreparedWeights
from ..kernels.cutile import moe as cutile
from ..kernels.flashinfer import backends as flashinfer
from ..kernels.sm90 import moe as sm90
from ..kernels.xla_activation import (
    Activation as Activation,
    apply_activation as apply_activation,
    is_gated,
    SwiGLUOAI as SwiGLUOAI,
)
from . import _dispatch


def _fold(axis_size, batched, x, w13, w2, ids, weights, w13_bias, w2_bias):
    """Folds a batch axis of the tokens into t, and one of the weights into e."""
    num_tokens, num_experts = x.shape[-2], w13.shape[-3]
    operands = (x, w13, w2, ids, weights, w13_bias, w2_bias)
    is_token = (True, False, False, True, True, False, False)
    (x, w13, w2, ids, *others), first_experts = merge_batch(
        axis_size, batched, operands, is_token
    )
    ids = shift_ids(ids, first_experts, num_experts)
    unfold = lambda out: out.reshape(axis_size, num_tokens, out.shape[-1])
    return (x, w13, w2, ids, *others), unfold


def merge_batch(
    axis_size: int,
    batched: Sequence[bool],
    operands: Sequence[Any],
    is_token: Sequence[bool],
) -> tuple[list[Any], Int[Array, " t"] | None]:
    """Merges a batch axis of the tokens into t, and one of the weights into e.

    Args:
        axis_size: Size of the batch axis.
        batched: Which operands have it, in front.
        operands: The tokens `[t, h]`, w13, and others.
        is_token: Which operands have the axis t, and not e, after it.

    Returns:
        The operands; and, if any weights have a batch axis, where each token's own
        experts begin.
    """
    grouped = any(b and not t for b, t in zip(batched, is_token, strict=True))
    merged = [
        jax.tree.map(functools.partial(_merge_leading, axis_size, b), operand)
        if t or grouped
        else operand
        for operand, b, t in zip(operands, batched, is_token, strict=True)
    ]
    if not grouped:
        return merged, None
    num_tokens, num_experts = operands[0].shape[-2], operands[1].shape[-3]
    first_experts = jnp.arange(axis_size, dtype=jnp.int32) * num_experts
    return merged, jnp.repeat(first_experts, num_tokens)


def shift_ids(
    ids: Int[Array, "t k"], first_experts: Int[Array, " t"] | None, num_experts: int
) -> Int[Array, "t k"]:
    """Counts ids in `[0, num_experts)` from the first of the token's own experts."""
    if first_experts is None:
        return ids
    is_local = (ids >= 0) & (ids < num_experts)
    return jnp.where(is_local, ids + first_experts[:, None].astype(ids.dtype), -1)


def _merge_leading(axis_size, batched, a):
    a = a if batched else jnp.broadcast_to(a, (axis_size, *a.shape))
    return a.reshape(axis_size * a.shape[1], *a.shape[2:])


def flashinfer_backend(reason: str, kernel: flashinfer.MoEBackend) -> _dispatch.Backend:
    """Returns the backend that one of FlashInfer's kernels is."""
    return _dispatch.Backend(
        kernel.implementation,
        kernel.unsupported,
        kernel.run,
        reason,
        kernel.prepare,
        kernel.tactics,
        flashinfer.VERSION,
    )


_XLA = functools.partial(xla_moe.moe, quantize_activations=False)
_XLA_W8A8 = functools.partial(xla_moe.moe, quantize_activations=True)
_TOKEN_OPERANDS = (0, 3, 4)  # x, ids, weights

_MOE = _dispatch.Op(
    "mx_moe",
    (
        _dispatch.Backend(
            "sm90",
            sm90.unsupported,
            sm90.run,
            "widens the weights in registers",
            tactics=sm90.tactics,
            version=sm90.VERSION,
        ),
        _dispatch.Backend(
            "flashinfer_cutile",
            cutile.unsupported,
            cutile.run,
            "widens the weights in registers",
        ),
        _dispatch.xla_backend(_XLA),
    ),
    _fold,
    _XLA,
    _TOKEN_OPERANDS,
)
_MOE_W8A8 = _dispatch.Op(
    "mx_moe_w8a8",
    (
        flashinfer_backend(
            "multiplies MXFP8 by MXFP8 in the tensor cores",
            flashinfer.CUTLASS_MOE,
        ),
        flashinfer_backend(
            "multiplies MXFP8 by MXFP8 in the tensor cores, with fetched kernels",
            flashinfer.TRTLLM_MOE,
        ),
        _dispatch.xla_backend(_XLA_W8A8),
    ),
    _fold,
    _XLA,  # The gradient is that of the unquantized activations.
    _TOKEN_OPERANDS,
)

OPS = (_MOE, _MOE_W8A8)
W8A8_BACKENDS = tuple(backend.name for backend in _MOE_W8A8.backends)


def mx_moe(
    x: Float[Array, "*batch h"],
    w13: MXArray | Float[Array, "e n h"],
    w2: MXArray | Float[Array, "e h i"],
    topk_ids: Int[Array, "*batch top_k"],
    topk_weights: Float[Array, "*batch top_k"],
    *,
    activation: Activation = "silu",
    w13_bias: Float[Array, "e n"] | None = None,
    w2_bias: Float[Array, "e h"] | None = None,
    apply_router_weight_on_input: bool = False,
    local_expert_offset: int = 0,
    implementation: Implementation | None = None,
) -> Float[Array, "*batch h"]:
    """Applies each token's experts and sums their outputs by weight (W8A16).

    For token t: the sum over its experts e of
    `topk_weights * (w2[e] @ activation(w13[e] @ x + w13_bias[e]) + w2_bias[e])`.
    Computes only what the routing asks for. Two runs give the same bits.
    Differentiable with respect to `x`, `topk_weights`, the biases, and weights that are
    ordinary arrays.

    Args:
        x: Tokens `[..., h]`, bfloat16, float16 or float32.
        w13: First weights `[e, 2i, h]`, the rows of gate before those of up;
            `[e, i, h]` for an activation without a gate. An `MXArray`, or an ordinary
            array for the same layer before conversion.
        w2: Second weights `[e, h, i]`, likewise.
        topk_ids: Experts of each token, `[..., top_k]`; see `route`.
        topk_weights: Their weights, `[..., top_k]`.
        activation: Between the two matmuls.
        w13_bias: `[e, 2i]` (`[e, i]`), or None.
        w2_bias: `[e, h]`, or None.
        apply_router_weight_on_input: Whether the weight multiplies the expert's input
            instead of its output (Llama-4).
        local_expert_offset: Id of the first expert that is here, for expert
            parallelism. Ids outside `[offset, offset + e)` contribute nothing.
        implementation: Which backend runs. None chooses, see `explain`. A named one is
            never replaced by another.

    Returns:
        Array `[..., h]` of the dtype of `x`.

    Raises:
        TypeError: If dtypes are not floats, or ids not integers.
        ValueError: If shapes disagree, or a name is unknown.
        NotImplementedError: If the named implementation cannot run these operands on
            this device; the message says why.
    """
    return _moe(
        _MOE,
        x,
        w13,
        w2,
        topk_ids,
        topk_weights,
        w13_bias,
        w2_bias,
        activation=activation,
        apply_router_weight_on_input=apply_router_weight_on_input,
        local_expert_offset=local_expert_offset,
        implementation=implementation,
    )


def mx_moe_w8a8(
    x: Float[Array, "*batch h"],
    w13: MXArray | PreparedWeights | Float[Array, "e n h"],
    w2: MXArray | PreparedWeights | Float[Array, "e h i"],
    topk_ids: Int[Array, "*batch top_k"],
    topk_weights: Float[Array, "*batch top_k"],
    *,
    activation: Activation = "silu",
    w13_bias: Float[Array, "e n"] | PreparedWeights | None = None,
    w2_bias: Float[Array, "e h"] | PreparedWeights | None = None,
    apply_router_weight_on_input: bool = False,
    local_expert_offset: int = 0,
    implementation: Implementation | None = None,
) -> Float[Array, "*batch h"]:
    """As `mx_moe`, with the inputs of both matmuls quantized to MXFP8 (W8A8).

    The tokens are quantized along h before the first matmul, and the activation's
    output along i before the second. Through XLA it rounds where FlashInfer's
    `cutlass_fused_moe` does: the matmuls' outputs, the biases and the activation's
    output to the dtype of `x`; the sum over experts is float32 and rounded once.
    Weights and biases may also be what `jmx8.prepare` made of them. Gradients are those
    of `mx_moe`.
    """
    return _moe(
        _MOE_W8A8,
        x,
        w13,
        w2,
        topk_ids,
        topk_weights,
        w13_bias,
        w2_bias,
        activation=activation,
        apply_router_weight_on_input=apply_router_weight_on_input,
        local_expert_offset=local_expert_offset,
        implementation=implementation,
    )


def prepare_moe(
    w13: Any,
    w2: Any,
    w13_bias: Any,
    w2_bias: Any,
    *,
    activation: Activation,
    apply_router_weight_on_input: bool,
    dtype: DTypeLike,
    implementation: Implementation | None = None,
) -> tuple[Any, ...]:
    """Returns the weights and biases as the backend of `mx_moe_w8a8` wants them.

    Args:
        w13: As for `mx_moe_w8a8`; weights that are laid out already, and their biases,
            are returned as they are if no implementation is named.
        w2: The same.
        w13_bias: The same, or None.
        w2_bias: The same, or None.
        activation: Between the two matmuls.
        apply_router_weight_on_input: See `mx_moe`.
        dtype: Dtype of the tokens.
        implementation: The backend to lay them out for; None for the first that can
            run.
    """
    if implementation is None and isinstance(w13, PreparedWeights):
        return w13, w2, w13_bias, w2_bias
    operands = (
        jax.ShapeDtypeStruct((1, w2.shape[1]), dtype),
        w13,
        w2,
        jax.ShapeDtypeStruct((1, 1), jnp.int32),
        jax.ShapeDtypeStruct((1, 1), jnp.float32),
        w13_bias,
        w2_bias,
    )
    options = {
        "activation": activation,
        "apply_router_weight_on_input": apply_router_weight_on_input,
    }
    _, w13, w2, _, _, *biases = _dispatch.prepare(
        _MOE_W8A8, implementation, options, *operands
    )
    return w13, w2, *biases


def _moe(
    op,
    x,
    w13,
    w2,
    topk_ids,
    topk_weights,
    w13_bias,
    w2_bias,
    *,
    activation,
    apply_router_weight_on_input,
    local_expert_offset,
    implementation,
):
    check_dtype(op.name, "x", x, jnp.floating)
    check_dtype(op.name, "topk_ids", topk_ids, jnp.integer)
    check_dtype(op.name, "topk_weights", topk_weights, jnp.floating)
    check_weights(op.name, x, w13, w2, w13_bias, w2_bias, activation)
    if topk_ids.shape != topk_weights.shape or topk_ids.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"{op.name}: topk_ids and topk_weights must be [..., top_k] for x "
            f"[..., h], got {x.shape=}, {topk_ids.shape=} and {topk_weights.shape=}."
        )
    batch, top_k = topk_ids.shape[:-1], topk_ids.shape[-1]
    num_tokens = math.prod(batch)
    # Backends see ids relative to the first local expert.
    ids = topk_ids.reshape(num_tokens, top_k) - local_expert_offset
    options = {
        "activation": activation,
        "apply_router_weight_on_input": apply_router_weight_on_input,
    }
    out = _dispatch.call(
        op,
        implementation,
        options,
        x.reshape(num_tokens, x.shape[-1]),
        w13,
        w2,
        ids,
        topk_weights.reshape(num_tokens, top_k),
        w13_bias,
        w2_bias,
    )
    return out.reshape(x.shape)


def check_dtype(name: str, label: str, a: Array, kind: Any) -> None:
    if not jnp.issubdtype(a.dtype, kind):
        raise TypeError(
            f"{name}: {label} must have a {kind.__name__} dtype, got {a.dtype}."
        )


def check_weights(
    name: str,
    x: Array,
    w13: Any,
    w2: Any,
    w13_bias: Any,
    w2_bias: Any,
    activation: Activation,
) -> None:
    """Checks that tokens, weights and biases are those of one layer."""
    gated = is_gated(activation)
    if w13.ndim != 3 or w2.ndim != 3:
        raise ValueError(
            f"{name}: w13 and w2 must have 3 axes, got {w13.shape=} and {w2.shape=}."
        )
    num_experts, hidden_size, intermediate_size = w2.shape
    rows = intermediate_size * (2 if gated else 1)
    if w13.shape != (num_experts, rows, hidden_size) or x.shape[-1] != hidden_size:
        raise ValueError(
            f"{name}: with {activation=} and {w2.shape=}, w13 must be "
            f"{(num_experts, rows, hidden_size)} and x [..., {hidden_size}], got "
            f"{w13.shape=} and {x.shape=}."
        )
    if getattr(w13, "transposed", False) or getattr(w2, "transposed", False):
        raise ValueError(f"{name}: w13 and w2 must be quantized along their last axis.")
    for label, bias, w in (("w13_bias", w13_bias, w13), ("w2_bias", w2_bias, w2)):
        if bias is not None and bias.shape != w.shape[:2]:
            raise ValueError(
                f"{name}: {label} must have shape {w.shape[:2]}, got {bias.shape}."
            )

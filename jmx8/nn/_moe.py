"""Mixture-of-experts layers: router, and experts before and after conversion."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray

from .._device import resolve_activations
from .._mx_array import MXArray
from .._types import Activations
from ..kernels._prepared import PreparedWeights
from ..kernels.xla_matmul import dot_rows
from ..ops.moe import Activation, is_gated, mx_moe, mx_moe_w8a8
from ..ops.quantize import quantize
from ..ops.routing import route, RoutingMethod
from ._parameters import is_mx, value


class Experts(eqx.Module):
    """The experts of an MoE layer, with ordinary weights.

    Attributes:
        w13: `[num_experts, 2 * intermediate_size, hidden_size]`, the rows of gate
            before those of up; without the factor 2 for an activation without a gate.
        w2: `[num_experts, hidden_size, intermediate_size]`.
        w13_bias: `[num_experts, 2 * intermediate_size]`, or None.
        w2_bias: `[num_experts, hidden_size]`, or None.
        activation: Between the two matmuls.
        apply_router_weight_on_input: Whether the routing weight multiplies the input.
    """

    w13: Array
    w2: Array
    w13_bias: Array | None = None
    w2_bias: Array | None = None
    activation: Activation = eqx.field(static=True, default="silu")
    apply_router_weight_on_input: bool = eqx.field(static=True, default=False)

    @classmethod
    def init(
        cls,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: Activation = "silu",
        use_bias: bool = False,
        apply_router_weight_on_input: bool = False,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ) -> "Experts":
        """Returns experts with weights uniform in ±1/sqrt(fan-in), biases zero."""
        rows = intermediate_size * (2 if is_gated(activation) else 1)
        k13, k2 = jax.random.split(key)
        dtype = jnp.float32 if dtype is None else dtype
        return cls(
            _uniform(k13, (num_experts, rows, hidden_size), dtype),
            _uniform(k2, (num_experts, hidden_size, intermediate_size), dtype),
            jnp.zeros((num_experts, rows), dtype) if use_bias else None,
            jnp.zeros((num_experts, hidden_size), dtype) if use_bias else None,
            activation,
            apply_router_weight_on_input,
        )

    def __call__(
        self,
        x: Float[Array, "*batch h"],
        topk_ids: Int[Array, "*batch k"],
        topk_weights: Float[Array, "*batch k"],
    ) -> Float[Array, "*batch h"]:
        """Applies each token's experts; see `mx_moe`."""
        return apply_experts(self, x, topk_ids, topk_weights)


class MXExperts(eqx.Module):
    """`Experts` with MXFP8 weights, canonical or as `prepare` lays them out.

    Attributes:
        w13: As in `Experts`, an `MXArray` along `hidden_size`.
        w2: As in `Experts`, an `MXArray` along `intermediate_size`.
        w13_bias: As in `Experts`.
        w2_bias: As in `Experts`.
        activation: As in `Experts`.
        apply_router_weight_on_input: As in `Experts`.
        activations: "bf16" multiplies inputs as they are (W8A16), "mxfp8" quantizes
            them first (W8A8), "auto" is "mxfp8" where the hardware multiplies MXFP8.
    """

    w13: MXArray | PreparedWeights
    w2: MXArray | PreparedWeights
    w13_bias: Array | PreparedWeights | None = None
    w2_bias: Array | PreparedWeights | None = None
    activation: Activation = eqx.field(static=True, default="silu")
    apply_router_weight_on_input: bool = eqx.field(static=True, default=False)
    activations: Activations = eqx.field(static=True, default="auto")

    @classmethod
    def from_experts(
        cls, experts: Experts, *, activations: Activations = "auto"
    ) -> "MXExperts":
        """Returns the experts with their weights quantized along K."""
        return cls(
            quantize(experts.w13),
            quantize(experts.w2),
            experts.w13_bias,
            experts.w2_bias,
            experts.activation,
            experts.apply_router_weight_on_input,
            activations,
        )

    def __call__(
        self,
        x: Float[Array, "*batch h"],
        topk_ids: Int[Array, "*batch k"],
        topk_weights: Float[Array, "*batch k"],
    ) -> Float[Array, "*batch h"]:
        """Applies each token's experts; see `mx_moe` and `mx_moe_w8a8`."""
        return apply_experts(self, x, topk_ids, topk_weights)


def apply_experts(
    layer: Any,
    x: Float[Array, "*batch h"],
    topk_ids: Int[Array, "*batch k"],
    topk_weights: Float[Array, "*batch k"],
) -> Float[Array, "*batch h"]:
    """Computes what `Experts` or `MXExperts` do, with the fields of one."""
    w13, w2 = value(layer.w13), value(layer.w2)
    w8a8 = is_mx(w13) and resolve_activations(layer.activations) == "mxfp8"
    return (mx_moe_w8a8 if w8a8 else mx_moe)(
        x,
        w13,
        w2,
        topk_ids,
        topk_weights,
        activation=layer.activation,
        w13_bias=value(layer.w13_bias),
        w2_bias=value(layer.w2_bias),
        apply_router_weight_on_input=layer.apply_router_weight_on_input,
    )


class SparseMoE(eqx.Module):
    """A mixture-of-experts layer: router, experts, and shared experts if it has any.

    Attributes:
        gate: The router, `[num_experts, hidden_size]`; stays in its own dtype. Its
            logits are float32 whatever that and the dtype of the tokens are.
        experts: `Experts`, or `MXExperts` after conversion.
        correction_bias: `[num_experts]`, added to the scores for the choice; or None.
        shared_expert: A module on vectors `[hidden_size]` that every token goes
            through; its output is added. Or None.
        shared_expert_gate: `[1, hidden_size]`; the sigmoid of its output multiplies
            the shared expert's. None adds that as it is.
        top_k: Experts per token.
        method: As in `route`, and so are the following.
        renormalize: See `route`.
        num_groups: See `route`.
        topk_groups: See `route`.
        scaling_factor: See `route`.
    """

    gate: eqx.nn.Linear
    experts: Experts | MXExperts
    correction_bias: Array | None = None
    shared_expert: Callable[[Array], Array] | None = None
    shared_expert_gate: eqx.nn.Linear | None = None
    top_k: int = eqx.field(static=True, kw_only=True)
    method: RoutingMethod = eqx.field(static=True, default="softmax", kw_only=True)
    renormalize: bool = eqx.field(static=True, default=True, kw_only=True)
    num_groups: int = eqx.field(static=True, default=1, kw_only=True)
    topk_groups: int = eqx.field(static=True, default=1, kw_only=True)
    scaling_factor: float = eqx.field(static=True, default=1.0, kw_only=True)

    def __call__(self, x: Float[Array, "*batch h"]) -> Float[Array, "*batch h"]:
        """Routes each token and adds up what its experts return.

        Args:
            x: Tokens `[..., hidden_size]`.

        Returns:
            Array `[..., hidden_size]` of the dtype of `x`.
        """
        return apply_sparse_moe(self, x)


def apply_sparse_moe(
    layer: Any, x: Float[Array, "*batch h"]
) -> Float[Array, "*batch h"]:
    """Computes what a `SparseMoE` does, with the fields of one."""
    tokens = x.reshape(-1, x.shape[-1])
    topk_ids, topk_weights = route(
        _router_logits(layer.gate, tokens),
        layer.method,
        layer.top_k,
        renormalize=layer.renormalize,
        correction_bias=value(layer.correction_bias),
        num_groups=layer.num_groups,
        topk_groups=layer.topk_groups,
        scaling_factor=layer.scaling_factor,
    )
    out = layer.experts(tokens, topk_ids, topk_weights)
    if layer.shared_expert is not None:
        shared = jax.vmap(layer.shared_expert)(tokens)
        if layer.shared_expert_gate is not None:
            shared = shared * jax.nn.sigmoid(jax.vmap(layer.shared_expert_gate)(tokens))
        out = out + shared
    return out.reshape(x.shape)


def _router_logits(gate, tokens):
    """Returns float32 logits: rounding them would change which experts are chosen."""
    weight, bias = value(gate.weight), value(gate.bias)
    if is_mx(weight):  # converted on request
        return jax.vmap(gate)(tokens)
    is_bf16 = tokens.dtype == weight.dtype == jnp.bfloat16
    dtype = jnp.bfloat16 if is_bf16 else jnp.float32
    logits = dot_rows(tokens.astype(dtype), weight.astype(dtype), jnp.float32)
    return logits if bias is None else logits + bias.astype(jnp.float32)[None]


def _uniform(key, shape, dtype):
    bound = shape[-1] ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)

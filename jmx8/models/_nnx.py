"""The layers of `jmx8.nn` as Flax NNX modules.

Each has the fields of its Equinox counterpart, with arrays in `nnx.Param`s, and
computes by the same function: outputs are equal bit for bit, and paths of parameters
are those of checkpoints. A weight may be an ordinary array or in MXFP8, and either may
take the other's place at any time.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
from jaxtyping import Array, Float, Int

from .._mx_array import MXArray
from .._types import Activations
from ..kernels._prepared import PreparedWeights
from ..nn._attention import apply_attention, Attention as EqxAttention
from ..nn._linear import apply_mx_linear, MXLinear
from ..nn._moe import (
    apply_experts,
    apply_sparse_moe,
    Experts as EqxExperts,
    MXExperts,
    SparseMoE as EqxSparseMoE,
)
from ..nn._norm import apply_rms_norm, RMSNorm as EqxRMSNorm
from ..nn._parameters import is_mx, value


try:
    from flax import nnx
except ModuleNotFoundError as error:
    message = "NNX models need Flax, which is not installed: `pip install jmx8[flax]`"
    raise ModuleNotFoundError(message, name=error.name) from error


class Layer(nnx.Module):
    """A module with the fields of an Equinox module, whose arrays it shares.

    Args:
        layer: The Equinox module. Layers in it need counterparts here too.

    Raises:
        TypeError: If one of them has none.
    """

    def __init__(self, layer: eqx.Module):
        for field in dataclasses.fields(layer):  # pyright: ignore[reportArgumentType]
            content = getattr(layer, field.name)
            is_static = field.metadata.get("static", False)
            setattr(self, field.name, content if is_static else _contain(content))


_Layer = TypeVar("_Layer", bound=type[Layer])
_COUNTERPARTS: dict[type, type[Layer]] = {}


def counterpart_of(*types: type) -> Callable[[_Layer], _Layer]:
    """Registers a class as what contains the fields of these Equinox modules."""

    def register(cls: _Layer) -> _Layer:
        _COUNTERPARTS.update(dict.fromkeys(types, cls))
        return cls

    return register


def _contain(content: Any) -> Any:
    """Returns what a field of an NNX module has for that of an Equinox module."""
    if content is None:
        return nnx.data(None)
    if isinstance(content, tuple):
        return nnx.List([_contain(item) for item in content])
    if type(content) in _COUNTERPARTS:
        return _COUNTERPARTS[type(content)](content)
    arrays = (jax.Array, jax.ShapeDtypeStruct, MXArray, PreparedWeights)
    if isinstance(content, arrays):
        return nnx.Param(content)
    known = ", ".join(sorted(t.__name__ for t in _COUNTERPARTS))
    raise TypeError(
        "NNX: there must be a counterpart for each layer, got a "
        f"{type(content).__name__}; there are those of {known}."
    )


@counterpart_of(eqx.nn.Linear, MXLinear)
class Linear(Layer):
    """A linear layer, `x @ weight.T + bias`.

    Attributes:
        weight: `[out_features, in_features]`.
        bias: `[out_features]`, or None.
        activations: As in `jmx8.nn.MXLinear`; counts for a weight in MXFP8.
    """

    weight: nnx.Param
    bias: nnx.Param | None
    activations: Activations

    def __init__(self, layer: eqx.nn.Linear | MXLinear):
        self.weight = _contain(layer.weight)
        self.bias = _contain(layer.bias)
        self.activations = getattr(layer, "activations", "auto")

    def __call__(self, x: Float[Array, "*batch k"]) -> Float[Array, "*batch n"]:
        """Applies the layer along the last axis of `x`, `[..., in_features]`."""
        weight, bias = value(self.weight), value(self.bias)
        if is_mx(weight):
            return apply_mx_linear(self, x)
        apply = lambda row: weight @ row if bias is None else weight @ row + bias
        for _ in x.shape[:-1]:
            apply = jax.vmap(apply)
        return apply(x)


@counterpart_of(eqx.nn.Embedding)
class Embedding(Layer):
    """A table of vectors.

    Attributes:
        weight: `[num_embeddings, embedding_size]`.
    """

    weight: nnx.Param

    def __call__(self, tokens: Int[Array, "*batch"]) -> Float[Array, "*batch h"]:
        """Returns the vector of every token of `tokens`, `[...]`."""
        return value(self.weight)[tokens]


@counterpart_of(EqxRMSNorm)
class RMSNorm(Layer):
    """`jmx8.nn`'s root-mean-square norm.

    Attributes:
        weight: Scale of each channel, `[h]`.
        eps: Added to the mean square.
    """

    weight: nnx.Param
    eps: float

    def __call__(self, x: Float[Array, "*batch h"]) -> Float[Array, "*batch h"]:
        """Normalizes each vector along the last axis of `x`, `[..., h]`."""
        return apply_rms_norm(self, x)


@counterpart_of(EqxAttention)
class Attention(Layer):
    """Grouped-query attention; fields and call are those of Equinox's `Attention`."""

    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    o_proj: Linear
    q_norm: RMSNorm
    k_norm: RMSNorm
    head_dim: int

    def __call__(self, x: Float[Array, "b t h"], positions, rope, kv=None):
        """Attends from each token to itself and those before it in its row."""
        return apply_attention(self, x, positions, rope, kv)


@counterpart_of(EqxExperts, MXExperts)
class Experts(Layer):
    """The experts of an MoE layer; fields are those of `jmx8.nn.MXExperts`."""

    w13: nnx.Param
    w2: nnx.Param
    w13_bias: nnx.Param | None
    w2_bias: nnx.Param | None
    activation: Any
    apply_router_weight_on_input: bool
    activations: Activations = "auto"

    def __call__(
        self,
        x: Float[Array, "*batch h"],
        topk_ids: Int[Array, "*batch k"],
        topk_weights: Float[Array, "*batch k"],
    ) -> Float[Array, "*batch h"]:
        """Applies each token's experts; see `mx_moe` and `mx_moe_w8a8`."""
        return apply_experts(self, x, topk_ids, topk_weights)


@counterpart_of(EqxSparseMoE)
class SparseMoE(Layer):
    """A mixture-of-experts layer; fields are those of `jmx8.nn.SparseMoE`."""

    gate: Linear
    experts: Experts

    def __call__(self, x: Float[Array, "*batch h"]) -> Float[Array, "*batch h"]:
        """Routes each token of `x`, `[..., h]`, and adds up its experts' outputs."""
        return apply_sparse_moe(self, x)

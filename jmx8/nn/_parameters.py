"""The fields of a layer, whatever framework it is written in."""

from typing import Any

import jax

from .._mx_array import MXArray
from ..kernels._prepared import PreparedWeights


def value(field: Any) -> Any:
    """Returns the array in a field of a layer: Equinox has it there, Flax a variable.

    Functions that read fields this way compute the same for the layers of both.
    """
    get_value = getattr(field, "get_value", None)
    return field if get_value is None else get_value()


def is_mx(weight: Any) -> bool:
    """Returns whether a weight is in MXFP8, canonical or laid out."""
    return isinstance(weight, MXArray | PreparedWeights)


def is_mx_linear(node: Any) -> bool:
    """Returns whether a node of a pytree is a linear layer with a weight in MXFP8."""
    return hasattr(node, "activations") and is_mx(value(getattr(node, "weight", None)))


def is_mx_experts(node: Any) -> bool:
    """Returns whether a node of a pytree is experts with weights in MXFP8."""
    return hasattr(node, "activations") and is_mx(value(getattr(node, "w13", None)))


def is_mx_layer(node: Any) -> bool:
    """Returns whether a node of a pytree is either."""
    return is_mx_linear(node) or is_mx_experts(node)


def with_fields(layer: Any, **fields: Any) -> Any:
    """Returns a copy of a layer that has other arrays or options in some fields."""
    new = jax.tree.map(lambda leaf: leaf, layer)
    for name, content in fields.items():
        field = getattr(new, name)
        if hasattr(field, "set_value"):
            field.set_value(content)
        else:
            object.__setattr__(new, name, content)  # Equinox modules are frozen
    return new

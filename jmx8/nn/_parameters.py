"""Reading the fields of a layer, whatever framework it is written in."""

from typing import Any

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

"""Changing what converted layers do with their inputs."""

from typing import TypeVar

import jax

from .._types import Activations
from ..kernels._prepared import to_canonical
from ._parameters import is_mx_layer, with_fields


Module = TypeVar("Module")


def with_activations(module: Module, activations: Activations) -> Module:
    """Returns the module with `activations` set in all its MXFP8 layers.

    The weights are shared with `module`; nothing is converted again. Weights that were
    laid out by `prepare` for other activations become canonical.

    Args:
        module: Any pytree of Equinox or NNX modules.
        activations: "bf16" (W8A16), "mxfp8" (W8A8) or "auto"; see `MXLinear`.

    Returns:
        The same module otherwise.
    """

    def change(node):
        if not is_mx_layer(node) or node.activations == activations:
            return node
        return with_fields(to_canonical(node), activations=activations)

    return jax.tree.map(change, module, is_leaf=is_mx_layer)

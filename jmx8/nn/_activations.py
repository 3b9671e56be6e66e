"""Changing what converted layers do with their inputs."""

import dataclasses
from typing import TypeVar

import jax

from .._types import Activations
from ..kernels._prepared import to_canonical
from ._linear import MXLinear
from ._moe import MXExperts


Module = TypeVar("Module")


def with_activations(module: Module, activations: Activations) -> Module:
    """Returns the module with `activations` set in all its MXFP8 layers.

    The weights are shared with `module`; nothing is converted again. Weights that were
    laid out by `prepare` for other activations become canonical.

    Args:
        module: Any pytree of Equinox modules.
        activations: "bf16" (W8A16), "mxfp8" (W8A8) or "auto"; see `MXLinear`.

    Returns:
        The same module otherwise.
    """

    def change(node):
        if isinstance(node, MXLinear | MXExperts) and node.activations != activations:
            node = to_canonical(node)
        if isinstance(node, MXLinear):
            return MXLinear.from_weight(node.weight, node.bias, activations=activations)
        if isinstance(node, MXExperts):
            return dataclasses.replace(node, activations=activations)
        return node

    is_layer = lambda node: isinstance(node, MXLinear | MXExperts)
    return jax.tree.map(change, module, is_leaf=is_layer)

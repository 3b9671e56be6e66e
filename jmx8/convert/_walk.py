"""The leaves of a pytree, with their paths and the modules that hold them."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import numpy as np

from .._mx_array import MXArray
from .._unpacked import Unpacked


@dataclass(frozen=True)
class Leaf:
    """One leaf of a pytree.

    Attributes:
        path: Keys from the root, joined by slashes.
        value: The leaf. An `MXArray` counts as one.
        owner: The Equinox module that has the leaf as a field, else None.
        field: Name of that field.
        wrapper: The `WeightNorm` or `SpectralNorm` somewhere above, else None.
    """

    path: str
    value: Any
    owner: Any = None
    field: str = ""
    wrapper: Any = None

    @property
    def is_array(self) -> bool:
        return isinstance(
            self.value, (jax.Array, np.ndarray, jax.ShapeDtypeStruct, MXArray)
        )


def walk(tree: Any) -> list[Leaf]:
    """Returns the leaves of `tree`, in the order that `jax.tree` has them."""
    return list(_walk(tree, (), None, None))


def rebuild(tree: Any, values: list[Any]) -> Any:
    """Returns `tree` with other leaves, in the order of `walk`."""
    structure = jax.tree.structure(tree, is_leaf=lambda x: isinstance(x, MXArray))
    return jax.tree.unflatten(structure, values)


def _walk(node: Any, keys: tuple, owner: Any, wrapper: Any) -> Iterator[Leaf]:
    path = jax.tree_util.keystr(keys, simple=True, separator="/")
    field = getattr(keys[-1], "name", "") if keys else ""
    if isinstance(node, MXArray):
        yield Leaf(path, node, owner, field, wrapper)
        return
    # One level only, so that every module on the way is seen.
    children, _ = jax.tree_util.tree_flatten_with_path(
        node, is_leaf=lambda child: child is not node
    )
    if isinstance(node, (eqx.nn.WeightNorm, eqx.nn.SpectralNorm)):
        wrapper = node
    for key, child in children:
        if not key:
            yield Leaf(path, child, owner, field, wrapper)
        else:
            module = node if isinstance(node, eqx.Module) else None
            yield from _walk(child, keys + key, module, wrapper)


def unpack(tree: Any) -> Unpacked:
    """Takes a tree of Flax apart; a plain one stays as it is."""
    # Whoever has variables of Flax, or a model to run them, has imported it.
    if "flax" not in sys.modules:
        return Unpacked(tree, {}, lambda plain, axes: plain)
    from ..flax import unpack

    return unpack(tree)

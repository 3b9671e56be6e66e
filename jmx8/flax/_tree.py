"""Flax trees as plain ones and back, with what layers say about their kernels."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
from flax import nnx
from flax.core import meta

from .._kernel_axes import KernelAxes
from .._unpacked import Known, Unpacked
from ._nnx import layer_axes, layer_shape


def unpack(tree: Any) -> Unpacked:
    """Takes Flax's modules and boxes apart.

    Args:
        tree: An `nnx.Module`, or any pytree with `nnx.Variable`s, `nn.Partitioned` or
            other boxes in it, or none.

    Returns:
        The tree of plain arrays, what is known of them by path, and how to put a tree
        of converted arrays together: with the same boxes, whose sharding names follow
        the axes of the stored elements.
    """
    if not isinstance(tree, nnx.Pytree):
        return _unbox(tree, {})
    graph, state = nnx.split(tree)
    unpacked = _unbox(state, _known(tree))

    def repack(plain: Any, axes: Mapping[str, Any]) -> Any:
        return nnx.merge(graph, unpacked.repack(plain, axes))

    return Unpacked(unpacked.tree, unpacked.known, repack)


def _unbox(tree: Any, known: Known) -> Unpacked:
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_box)
    known = dict(known)
    for path, leaf in leaves:
        if isinstance(leaf, nnx.Variable) and not isinstance(leaf, nnx.Param):
            known[_join(path)] = f"nnx.{type(leaf).__name__}, not a Param"

    def repack(plain: Any, axes: Mapping[str, Any]) -> Any:
        values = structure.flatten_up_to(plain)
        return structure.unflatten(
            _box(leaf, value, axes.get(_join(path)))
            for (path, leaf), value in zip(leaves, values, strict=True)
        )

    plain = structure.unflatten(content(leaf) for _, leaf in leaves)
    return Unpacked(plain, known, repack)


def _is_box(node: Any) -> bool:
    return isinstance(node, (nnx.Variable, meta.AxisMetadata))


def _join(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def content(leaf: Any) -> Any:
    """Returns what is in a box, without constraining its sharding."""
    if isinstance(leaf, nnx.Variable):
        return leaf.get_raw_value()
    if isinstance(leaf, meta.Partitioned):
        return leaf.unbox(apply_constraint=False)
    return leaf.unbox() if isinstance(leaf, meta.AxisMetadata) else leaf


def _box(leaf: Any, value: Any, axes: KernelAxes | int | None) -> Any:
    """Puts a converted value where the original was."""
    ndim = len(getattr(content(leaf), "shape", ()))
    if isinstance(leaf, nnx.Variable):
        names = leaf.get_metadata("out_sharding", None)
        if axes is None or not names:
            return leaf.copy(value)
        return leaf.copy(value, out_sharding=_stored_names(axes, names, ndim))
    if not isinstance(leaf, meta.AxisMetadata):
        return value
    if axes is not None and isinstance(leaf, meta.Partitioned):
        leaf = leaf.replace(names=_stored_names(axes, leaf.names, ndim))
    return leaf.replace_boxed(value)


def _stored_names(
    axes: KernelAxes | int, names: Iterable[Any], ndim: int
) -> tuple[Any, ...]:
    """Returns one name per axis of the elements, of a kernel of `ndim` axes."""
    names = tuple(names)
    names += (None,) * (ndim - len(names))  # Flax does not ask for those at the end
    if isinstance(axes, KernelAxes):
        return axes.stored(names)
    *batch, second_last, last = names
    return (*batch, last, second_last) if axes == -2 else names


def _known(module: Any) -> Known:
    """Returns what the layers of a module say about their kernels, by path."""
    known: dict[str, tuple[KernelAxes, str] | str] = {}
    for path, layer in nnx.iter_modules(module):
        kernel = "/".join(map(str, (*path, "kernel")))
        axes, shape = layer_axes(layer), layer_shape(layer)
        if isinstance(axes, str):
            known[kernel] = axes
        elif axes is not None and shape is not None:
            # Layers in a stack, as `nnx.vmap` makes them, have more axes in front.
            value: Any = getattr(layer, "kernel").get_raw_value()  # noqa: B009
            stacked = len(value.shape) - len(shape)
            axes = axes.normalize(len(shape)).after(max(stacked, 0))
            known[kernel] = axes, f"nnx.{type(layer).__name__}"
    return known

"""NNX layers that take an MXArray as their kernel."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from .._kernel_axes import einsum_axes, KernelAxes
from .._mx_array import MXArray
from ..ops.folded import dot_general, einsum, FoldedKernel
from ._stand_in import promote, refuse_custom, StandIn


def install() -> None:
    """Replaces `__call__` of the layers. Called once, by the import of the package."""
    _replace(nnx.Linear, _linear)
    _replace(nnx.LinearGeneral, _linear_general)
    _replace(nnx.Einsum, _einsum)


def layer_axes(layer: Any) -> KernelAxes | str | None:
    """Returns the axes of a layer's kernel, why it is to be kept, or None."""
    if isinstance(layer, nnx.Linear):
        return KernelAxes((0,))
    if isinstance(layer, nnx.LinearGeneral):
        batch = len(layer.batch_axis)
        inputs = range(batch, batch + len(layer.in_features))
        return KernelAxes(tuple(inputs), tuple(range(batch)))
    if isinstance(layer, nnx.Einsum):
        return einsum_axes(layer.einsum_str) if layer.einsum_str else None
    if isinstance(layer, (nnx.Conv, nnx.ConvTranspose)):
        return f"nnx.{type(layer).__name__}, not a matmul"
    return None


def layer_shape(layer: Any) -> tuple[int, ...] | None:
    """Returns the shape of the kernel that a layer was made for."""
    if isinstance(layer, nnx.Linear):
        return (layer.in_features, layer.out_features)
    if isinstance(layer, nnx.LinearGeneral):
        batch = layer.batch_axis.values()
        return (*batch, *layer.in_features, *layer.out_features)
    return tuple(layer.kernel_shape) if isinstance(layer, nnx.Einsum) else None


def _replace(layer_class: Any, present: Callable[..., StandIn]) -> None:
    original = layer_class.__call__

    @functools.wraps(original)
    def call(self, *args, **kwargs):
        kernel = self.kernel.get_value()
        if not isinstance(kernel, MXArray):
            return original(self, *args, **kwargs)
        return original(present(self, kernel, *args, **kwargs), *args, **kwargs)

    layer_class.__call__ = call


def _present(layer: Any, kernel: MXArray, axes: KernelAxes, **replaced: Any) -> StandIn:
    name = f"nnx.{type(layer).__name__}"
    shape = layer_shape(layer)
    assert shape is not None
    return StandIn(
        layer,
        kernel=FoldedKernel.of(kernel, axes, shape, name),
        promote_dtype=lambda arrays, *, dtype=None: promote(
            layer.promote_dtype, arrays, dtype
        ),
        **replaced,
    )


def _linear(layer: Any, kernel: MXArray, *_: Any, **__: Any) -> StandIn:
    refuse_custom("nnx.Linear", "dot_general", layer.dot_general, jax.lax.dot_general)
    return _present(layer, kernel, KernelAxes((0,)), dot_general=dot_general)


def _linear_general(layer: Any, kernel: MXArray, *_: Any, **__: Any) -> StandIn:
    name = "nnx.LinearGeneral"
    usual = (None, jax.lax.dot_general)
    refuse_custom(name, "dot_general", layer.dot_general, *usual)
    refuse_custom(name, "dot_general_cls", layer.dot_general_cls, None)
    axes = layer_axes(layer)
    assert isinstance(axes, KernelAxes)
    return _present(layer, kernel, axes, dot_general=dot_general)


def _einsum(
    layer: Any, kernel: MXArray, _: Any = None, einsum_str: str | None = None, **__: Any
) -> StandIn:
    refuse_custom("nnx.Einsum", "einsum_op", layer.einsum_op, jnp.einsum)
    spec = einsum_str or layer.einsum_str
    # Without an equation Flax's own says so; the axes are not used then.
    axes = einsum_axes(spec) if spec else KernelAxes((0,))
    return _present(layer, kernel, axes, einsum_op=einsum)

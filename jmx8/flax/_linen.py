"""Linen layers that take an MXArray as their kernel."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from .._kernel_axes import einsum_axes, KernelAxes
from .._mx_array import MXArray
from ..ops.folded import dot_general, einsum, FoldedKernel
from ._stand_in import promote, refuse_custom, StandIn
from ._tree import content


def install() -> None:
    """Replaces `__call__` of the layers. Called once, by the import of the package."""
    _replace(nn.Dense, _run_dense)
    _replace(nn.DenseGeneral, _run_dense)
    _replace(nn.Einsum, _run_einsum)
    _replace_param()


def dense_axes(layer: Any) -> KernelAxes:
    """Returns the axes of the kernel of a `Dense` or `DenseGeneral`."""
    if isinstance(layer, nn.Dense):
        return KernelAxes((0,))
    batch, inputs = _length(layer.batch_dims), _length(layer.axis)
    return KernelAxes(tuple(range(batch, batch + inputs)), tuple(range(batch)))


def _length(axes: Any) -> int:
    return len(tuple(axes)) if isinstance(axes, Iterable) else 1


def _replace(layer_class: Any, run: Callable[..., Any]) -> None:
    # What the class was written with, below the state handling of Linen, which the
    # new method gets too: interceptors and captured intermediates see one call.
    original = layer_class.__call__.__wrapped__

    @functools.wraps(original)
    def call(self, *args, **kwargs):
        kernel = _stored(self, "kernel")
        if kernel is None:
            return original(self, *args, **kwargs)
        return run(original, self, kernel, *args, **kwargs)

    # Linen wraps the methods of a class when it is made.
    made = type(layer_class.__name__, (layer_class,), {"__call__": call})
    layer_class.__call__ = made.__call__


def _stored(layer: Any, name: str) -> MXArray | None:
    """Returns the parameter of a bound layer if it is an MXArray."""
    if not layer.has_variable("params", name):
        return None
    box = layer.get_variable("params", name)
    # Unboxing constrains the sharding, which is left to Flax for ordinary arrays.
    return nn.meta.unbox(box) if isinstance(content(box), MXArray) else None


def _run_dense(original: Any, layer: Any, kernel: MXArray, *args: Any, **kwargs: Any):
    name = f"nn.{type(layer).__name__}"
    usual = (None, jax.lax.dot_general)
    refuse_custom(name, "dot_general", layer.dot_general, *usual)
    refuse_custom(name, "dot_general_cls", layer.dot_general_cls, None)

    def param(key, init, *init_args, **options):
        if key != "kernel":
            return layer.param(key, init, *init_args, **options)
        return FoldedKernel.of(kernel, dense_axes(layer), init_args[0], name)

    stand_in = StandIn(
        layer,
        param=param,
        promote_dtype=functools.partial(_promote, layer),
        dot_general=dot_general,
    )
    return original(stand_in, *args, **kwargs)


def _promote(layer: Any, *arrays: Any, dtype: Any = None) -> tuple[Any, Any, Any]:
    spread = lambda arrays, *, dtype: layer.promote_dtype(*arrays, dtype=dtype)
    return promote(spread, arrays, dtype)


def _run_einsum(
    _: Any, layer: Any, array: MXArray, inputs: Any, einsum_str: str | None = None
) -> jax.Array:
    """Computes what `nn.Einsum` does, which has no place for another einsum."""
    spec = nn.merge_param("einsum_str", layer.einsum_str, einsum_str).replace(" ", "")
    kernel = FoldedKernel.of(array, einsum_axes(spec), layer.shape, "nn.Einsum")
    bias = bias_shape = None
    if layer.use_bias:
        shape, bias_shape = layer._get_bias_shape(spec, inputs, kernel)
        bias = layer.param("bias", layer.bias_init, shape, layer.param_dtype)
    inputs, kernel, bias = _promote(layer, inputs, kernel, bias, dtype=layer.dtype)
    dtype = layer.preferred_element_type
    out = einsum(spec, inputs, kernel, preferred_element_type=dtype)
    return out if bias is None else out + jnp.reshape(bias, bias_shape)


def _replace_param() -> None:
    """Makes a layer that multiplies by an MXArray itself say so."""
    original = nn.Module.param

    @functools.wraps(original)
    def param(self, name, *args, **kwargs):
        if self.scope is not None and _stored(self, name) is not None:
            path = "/".join((*self.path, name))
            raise TypeError(
                f"{type(self).__name__}: reads its parameter `{path}`, which is an "
                "MXArray, itself; nn.Dense, nn.DenseGeneral and nn.Einsum know what "
                "to do with one. Keep it with `skip` of `quantize_params`, or run "
                "`jmx8.quantized(model.apply)`."
            )
        return original(self, name, *args, **kwargs)

    nn.Module.param = param

"""How a Linen model uses its kernels, found by tracing it."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
from flax import linen as nn

from .._kernel_axes import einsum_axes, KernelAxes
from ._linen import dense_axes


def contract_of(
    model: nn.Module, *args: Any, **kwargs: Any
) -> Callable[[str, Any], KernelAxes | Literal["keep"]]:
    """Returns the `contract` of `quantize_params` for the parameters of a Linen model.

    The names in a tree of parameters say which axes a kernel `[k, n]` or that of an
    attention layer contracts, but not those of other `DenseGeneral`s and `Einsum`s, nor
    of layers in a stack by `nn.scan`. The model does: it is traced, without computing
    anything, and each layer is asked. Kernels of other modules, such as convolutions,
    are kept.

    Args:
        model: The model.
        *args: What it is called with, concrete or `ShapeDtypeStruct`s.
        **kwargs: Likewise, but only what does not have to be an array.

    Returns:
        A function of a leaf's path, from the root of the variables or of "params", and
        the leaf, to the axes of the kernel or "keep".
    """
    found: dict[str, tuple[KernelAxes, int]] = {}

    def record(call, call_args, call_kwargs, context):
        layer = context.module
        if context.method_name == "__call__":
            known = _axes(layer, *call_args, **call_kwargs)
            if known is not None:
                found["/".join((*layer.path, "kernel"))] = known
        return call(*call_args, **call_kwargs)

    with nn.intercept_methods(record):
        jax.eval_shape(
            functools.partial(model.init, **kwargs), jax.random.key(0), *args
        )

    def contract(path: str, leaf: Any) -> KernelAxes | Literal["keep"]:
        known = found.get(path.removeprefix("params/"))
        if known is None:
            return "keep"
        axes, ndim = known
        # `nn.scan` and `nn.vmap` stack the parameters of their layers in front.
        return axes.normalize(ndim).after(len(leaf.shape) - ndim)

    return contract


def _axes(
    layer: Any, _: Any = None, einsum_str: str | None = None, **__: Any
) -> tuple[KernelAxes, int] | None:
    """Returns the axes of a layer's kernel and how many it has; None for others."""
    if isinstance(layer, nn.Dense):
        return dense_axes(layer), 2
    if isinstance(layer, nn.DenseGeneral):
        axes = dense_axes(layer)
        features = layer.features
        count = len(tuple(features)) if not isinstance(features, int) else 1
        return axes, len(axes.batch) + len(axes.contracted) + count
    if isinstance(layer, nn.Einsum):
        spec = nn.merge_param("einsum_str", layer.einsum_str, einsum_str)
        return einsum_axes(spec), len(layer.shape)
    return None

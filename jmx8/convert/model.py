"""Conversion of an Equinox model: its layers become MXFP8 layers."""

from typing import Any, get_args, Literal, overload

import equinox as eqx
import jax

from .._mx_array import MXArray
from .._types import Activations
from ..nn import Experts, MXExperts, MXLinear
from ._patterns import Patterns
from ._rules import make_rules
from .params import convert_tree
from .report import Report


@overload
def quantize_model(
    module: Any,
    *,
    skip: Patterns = ...,
    only: Patterns = ...,
    activations: Activations = ...,
    on_nonfinite: Literal["raise", "keep"] = ...,
    donate: bool = ...,
    return_report: Literal[False] = ...,
) -> Any: ...


@overload
def quantize_model(
    module: Any,
    *,
    skip: Patterns = ...,
    only: Patterns = ...,
    activations: Activations = ...,
    on_nonfinite: Literal["raise", "keep"] = ...,
    donate: bool = ...,
    return_report: Literal[True],
) -> tuple[Any, Report]: ...


def quantize_model(
    module: Any,
    *,
    skip: Patterns = None,
    only: Patterns = None,
    activations: Activations = "auto",
    on_nonfinite: Literal["raise", "keep"] = "raise",
    donate: bool = True,
    return_report: bool = False,
) -> Any:
    """Replaces a model's linear layers and experts by MXFP8 ones.

    Every `eqx.nn.Linear` becomes an `MXLinear` and every `jmx8.nn.Experts` an
    `MXExperts`, wherever it is in the model; everything else stays. A layer is
    selected by the path of its weight, `layers/0/mlp/up_proj/weight`, so patterns that
    name the layer or a module above it work too; see `quantize_params`. Kept are a
    `Linear` with a "scalar" feature, a subclass of `Linear`, whose `__call__` may do
    more, and what is inside `eqx.nn.WeightNorm` or `SpectralNorm`.

    Args:
        module: An Equinox model, or any pytree that holds layers. Arrays may be
            `ShapeDtypeStruct`s, as `eqx.filter_eval_shape` returns.
        skip: Patterns of layers to keep, besides `DEFAULT_SKIP`, which holds routers
            and `lm_head`.
        only: Patterns of the layers to convert. `DEFAULT_SKIP` does not apply then;
            `skip` does.
        activations: What the new layers multiply: "bf16" for activations as they are,
            "mxfp8" for quantized ones, "auto" for what the hardware does best.
        on_nonfinite: See `quantize_params`.
        donate: See `quantize_params`.
        return_report: Whether to return a `Report` too, over all arrays of the model.

    Returns:
        The converted model, or that and a `Report`.

    Raises:
        ValueError: If there is no such layer at all, one weight of an `Experts` is
            selected without the other, or as in `quantize_params`. Nothing is
            converted then.
        TypeError: If a pattern is of the wrong type.
    """
    if activations not in get_args(Activations):
        raise ValueError(
            f"quantize_model: activations must be one of {get_args(Activations)}, got "
            f"{activations!r}."
        )
    rules = make_rules(skip, only, layers_only=True)
    layers = jax.tree.leaves(module, is_leaf=_is_layer)
    if not any(_is_layer(layer) for layer in layers):
        raise ValueError(
            "quantize_model: needs a model with an eqx.nn.Linear or jmx8.nn.Experts in "
            f"it, got {type(module).__name__} with none. Use `quantize_params` for "
            "weights that are held in other ways."
        )
    converted, report = convert_tree(
        "quantize_model",
        module,
        rules,
        on_nonfinite=on_nonfinite,
        donate=donate,
        with_stats=return_report,
    )
    new_module = jax.tree.map(
        lambda node: _swap(node, activations), converted, is_leaf=_is_layer
    )
    return (new_module, report) if return_report else new_module


def _is_layer(node: Any) -> bool:
    return isinstance(node, (eqx.nn.Linear, Experts, MXLinear, MXExperts, MXArray))


def _swap(node: Any, activations: Activations) -> Any:
    """Returns the MXFP8 layer for one whose weights were converted."""
    if type(node) is eqx.nn.Linear and isinstance(node.weight, MXArray):
        layer = MXLinear.from_weight(node.weight, activations=activations)
        return _with(layer, bias=node.bias)
    if type(node) is Experts and isinstance(node.w13, MXArray):
        assert isinstance(node.w2, MXArray)  # `_torn_experts` refused anything else
        layer = MXExperts(
            node.w13,
            node.w2,
            activation=node.activation,
            apply_router_weight_on_input=node.apply_router_weight_on_input,
            activations=activations,
        )
        return _with(layer, w13_bias=node.w13_bias, w2_bias=node.w2_bias)
    return node


def _with(layer: Any, **biases: Any) -> Any:
    """Sets biases, which may be abstract and then do not pass the constructor."""
    for name, bias in biases.items():
        if bias is not None:
            layer = eqx.tree_at(
                lambda layer, name=name: getattr(layer, name),
                layer,
                bias,
                is_leaf=lambda node: node is None,
            )
    return layer

"""`MXLinear`: `equinox.nn.Linear` with MXFP8 weights."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from .._device import resolve_activations
from .._mx_array import MXArray
from .._types import Activations
from ..kernels._prepared import PreparedWeights
from ..ops.matmul import mx_matmul, mx_matmul_w8a8
from ..ops.quantize import quantize
from ._parameters import value


class MXLinear(eqx.Module):
    """A linear layer with MXFP8 weights, in place of `equinox.nn.Linear`.

    Attributes:
        weight: `[out_features, in_features]`; canonical, or as `prepare` lays it out.
        bias: `[out_features]` in an ordinary dtype, or None.
        activations: "bf16" multiplies the input as it is (W8A16), "mxfp8" quantizes it
            first (W8A8), "auto" is "mxfp8" where the hardware multiplies MXFP8.
    """

    weight: MXArray | PreparedWeights
    bias: Array | None
    activations: Activations = eqx.field(static=True)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        *,
        activations: Activations = "auto",
        key: PRNGKeyArray,
    ):
        """Initializes as `eqx.nn.Linear` does, then quantizes."""
        linear = eqx.nn.Linear(
            in_features, out_features, use_bias, dtype=dtype, key=key
        )
        self.weight = quantize(linear.weight)
        self.bias = linear.bias
        self.activations = activations

    @classmethod
    def from_weight(
        cls,
        weight: MXArray | PreparedWeights,
        bias: Array | None = None,
        *,
        activations: Activations = "auto",
    ) -> "MXLinear":
        """Returns the layer that has these parameters, concrete or abstract."""
        layer = object.__new__(cls)
        for name, field in (
            ("weight", weight),
            ("bias", bias),
            ("activations", activations),
        ):
            object.__setattr__(layer, name, field)  # modules are frozen
        return layer

    @classmethod
    def from_linear(
        cls, linear: eqx.nn.Linear, *, activations: Activations = "auto"
    ) -> "MXLinear":
        """Returns the layer with its weight quantized along `in_features`."""
        weight = quantize(linear.weight)
        return cls.from_weight(weight, linear.bias, activations=activations)

    @property
    def in_features(self) -> int:
        return self.weight.shape[-1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[-2]

    @property
    def use_bias(self) -> bool:
        return self.bias is not None

    def __call__(
        self, x: Float[Array, "*batch k"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*batch n"]:
        """Computes `x @ weight.T + bias`.

        Args:
            x: Input `[..., in_features]`. `jax.vmap` of the layer over vectors is the
                same single matmul.
            key: Ignored; accepted as every Equinox layer does.

        Returns:
            Array `[..., out_features]` of the dtype of `x`.
        """
        return apply_mx_linear(self, x)


@jax.named_scope("jmx8.nn.MXLinear")
def apply_mx_linear(
    layer: Any, x: Float[Array, "*batch k"]
) -> Float[Array, "*batch n"]:
    """Computes what an `MXLinear` does, with the fields of one."""
    weight, bias = value(layer.weight), value(layer.bias)
    if resolve_activations(layer.activations) != "mxfp8":
        return mx_matmul(x, weight, bias=bias)
    out = mx_matmul_w8a8(x, weight)
    if bias is None:
        return out
    return out + jnp.broadcast_to(bias.astype(out.dtype), out.shape)

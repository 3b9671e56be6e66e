"""Root-mean-square normalization."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from ._parameters import value


class RMSNorm(eqx.Module):
    """Divides by the root mean square over the last axis, then scales per channel.

    `weight * (x / sqrt(mean(x**2) + eps))`. The quotient is computed in float32 and
    rounded to the dtype of `x` before the product with the weight, as Hugging Face
    does.

    Attributes:
        weight: Scale of each channel, `[h]`, ones at first.
        eps: Added to the mean square.
    """

    weight: Float[Array, "h"]
    eps: float = eqx.field(static=True)

    def __init__(self, size: int, *, eps: float = 1e-6, dtype: DTypeLike = jnp.float32):
        self.weight = jnp.ones(size, dtype)
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch h"]) -> Float[Array, "*batch h"]:
        """Normalizes each vector along the last axis of `x`, which is `[..., h]`."""
        return apply_rms_norm(self, x)


def apply_rms_norm(layer: Any, x: Float[Array, "*batch h"]) -> Float[Array, "*batch h"]:
    """Computes what an `RMSNorm` does, with the fields of one."""
    x32 = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    normed = (x32 * jax.lax.rsqrt(mean_square + layer.eps)).astype(x.dtype)
    return normed * value(layer.weight).reshape((1,) * (x.ndim - 1) + (-1,))

"""The activation functions between the two matmuls of an MLP or an expert."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class SwiGLUOAI:
    """OpenAI's clamped SwiGLU: `gate * sigmoid(alpha * gate) * (up + beta)`.

    `gate` is clamped from above to `limit`, `up` to `[-limit, limit]`. The defaults are
    gpt-oss's. `SwiGLUOAI(alpha=1, beta=0, limit=...)` is a clamped SiLU-gated unit.

    Attributes:
        alpha: Slope inside the sigmoid.
        beta: Added to `up` after the clamp.
        limit: Bound of the clamp; None for no clamp.
    """

    alpha: float = 1.702
    beta: float = 1.0
    limit: float | None = 7.0

    def __post_init__(self):
        if self.limit is not None and self.limit <= 0:
            raise ValueError(
                f"SwiGLUOAI: limit must be positive, got {self.limit}. None means none."
            )


# A name, or the parameters of one that has some. All are gated but "relu2".
Activation = Literal["silu", "gelu", "gelu_tanh", "swigluoai", "relu2"] | SwiGLUOAI

_GATES = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def is_gated(activation: Activation) -> bool:
    """Returns whether `apply_activation` halves its input.

    Raises:
        ValueError: If the activation is unknown.
    """
    if isinstance(activation, SwiGLUOAI) or activation in (*_GATES, "swigluoai"):
        return True
    if activation == "relu2":
        return False
    raise ValueError(
        f"activation: expected one of {[*_GATES, 'swigluoai', 'relu2']} or a "
        f"SwiGLUOAI, got {activation!r}."
    )


def apply_activation(
    x: Float[Array, "... n"], activation: Activation
) -> Float[Array, "... i"]:
    """Applies the activation to the output of the first matmul.

    Args:
        x: `[gate; up]` along the last axis, n = 2i, for a gated activation; the input
            itself, n = i, for "relu2" (`max(x, 0)**2`).
        activation: Which one. The gated ones are `f(gate) * up`, "swigluoai" as
            `SwiGLUOAI` says.

    Returns:
        Array `[..., i]` of the dtype of `x`.

    Raises:
        ValueError: If the activation is unknown.
    """
    if not is_gated(activation):
        return jnp.square(jax.nn.relu(x))
    gate, up = jnp.split(x, 2, axis=-1)
    if activation == "swigluoai":
        activation = SwiGLUOAI()
    if not isinstance(activation, SwiGLUOAI):
        return _GATES[activation](gate) * up
    if activation.limit is not None:
        gate = jnp.minimum(gate, activation.limit)
        up = jnp.clip(up, -activation.limit, activation.limit)
    return gate * jax.nn.sigmoid(activation.alpha * gate) * (up + activation.beta)

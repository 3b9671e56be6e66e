"""How FlashInfer's MoE kernels are told which activation to apply."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from ..xla_activation import Activation, SwiGLUOAI


# FlashInfer's `ActivationType`. With parameters, SwiGLU is SwiGLU-OAI.
ACTIVATION_TYPES = {
    "silu": 3,
    "gelu": 4,
    "relu2": 6,
    "gelu_tanh": 8,
    "swigluoai": 3,
}


class SwiGLUParameters(NamedTuple):
    """Parameters of SwiGLU for each expert; None for the kernel's default, which is 1,
    0 and no limit."""

    alpha: Float[Array, " e"] | None = None
    beta: Float[Array, " e"] | None = None
    limit: Float[Array, " e"] | None = None


def activation_type(activation: Activation) -> int:
    """Returns FlashInfer's number of an activation."""
    name = "swigluoai" if isinstance(activation, SwiGLUOAI) else activation
    return ACTIVATION_TYPES[name]


def swiglu_parameters(activation: Activation, num_experts: int) -> SwiGLUParameters:
    """Returns the parameters of an activation, all None but for SwiGLU-OAI."""
    if activation == "swigluoai":
        activation = SwiGLUOAI()
    if not isinstance(activation, SwiGLUOAI):
        return SwiGLUParameters()
    values = (activation.alpha, activation.beta, activation.limit)
    return SwiGLUParameters(
        *(None if v is None else jnp.full(num_experts, v, jnp.float32) for v in values)
    )

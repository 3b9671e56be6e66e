"""Rotary position embedding, and the scalings that stretch it to longer contexts."""

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class RopeParameters:
    """How positions become rotation angles; fields as in Hugging Face's configs.

    Attributes:
        rope_theta: Base of the geometric series of wavelengths.
        rope_type: "default": the frequencies as they are. "linear": all divided by
            `factor`. "yarn": low frequencies divided by `factor`, high ones kept, a
            ramp between them (Peng et al., 2023).
        factor: How many times longer than in training a context may be.
        original_max_position_embeddings: yarn: length of a context in training.
        attention_factor: yarn: what cos and sin are multiplied by. None computes it
            from `factor`, `mscale` and `mscale_all_dim`.
        beta_fast: yarn: a frequency that makes more turns than this is kept.
        beta_slow: yarn: a frequency that makes fewer turns than this is divided.
        mscale: yarn: see `attention_factor`; counts only with `mscale_all_dim`.
        mscale_all_dim: yarn: see `attention_factor`; counts only with `mscale`.
        truncate: yarn: whether the ramp starts and ends at whole channels.
    """

    rope_theta: float
    rope_type: Literal["default", "linear", "yarn"] = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


def rope_frequencies(rope: RopeParameters, head_dim: int) -> tuple[np.ndarray, float]:
    """Returns the angle per position of each channel pair, and a scale for cos and sin.

    Args:
        rope: Base and scaling.
        head_dim: Size of a head, even.

    Returns:
        Frequencies `[head_dim // 2]`, float32, and the factor by which cos and sin are
        multiplied, 1 except for yarn.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    frequencies = rope.rope_theta**-exponents
    attention_factor = 1.0
    if rope.rope_type == "linear":
        frequencies = frequencies / rope.factor
    elif rope.rope_type == "yarn":
        kept = 1.0 - _yarn_ramp(rope, head_dim)
        frequencies = frequencies * (kept + (1.0 - kept) / rope.factor)
        attention_factor = _yarn_attention_factor(rope)
    return frequencies.astype(np.float32), attention_factor


def _yarn_ramp(rope: RopeParameters, head_dim: int) -> np.ndarray:
    """Returns 0 for the channel pairs that are kept, 1 for those that are divided."""

    def channel(turns: float) -> float:
        """Returns where a wave makes this many turns in a training context."""
        wavelength = rope.original_max_position_embeddings / (turns * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(rope.rope_theta))

    low, high = channel(rope.beta_fast), channel(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    # The upper limit is a channel and not a channel pair in the reference code too.
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # as the reference code avoids dividing by zero
    return np.clip((np.arange(head_dim // 2) - low) / (high - low), 0.0, 1.0)


def _yarn_attention_factor(rope: RopeParameters) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor

    def temperature(mscale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return temperature(rope.mscale) / temperature(rope.mscale_all_dim)
    return temperature(1.0)


def rope_tables(
    rope: RopeParameters, head_dim: int, positions: Int[Array, "b t"]
) -> tuple[Float[Array, "b t half"], Float[Array, "b t half"]]:
    """Returns cos and sin of every angle, `[b, t, head_dim // 2]`, float32.

    Args:
        rope: Base and scaling.
        head_dim: Size of a head, even.
        positions: Position of each token in its own sequence, `[b, t]`.
    """
    frequencies, attention_factor = rope_frequencies(rope, head_dim)
    angles = positions.astype(jnp.float32)[..., None] * frequencies[None, None, :]
    return jnp.cos(angles) * attention_factor, jnp.sin(angles) * attention_factor


def apply_rope(
    x: Float[Array, "b t n d"],
    cos: Float[Array, "b t d//2"],
    sin: Float[Array, "b t d//2"],
) -> Float[Array, "b t n d"]:
    """Rotates each head: channel i and channel i + d/2 make a pair.

    The rotation is computed in float32, and rounded once to the dtype of `x`.

    Args:
        x: Queries or keys `[b, t, n, d]`.
        cos: From `rope_tables`, `[b, t, d // 2]`.
        sin: Likewise.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)

"""Chooses the next token from logits."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


def sample(
    logits: Float[Array, "b v"],
    keys: Key[Array, "b"],
    *,
    temperature: Float[Array, ""] | float | None = None,
    top_k: int | None = None,
    top_p: Float[Array, ""] | float | None = None,
) -> Int[Array, "b"]:
    """Draws one token per row from `softmax(logits / temperature)`.

    Args:
        logits: `[b, v]`, float32.
        keys: A key for each row, `[b]`.
        temperature: Above 0; None takes the likeliest token instead of drawing.
        top_k: Draws among this many likeliest tokens only, the lower ids of equally
            likely ones. None, or more than `v`, for all.
        top_p: Draws among the fewest likeliest tokens that reach this probability
            together, after `top_k` has been applied. Above 0; None for all.

    Returns:
        Token ids `[b]`, int32.
    """
    if temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # The maximum goes first, so that a tiny temperature cannot overflow.
    scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature
    if top_k is None and top_p is None:
        return _draw(keys, scaled)
    candidates, ids = filter_logits(scaled, top_k=top_k, top_p=top_p)
    choice = _draw(keys, candidates)
    return jnp.take_along_axis(ids, choice[:, None], axis=-1)[:, 0]


def filter_logits(
    logits: Float[Array, "b v"],
    *,
    top_k: int | None = None,
    top_p: Float[Array, ""] | float | None = None,
) -> tuple[Float[Array, "b k"], Int[Array, "b k"]]:
    """Returns the logits that `top_k` and `top_p` leave, likeliest first, and ids.

    Args:
        logits: `[b, v]`.
        top_k: As in `sample`.
        top_p: As in `sample`.

    Returns:
        Logits `[b, k]`, -inf where `top_p` excludes, and token ids `[b, k]`, int32.
    """
    vocab_size = logits.shape[-1]
    top_k = vocab_size if top_k is None else min(top_k, vocab_size)
    candidates, ids = jax.lax.top_k(logits, top_k)
    if top_p is not None:
        probabilities = jax.nn.softmax(candidates, axis=-1)
        likelier = jnp.cumsum(probabilities, axis=-1) - probabilities
        candidates = jnp.where(likelier < top_p, candidates, -jnp.inf)
    return candidates, ids.astype(jnp.int32)


def _draw(keys: Key[Array, "b"], logits: Float[Array, "b v"]) -> Int[Array, "b"]:
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)

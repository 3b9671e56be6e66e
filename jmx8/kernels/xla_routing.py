"""Pure-XLA routing: the reference of the other backends."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


RoutingMethod = Literal["softmax", "topk_softmax", "sigmoid", "sqrtsoftplus"]

# Keeps the renormalization of all-zero scores finite, as DeepSeek-V3 does.
_EPSILON = 1e-20


def route(
    router_logits: Float[Array, "t e"],
    correction_bias: Float[Array, "*t e"] | None,
    *,
    method: RoutingMethod,
    top_k: int,
    renormalize: bool,
    num_groups: int,
    topk_groups: int,
    scaling_factor: float,
) -> tuple[Int[Array, "t k"], Float[Array, "t k"]]:
    """Computes `ops.routing.route` for logits `[t, e]` and a bias `[e]` or `[t, e]`."""
    scores = _scores(router_logits.astype(jnp.float32), method)
    choice = scores
    if correction_bias is not None:
        bias = correction_bias.astype(jnp.float32)
        choice = choice + jnp.broadcast_to(bias, choice.shape)
    if num_groups > 1:
        choice = _keep_best_groups(choice, num_groups, topk_groups)
    topk_ids = jax.lax.top_k(choice, top_k)[1]
    weights = jnp.take_along_axis(scores, topk_ids, axis=-1)
    if method == "topk_softmax":
        weights = jax.nn.softmax(weights, axis=-1)
    elif renormalize:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + _EPSILON)
    return topk_ids, weights * scaling_factor


def _scores(logits: Array, method: RoutingMethod) -> Array:
    if method == "softmax":
        return jax.nn.softmax(logits, axis=-1)
    if method == "sigmoid":
        return jax.nn.sigmoid(logits)
    if method == "sqrtsoftplus":
        # Where softplus underflows, the derivative of its square root is not finite.
        squares = jax.nn.softplus(logits)
        is_zero = squares == 0
        return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, squares)))
    return logits


def _keep_best_groups(choice: Array, num_groups: int, topk_groups: int) -> Array:
    """Sets the scores of experts outside the best groups to -inf."""
    size = choice.shape[-1] // num_groups
    groups = choice.reshape(*choice.shape[:-1], num_groups, size)
    best_two = jax.lax.top_k(groups, min(2, size))[0]
    kept = jax.lax.top_k(jnp.sum(best_two, axis=-1), topk_groups)[1]
    is_kept = jnp.any(jax.nn.one_hot(kept, num_groups, dtype=jnp.bool_), axis=-2)
    return jnp.where(is_kept[..., None], groups, -jnp.inf).reshape(choice.shape)

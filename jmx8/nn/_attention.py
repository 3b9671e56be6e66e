"""Grouped-query attention with rotary positions, and the cache that it decodes from.

Letters in shapes: b rows of the batch, t new tokens, s slots of the cache, n heads,
d channels of a head, h channels of the model.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int, PRNGKeyArray

from ._linear import MXLinear
from ._norm import RMSNorm
from ._rope import apply_rope


def per_token(
    linear: Callable[[Array], Array], x: Float[Array, "b t k"]
) -> Float[Array, "b t n"]:
    """Applies a layer that takes one vector to every token of `x`, `[b, t, k]`."""
    return jax.vmap(jax.vmap(linear))(x)


class KVCache(eqx.Module):
    """Keys and values of the tokens seen so far, for each layer and each row.

    A row's tokens occupy its first `lengths[row]` slots; what the other slots hold is
    never read. Rows may differ in length.

    Attributes:
        keys: One `[b, s, num_kv_heads, head_dim]` per layer, rotated already.
        values: Likewise, not rotated.
        lengths: Tokens in each row, int32 `[b]`.
    """

    keys: tuple[Float[Array, "b s n d"], ...]
    values: tuple[Float[Array, "b s n d"], ...]
    lengths: Int[Array, "b"]

    @classmethod
    def empty(
        cls,
        num_layers: int,
        batch_size: int,
        capacity: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: DTypeLike,
    ) -> "KVCache":
        """Returns a cache of `capacity` slots per row that holds no tokens yet."""
        shape = (batch_size, capacity, num_kv_heads, head_dim)
        zeros = lambda: tuple(jnp.zeros(shape, dtype) for _ in range(num_layers))
        return cls(zeros(), zeros(), jnp.zeros(batch_size, jnp.int32))

    @property
    def batch_size(self) -> int:
        return self.lengths.shape[0]

    @property
    def capacity(self) -> int:
        """How many tokens each row can hold."""
        return self.keys[0].shape[1]


class Attention(eqx.Module):
    """Causal self-attention with fewer key and value heads than query heads.

    Queries and keys are normalized per head before they are rotated, as in Qwen3.

    Attributes:
        q_proj: `[num_heads * head_dim, h]`.
        k_proj: `[num_kv_heads * head_dim, h]`.
        v_proj: `[num_kv_heads * head_dim, h]`.
        o_proj: `[h, num_heads * head_dim]`.
        q_norm: Norm of each query head.
        k_norm: Norm of each key head.
        head_dim: Size of a head.
    """

    q_proj: eqx.nn.Linear | MXLinear
    k_proj: eqx.nn.Linear | MXLinear
    v_proj: eqx.nn.Linear | MXLinear
    o_proj: eqx.nn.Linear | MXLinear
    q_norm: RMSNorm
    k_norm: RMSNorm
    head_dim: int = eqx.field(static=True)

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        use_bias: bool = False,
        eps: float = 1e-6,
        dtype: DTypeLike = jnp.float32,
        key: PRNGKeyArray,
    ):
        keys = jax.random.split(key, 4)
        linear = lambda n_in, n_out, key: eqx.nn.Linear(
            n_in, n_out, use_bias=use_bias, dtype=dtype, key=key
        )
        self.q_proj = linear(hidden_size, num_heads * head_dim, keys[0])
        self.k_proj = linear(hidden_size, num_kv_heads * head_dim, keys[1])
        self.v_proj = linear(hidden_size, num_kv_heads * head_dim, keys[2])
        self.o_proj = linear(num_heads * head_dim, hidden_size, keys[3])
        self.q_norm = RMSNorm(head_dim, eps=eps, dtype=dtype)
        self.k_norm = RMSNorm(head_dim, eps=eps, dtype=dtype)
        self.head_dim = head_dim

    def __call__(
        self,
        x: Float[Array, "b t h"],
        positions: Int[Array, "b t"],
        rope: tuple[Float[Array, "b t half"], Float[Array, "b t half"]],
        kv: tuple[Float[Array, "b s n d"], Float[Array, "b s n d"]] | None = None,
    ) -> tuple[
        Float[Array, "b t h"],
        tuple[Float[Array, "b s n d"], Float[Array, "b s n d"]] | None,
    ]:
        """Attends from each token to itself and the tokens before it in its row.

        Args:
            x: Normalized hidden states `[b, t, h]`.
            positions: Position of each token, `[b, t]`, ascending by 1 along a row.
            rope: cos and sin at these positions, from `rope_tables`.
            kv: Cached keys and values of this layer, `[b, s, n, d]`. The new ones are
                written to the slots given by `positions`; one past the end is
                dropped. None if the tokens are all there is, starting at position 0.

        Returns:
            Output `[b, t, h]`, and the updated `kv`.
        """
        return apply_attention(self, x, positions, rope, kv)


def apply_attention(
    layer: Any, x: Float[Array, "b t h"], positions: Int[Array, "b t"], rope, kv=None
):
    """Computes what an `Attention` does, with the fields of one."""
    heads = lambda y: y.reshape(*y.shape[:2], -1, layer.head_dim)
    q = apply_rope(layer.q_norm(heads(per_token(layer.q_proj, x))), *rope)
    k = apply_rope(layer.k_norm(heads(per_token(layer.k_proj, x))), *rope)
    v = heads(per_token(layer.v_proj, x))
    mask = None
    if kv is not None:
        k, v = kv = _write(kv[0], k, positions), _write(kv[1], v, positions)
        mask = _causal_mask(positions, k.shape[1])
    # JAX's own function promotes bfloat16, which fails where promotion is strict.
    with jax.numpy_dtype_promotion("standard"):
        out = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=kv is None)
    return per_token(layer.o_proj, out.reshape(*out.shape[:2], -1)), kv


def _write(
    cache: Float[Array, "b s n d"],
    new: Float[Array, "b t n d"],
    positions: Int[Array, "b t"],
) -> Float[Array, "b s n d"]:
    rows = jnp.arange(cache.shape[0])[:, None]
    # "drop", because clamping would overwrite the last token of a full row.
    return cache.at[rows, positions].set(
        new.astype(cache.dtype),
        mode="drop",
        indices_are_sorted=True,
        unique_indices=True,
    )


def _causal_mask(
    positions: Int[Array, "b t"], num_slots: int
) -> Bool[Array, "b 1 t s"]:
    """Returns which slots each token sees.

    A row's tokens fill its slots from 0 without gaps, so that slots up to a token's own
    position hold tokens; padding that a longer row forced is always further right.
    """
    slots = jnp.arange(num_slots, dtype=positions.dtype)
    return slots[None, None, None, :] <= positions[:, None, :, None]

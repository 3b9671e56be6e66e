"""Qwen3 in Equinox, dense and mixture of experts.

Attributes are spelled as in Hugging Face's checkpoints: the tensor
`model.layers.3.self_attn.q_proj.weight` is `model.layers[3].self_attn.q_proj.weight`.

Letters in shapes: b rows of the batch, t tokens of a row, h channels, v vocabulary.
"""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, DTypeLike, Float, Float32, Int, PRNGKeyArray

from ..nn._attention import Attention, KVCache, per_token
from ..nn._linear import MXLinear
from ..nn._moe import Experts, SparseMoE
from ..nn._norm import RMSNorm
from ..nn._parameters import is_mx, value
from ..nn._rope import rope_tables
from .qwen3_config import ACTIVATIONS, Qwen3Config


_INIT_STD = 0.02  # of the embedding, whose rows are logit directions when it is tied

_ACTIVATION_FUNCTIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


class MLP(eqx.Module):
    """Gated feed-forward network: `down_proj(activation(gate_proj(x)) * up_proj(x))`.

    Attributes:
        gate_proj: `[intermediate_size, h]`.
        up_proj: `[intermediate_size, h]`.
        down_proj: `[h, intermediate_size]`.
        activation: "silu", "gelu" or "gelu_tanh".
    """

    gate_proj: eqx.nn.Linear | MXLinear
    up_proj: eqx.nn.Linear | MXLinear
    down_proj: eqx.nn.Linear | MXLinear
    activation: str = eqx.field(static=True)

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str = "silu",
        dtype: DTypeLike = jnp.float32,
        key: PRNGKeyArray,
    ):
        keys = jax.random.split(key, 3)
        linear = functools.partial(eqx.nn.Linear, use_bias=False, dtype=dtype)
        self.gate_proj = linear(hidden_size, intermediate_size, key=keys[0])
        self.up_proj = linear(hidden_size, intermediate_size, key=keys[1])
        self.down_proj = linear(intermediate_size, hidden_size, key=keys[2])
        self.activation = activation

    def __call__(self, x: Float[Array, "b t h"]) -> Float[Array, "b t h"]:
        """Applies the network to every token of `x`, `[b, t, h]`."""
        return apply_mlp(self, x)


def apply_mlp(layer: Any, x: Float[Array, "b t h"]) -> Float[Array, "b t h"]:
    """Computes what an `MLP` does, with the fields of one."""
    gate = _ACTIVATION_FUNCTIONS[layer.activation](per_token(layer.gate_proj, x))
    return per_token(layer.down_proj, gate * per_token(layer.up_proj, x))


class DecoderLayer(eqx.Module):
    """Attention and feed-forward network, each normalized first and added to its input.

    Attributes:
        input_layernorm: Norm in front of the attention.
        self_attn: The attention.
        post_attention_layernorm: Norm in front of the feed-forward network.
        mlp: An `MLP`, or a `SparseMoE` where `config.is_sparse(index)`.
    """

    input_layernorm: RMSNorm
    self_attn: Attention
    post_attention_layernorm: RMSNorm
    mlp: MLP | SparseMoE

    def __init__(
        self, config: Qwen3Config, index: int, *, dtype: DTypeLike, key: PRNGKeyArray
    ):
        attention_key, mlp_key = jax.random.split(key)
        norm = functools.partial(
            RMSNorm, config.hidden_size, eps=config.rms_norm_eps, dtype=dtype
        )
        self.input_layernorm = norm()
        self.self_attn = Attention(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            use_bias=config.attention_bias,
            eps=config.rms_norm_eps,
            dtype=dtype,
            key=attention_key,
        )
        self.post_attention_layernorm = norm()
        self.mlp = _init_mlp(config, index, dtype, mlp_key)

    def __call__(self, x, positions, rope, kv=None):
        """Takes and returns what `Attention` does."""
        return apply_decoder_layer(self, x, positions, rope, kv)


def apply_decoder_layer(layer: Any, x: Float[Array, "b t h"], positions, rope, kv):
    """Computes what a `DecoderLayer` does, with the fields of one."""
    out, kv = layer.self_attn(layer.input_layernorm(x), positions, rope, kv)
    x = x + out
    return x + layer.mlp(layer.post_attention_layernorm(x)), kv


def _init_mlp(
    config: Qwen3Config, index: int, dtype: DTypeLike, key: PRNGKeyArray
) -> MLP | SparseMoE:
    activation = ACTIVATIONS[config.hidden_act]
    if not config.is_sparse(index):
        return MLP(
            config.hidden_size,
            config.intermediate_size,
            activation=activation,
            dtype=dtype,
            key=key,
        )
    gate_key, experts_key = jax.random.split(key)
    return SparseMoE(
        gate=eqx.nn.Linear(
            config.hidden_size,
            config.num_experts,
            use_bias=False,
            dtype=dtype,
            key=gate_key,
        ),
        experts=Experts.init(
            config.num_experts,
            config.hidden_size,
            config.moe_intermediate_size,
            activation=activation,
            dtype=dtype,
            key=experts_key,
        ),
        top_k=config.num_experts_per_tok,
        renormalize=config.norm_topk_prob,
    )


class Qwen3(eqx.Module):
    """A Qwen3 language model.

    Computes in the dtype of its parameters; logits are float32. Linear layers may be
    `eqx.nn.Linear` or `MXLinear`, experts `Experts` or `MXExperts`.

    Attributes:
        embed_tokens: Embedding of the tokens, `[v, h]`.
        layers: The decoder layers.
        norm: Norm of the last layer's output.
        lm_head: Output projection `[v, h]`, None where the embedding serves as such.
        config: Hyperparameters.
    """

    embed_tokens: eqx.nn.Embedding
    layers: tuple[DecoderLayer, ...]
    norm: RMSNorm
    lm_head: eqx.nn.Linear | MXLinear | None
    config: Qwen3Config = eqx.field(static=True)

    def __init__(
        self,
        config: Qwen3Config,
        *,
        dtype: DTypeLike = jnp.bfloat16,
        key: PRNGKeyArray,
    ):
        """Makes a model with random parameters.

        `eqx.filter_eval_shape(Qwen3, config, key=key)` makes one without memory, to be
        filled with the parameters of a checkpoint.

        Args:
            config: Hyperparameters.
            dtype: Dtype of the parameters, and so of the computation.
            key: Seeds the parameters.
        """
        embed_key, head_key, *layer_keys = jax.random.split(
            key, config.num_hidden_layers + 2
        )
        shape = (config.vocab_size, config.hidden_size)
        self.embed_tokens = eqx.nn.Embedding(
            weight=jax.random.normal(embed_key, shape, dtype) * _INIT_STD
        )
        self.layers = tuple(
            DecoderLayer(config, index, dtype=dtype, key=layer_key)
            for index, layer_key in enumerate(layer_keys)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = eqx.nn.Linear(
                config.hidden_size,
                config.vocab_size,
                use_bias=False,
                dtype=dtype,
                key=head_key,
            )
        self.config = config

    def init_cache(self, batch_size: int, capacity: int) -> KVCache:
        """Returns an empty cache for `batch_size` rows of up to `capacity` tokens."""
        return empty_cache(self, batch_size, capacity)

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        cache: KVCache | None = None,
        *,
        lengths: Int[Array, "b"] | None = None,
        last_only: bool = False,
    ) -> tuple[Float32[Array, "b *t v"], KVCache | None]:
        """Computes the logits of the token that follows each of `tokens`.

        One method for all uses, each to be jitted by the caller: without a cache, whole
        texts at once; with an empty cache, a batch of prompts; with a cache that holds
        tokens, one or more further tokens per row.

        Rows of different lengths are padded on the right, and `lengths` says how many
        tokens are real. Padding is not attended to by real tokens and takes no room in
        the cache: the row's next tokens overwrite it. What the padding may be is free,
        and so are the logits at its places.

        Args:
            tokens: Token ids `[b, t]`, within the vocabulary; that is not checked.
            cache: Tokens that came before, for each row. The result continues it.
            lengths: Real tokens of each row, `[b]`. None if all `t` are real.
            last_only: Whether to return only the logits after the last real token of
                each row, `[b, v]`. Saves time and memory in a large vocabulary.

        Returns:
            Logits `[b, t, v]` or `[b, v]`, float32, and the cache with the tokens
            added; None if there was none.

        Raises:
            ValueError: If the batch of `cache` is of another size, or the new tokens do
                not fit in it. The second is known only in part under `jit`: there, a
                token past the end of a row is not written, and the row's further
                logits are meaningless.
        """
        return apply_qwen3(self, tokens, cache, lengths=lengths, last_only=last_only)


def empty_cache(model: Any, batch_size: int, capacity: int) -> KVCache:
    """Returns what `Qwen3.init_cache` does, with the fields of a model."""
    return KVCache.empty(
        model.config.num_hidden_layers,
        batch_size,
        capacity,
        model.config.num_key_value_heads,
        model.config.head_dim,
        value(model.embed_tokens.weight).dtype,
    )


def apply_qwen3(
    model: Any,
    tokens: Int[Array, "b t"],
    cache: KVCache | None = None,
    *,
    lengths: Int[Array, "b"] | None = None,
    last_only: bool = False,
) -> tuple[Float32[Array, "b *t v"], KVCache | None]:
    """Computes what a `Qwen3` does, with the fields of one."""
    batch, time = tokens.shape
    lengths = jnp.full(batch, time, jnp.int32) if lengths is None else lengths
    start = jnp.zeros(batch, jnp.int32)
    if cache is not None:
        _check_fits(cache, batch, time, lengths)
        start = cache.lengths
    positions = start[:, None] + jnp.arange(time, dtype=jnp.int32)[None, :]
    rope = rope_tables(model.config.rope, model.config.head_dim, positions)
    x = value(model.embed_tokens.weight)[tokens]
    kvs = []
    for index, layer in enumerate(model.layers):
        kv = None if cache is None else (cache.keys[index], cache.values[index])
        x, kv = layer(x, positions, rope, kv)
        kvs.append(kv)
    if cache is not None:
        keys, values = zip(*kvs, strict=True)
        cache = KVCache(keys, values, start + lengths.astype(jnp.int32))
    if last_only:
        last = lengths[:, None, None] - 1
        x = jnp.take_along_axis(x, last, axis=1)
    logits = _logits(model, model.norm(x))
    return logits[:, 0] if last_only else logits, cache


def _logits(model: Any, x: Float[Array, "b t h"]) -> Float32[Array, "b t v"]:
    head = model.embed_tokens if model.lm_head is None else model.lm_head
    weight = value(head.weight)
    if is_mx(weight):
        return per_token(head, x).astype(jnp.float32)
    # Rounding logits to bfloat16 would make ties of the likeliest tokens.
    return jnp.einsum("bth,vh->btv", x, weight, preferred_element_type=jnp.float32)


def _check_fits(cache: KVCache, batch: int, time: int, lengths: Array) -> None:
    if cache.batch_size != batch:
        raise ValueError(
            f"Qwen3: the cache must have a row for each row of tokens, got {batch} "
            f"rows and a cache for {cache.batch_size}. Use `init_cache({batch}, ...)`."
        )
    needed = time
    if not isinstance(cache.lengths + lengths, Tracer):
        needed = max(needed, int(jnp.max(cache.lengths + lengths)))
    if needed > cache.capacity:
        raise ValueError(
            f"Qwen3: the cache must have room for {needed} tokens in each row, got "
            f"capacity {cache.capacity}. Use `init_cache({batch}, {needed})` or more."
        )

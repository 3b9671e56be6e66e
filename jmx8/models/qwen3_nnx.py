"""Qwen3 in Flax NNX, dense and mixture of experts.

The modules contain what those of `qwen3` do, under the same names, and compute by the
same functions. Letters in shapes are those of `qwen3`.
"""

import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Float32, Int

from ..nn._attention import KVCache
from . import qwen3
from ._nnx import (
    Attention,
    counterpart_of,
    Embedding,
    Layer,
    Linear,
    nnx,
    RMSNorm,
    SparseMoE,
)
from .qwen3_config import Qwen3Config


@counterpart_of(qwen3.MLP)
class MLP(Layer):
    """Gated feed-forward network; fields are those of `qwen3.MLP`."""

    gate_proj: Linear
    up_proj: Linear
    down_proj: Linear
    activation: str

    def __call__(self, x: Float[Array, "b t h"]) -> Float[Array, "b t h"]:
        """Applies the network to every token of `x`, `[b, t, h]`."""
        return qwen3.apply_mlp(self, x)


@counterpart_of(qwen3.DecoderLayer)
class DecoderLayer(Layer):
    """Attention and feed-forward network; fields are those of `qwen3.DecoderLayer`."""

    input_layernorm: RMSNorm
    self_attn: Attention
    post_attention_layernorm: RMSNorm
    mlp: MLP | SparseMoE

    def __call__(self, x: Float[Array, "b t h"], positions, rope, kv=None):
        """Takes and returns what `Attention` does."""
        return qwen3.apply_decoder_layer(self, x, positions, rope, kv)


@counterpart_of(qwen3.Qwen3)
class Qwen3(Layer):
    """A Qwen3 language model.

    `Qwen3(model)` contains the arrays of an Equinox model, converted or not, and copies
    none; `Qwen3.init` makes random ones.

    Attributes:
        embed_tokens: Embedding of the tokens, `[v, h]`.
        layers: The decoder layers.
        norm: Norm of the last layer's output.
        lm_head: Output projection `[v, h]`, None where the embedding serves as such.
        config: Hyperparameters.
    """

    embed_tokens: Embedding
    layers: nnx.List
    norm: RMSNorm
    lm_head: Linear | None
    config: Qwen3Config

    @classmethod
    def init(
        cls, config: Qwen3Config, *, dtype: DTypeLike = jnp.bfloat16, rngs: nnx.Rngs
    ) -> "Qwen3":
        """Makes a model with random parameters.

        Args:
            config: Hyperparameters.
            dtype: Dtype of the parameters, and so of the computation.
            rngs: Its stream `params` seeds the parameters, as the key does in Equinox.
        """
        return cls(qwen3.Qwen3(config, dtype=dtype, key=rngs.params()))

    def init_cache(self, batch_size: int, capacity: int) -> KVCache:
        """Returns an empty cache for `batch_size` rows of up to `capacity` tokens."""
        return qwen3.empty_cache(self, batch_size, capacity)

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        cache: KVCache | None = None,
        *,
        lengths: Int[Array, "b"] | None = None,
        last_only: bool = False,
    ) -> tuple[Float32[Array, "b *t v"], KVCache | None]:
        """Computes the logits of the token that follows each of `tokens`.

        Arguments, result and errors are those of the Equinox model.
        """
        return qwen3.apply_qwen3(
            self, tokens, cache, lengths=lengths, last_only=last_only
        )

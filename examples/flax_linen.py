"""A Linen model on MXFP8 weights: only its parameters are converted."""

import flax.linen as nn
import jax
import jax.numpy as jnp

import jmx8


class Block(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=4, dtype=x.dtype)(y)
        y = nn.Dense(4 * self.features, dtype=x.dtype)(nn.LayerNorm()(x))
        return x + nn.Dense(self.features, dtype=x.dtype)(nn.gelu(y))


class Encoder(nn.Module):
    features: int = 256
    layers: int = 2

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(1000, self.features, dtype=jnp.bfloat16)(tokens)
        for _ in range(self.layers):
            x = Block(self.features)(x)
        return nn.Dense(1000, dtype=x.dtype, name="lm_head")(x)


model = Encoder()
tokens = jnp.arange(32, dtype=jnp.int32).reshape(2, 16)
params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)


@jax.jit
def apply(params, tokens):
    return model.apply({"params": params}, tokens)


expected = apply(params, tokens)

# The whole change. The model, and how it is called, stay what they are.
params, report = jmx8.quantize_params(params, return_report=True)
logits = apply(params, tokens)

print(report.summary())
error = jnp.linalg.norm(logits - expected) / jnp.linalg.norm(expected)
print(f"relative difference of the logits: {error:.3f}")
assert error < 0.1

"""A module of one's own in MXFP8, written without a thought of it."""

import equinox as eqx
import jax
import jax.numpy as jnp

import jmx8


class Block(eqx.Module):
    """Attention whose projections are plain arrays, then an MLP made of layers."""

    w_qkv: jax.Array  # [hidden, 3 * hidden], used as x @ w
    w_out: jax.Array  # [hidden, hidden], used as x @ w.T
    mlp: eqx.nn.MLP
    heads: int = eqx.field(static=True)

    def __init__(self, hidden, heads, *, key):
        k1, k2, k3 = jax.random.split(key, 3)
        self.w_qkv = jax.random.normal(k1, (hidden, 3 * hidden)) / hidden**0.5
        self.w_out = jax.random.normal(k2, (hidden, hidden)) / hidden**0.5
        self.mlp = eqx.nn.MLP(hidden, hidden, 4 * hidden, 1, jax.nn.gelu, key=k3)
        self.heads = heads

    def __call__(self, x):
        q, k, v = jnp.split(x @ self.w_qkv, 3, axis=-1)
        q, k, v = (a.reshape(len(x), self.heads, -1) for a in (q, k, v))
        mixed = jax.nn.dot_product_attention(q[None], k[None], v[None])[0]
        x = x + mixed.reshape(x.shape) @ self.w_out.T
        return x + jax.vmap(self.mlp)(x)


block = Block(256, 8, key=jax.random.key(0))
x = jax.random.normal(jax.random.key(1), (16, 256))
expected = eqx.filter_jit(block)(x)

# Layers are known; of arrays it has to be said which axis a product contracts.
contract = {"w_qkv": -2, "w_out": -1}
converted, report = jmx8.quantize_params(
    block, contract=contract, donate=False, return_report=True
)
print(report)

function = jmx8.quantized(converted)
print(jmx8.explain(function, x))
out = eqx.filter_jit(function)(x)
error = jnp.linalg.norm(out - expected) / jnp.linalg.norm(expected)
print(f"relative difference: {error:.3f}")
assert error < 0.1

# Where all weights are in layers, exchanging those is enough.
mlp = eqx.filter_jit(eqx.filter_vmap(jmx8.quantize_model(block.mlp)))
assert mlp(x).shape == x.shape

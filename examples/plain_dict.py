"""A model that is a function of a dict of arrays, in MXFP8."""

import jax
import jax.numpy as jnp

import jmx8


def init(key, vocab=512, hidden=256, layers=4, experts=8):
    dense = lambda i, *shape: (
        jax.random.normal(jax.random.fold_in(key, i), shape, jnp.bfloat16)
        / (shape[-2] ** 0.5)
    )
    return {
        "embed": dense(0, vocab, hidden) * vocab**0.5,
        # Stacked over layers, for `scan`.
        "up": dense(1, layers, hidden, 4 * hidden),
        "down": dense(2, layers, 4 * hidden, hidden),
        "experts": dense(3, experts, hidden, hidden),
        "router": dense(4, hidden, experts),
    }


def layer(x, weights):
    h = jax.nn.gelu(jnp.einsum("td,df->tf", x, weights["up"]))
    return x + h @ weights["down"], None


def experts(x, params):
    """Sends each token to the expert that scores highest."""
    chosen = jnp.argmax(x @ params["router"], axis=-1)
    order = jnp.argsort(chosen)
    sizes = jnp.bincount(chosen, length=params["router"].shape[-1])
    out = jax.lax.ragged_dot(x[order], params["experts"], sizes)
    return x + jnp.zeros_like(out).at[order].set(out)


def forward(params, tokens):
    x = params["embed"][tokens]
    x, _ = jax.lax.scan(layer, x, {name: params[name] for name in ("up", "down")})
    x = experts(x, params)
    return x @ params["embed"].T


params, tokens = init(jax.random.key(0)), jnp.arange(32) * 7
expected = jax.jit(forward)(params, tokens)

# All are [..., k, n]. "embed" and "router" are kept by their names.
converted, report = jmx8.quantize_params(params, contract=-2, return_report=True)
print(report)

function = jmx8.quantized(forward)
print(jmx8.explain(function, converted, tokens))
logits = jax.jit(function)(converted, tokens)
same = jnp.mean(jnp.argmax(logits, -1) == jnp.argmax(expected, -1))
print(f"the same prediction for {same:.0%} of the tokens")
assert same > 0.9

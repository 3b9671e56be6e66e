"""Equinox's own layers and a user's modules, by `quantize_model` and by `quantized`."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmx8
from jmx8 import dequantize, quantize_model, quantize_params, quantized
from jmx8.nn import MXLinear

from .convert_helpers import assert_same_bytes, converted_paths, is_mx


key = jax.random.key


class Mixer(eqx.Module):
    """A block that multiplies by its weights itself, one stored [k, n], one [n, k]."""

    w_in: Any  # [hidden, heads * width]
    w_out: Any  # [hidden, heads * width]
    scale: jax.Array
    mlp: eqx.nn.MLP
    heads: int = eqx.field(static=True)

    def __init__(self, hidden, heads, width, *, key):
        k1, k2, k3 = jax.random.split(key, 3)
        self.w_in = jax.random.normal(k1, (hidden, heads * width)) / hidden**0.5
        self.w_out = jax.random.normal(k2, (hidden, heads * width)) / hidden**0.5
        self.scale = jnp.ones(hidden)
        self.mlp = eqx.nn.MLP(hidden, hidden, 96, 1, key=k3)
        self.heads = heads

    def __call__(self, x):
        w_in = self.w_in.reshape(self.w_in.shape[0], self.heads, -1)
        h = jax.nn.softmax(jnp.einsum("td,dhk->thk", x, w_in), axis=0)
        x = x + h.reshape(len(h), -1) @ self.w_out.T * self.scale[None]
        return x + jax.vmap(self.mlp)(x)


X = jax.random.normal(key(1), (7, 64))
CONTRACT = {"w_in": -2, "w_out": -1}
# Modules, how they are called on X, and how many weights they have.
MODULES = {
    "Linear": (eqx.nn.Linear(64, 32, key=key(0)), lambda m, x: jax.vmap(m)(x), 1),
    "MLP": (eqx.nn.MLP(64, 8, 96, 2, key=key(0)), lambda m, x: jax.vmap(m)(x), 3),
    "MultiheadAttention": (
        eqx.nn.MultiheadAttention(4, 64, key=key(0)),
        lambda m, x: m(x, x, x, mask=jnp.tril(jnp.ones((7, 7), bool))),
        4,
    ),
    "MultiheadAttention with biases": (
        eqx.nn.MultiheadAttention(
            2,
            64,
            use_query_bias=True,
            use_key_bias=True,
            use_value_bias=True,
            use_output_bias=True,
            key=key(0),
        ),
        lambda m, x: m(x, x + 1, x),
        4,
    ),
    "Mixer": (Mixer(64, 4, 16, key=key(0)), lambda m, x: m(x), 4),
}


def widen(tree):
    """Returns the module with the values of its MXFP8 weights in ordinary arrays."""
    return jax.tree.map(lambda a: dequantize(a) if is_mx(a) else a, tree, is_leaf=is_mx)


def ops(function, *args):
    """Returns the names of the ops that are called, one for each call."""
    choices = jmx8.explain(function, *args).choices
    return [c.op.split("(")[0] for c, count in choices.items() for _ in range(count)]


@pytest.mark.parametrize("name", MODULES)
def test_quantized(name):
    module, call, num_weights = MODULES[name]
    contract = CONTRACT if name == "Mixer" else None
    converted = quantize_params(module, contract=contract, donate=False)
    assert len(converted_paths(converted)) == num_weights
    function = quantized(call, activations="bf16")
    out = eqx.filter_jit(function)(converted, X)
    # The same function of the same values: only sums are in another order.
    expected = eqx.filter_jit(call)(widen(converted), X)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    assert ops(function, converted, X) == ["mx_matmul"] * num_weights
    w8a8 = quantized(call, activations="mxfp8")
    assert ops(w8a8, converted, X) == ["mx_matmul_w8a8"] * num_weights


@pytest.mark.parametrize("name", MODULES)
def test_quantize_model(name):
    module, call, num_weights = MODULES[name]
    num_layers = num_weights - 2 * (name == "Mixer")
    converted = quantize_model(module, activations="bf16", donate=False)
    is_linear = lambda node: isinstance(node, MXLinear)
    layers = [*filter(is_linear, jax.tree.leaves(converted, is_leaf=is_linear))]
    assert len(layers) == num_layers
    out = eqx.filter_jit(call)(converted, X)
    # A module's own weights are left alone.
    skip = [*CONTRACT] if name == "Mixer" else None
    values = widen(quantize_params(module, skip=skip, donate=False))
    expected = eqx.filter_jit(call)(values, X)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    assert ops(call, converted, X) == ["mx_matmul"] * num_layers


def test_both_at_once():
    """The layers of a module by `quantize_model`, its own weights by `quantized`."""
    module, call, num_weights = MODULES["Mixer"]
    converted = quantize_model(module, activations="bf16", donate=False)
    only = [*CONTRACT]
    converted = quantize_params(converted, only=only, contract=CONTRACT, donate=False)
    function = quantized(call, activations="bf16")
    assert ops(function, converted, X) == ["mx_matmul"] * num_weights
    whole = quantize_params(module, contract=CONTRACT, donate=False)
    np.testing.assert_allclose(
        eqx.filter_jit(function)(converted, X),
        eqx.filter_jit(call)(widen(whole), X),
        rtol=1e-5,
        atol=1e-5,
    )


def test_a_module_itself_is_a_function():
    converted = quantize_params(MODULES["Mixer"][0], contract=CONTRACT, donate=False)
    function = quantized(converted, activations="bf16")
    out = eqx.filter_jit(function)(X)
    by_argument = eqx.filter_jit(quantized(lambda m, x: m(x), activations="bf16"))
    assert_same_bytes(out, by_argument(converted, X))
    # Its weights are arguments of the compiled function, not constants in it.
    arrays, static = eqx.partition(function, eqx.is_array)
    run = lambda arrays, x: eqx.combine(arrays, static)(x)
    assert len(jax.make_jaxpr(run)(arrays, X).consts) == 0


def test_gradient_reaches_activations_and_ordinary_arrays():
    converted = quantize_params(MODULES["Mixer"][0], contract=CONTRACT, donate=False)

    def loss(function):
        return lambda x, scale, module: jnp.sum(
            function(eqx.tree_at(lambda m: m.scale, module, scale), x) ** 2
        )

    call = lambda m, x: m(x)
    grads = jax.grad(loss(quantized(call, activations="bf16")), (0, 1))
    expected = jax.grad(loss(call), (0, 1))
    args = X, converted.scale
    for a, b in zip(
        jax.jit(lambda *args: grads(*args, converted))(*args),
        jax.jit(lambda *args: expected(*args, widen(converted)))(*args),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_a_linear_layer_takes_an_mxarray_as_it_is():
    linear = MODULES["Linear"][0]
    converted = quantize_params(linear, donate=False)
    out = jax.jit(jax.vmap(converted))(X)
    np.testing.assert_allclose(out, jax.vmap(widen(converted))(X), rtol=1e-5, atol=1e-5)

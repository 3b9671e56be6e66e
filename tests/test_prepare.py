"""Layers on weights that are laid out for Blackwell, FlashInfer's kernels emulated."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmx8
from jmx8 import canonical, explain, mx_matmul_w8a8, mx_moe_w8a8, prepare, quantize
from jmx8.kernels._prepared import PreparedWeights
from jmx8.nn import Experts, MXExperts, MXLinear, with_activations

from .helpers import assert_bits_equal


pytest.importorskip("jax_tvm_ffi")

from . import emulated_flashinfer


pytestmark = pytest.mark.cpu


@pytest.fixture
def blackwell(monkeypatch):
    emulated_flashinfer.use(monkeypatch)


key = jax.random.key
normal = lambda seed, *shape, dtype=jnp.bfloat16: jax.random.normal(
    key(seed), shape, dtype
)


def make_linear(n=40, k=70, **kwargs):
    return MXLinear(k, n, dtype=jnp.bfloat16, key=key(0), **kwargs)


def make_experts(
    activation: Any = "silu", *, num_experts=5, h=96, i=40, use_bias=False
):
    experts = Experts.init(
        num_experts,
        h,
        i,
        activation=activation,
        use_bias=use_bias,
        dtype=jnp.bfloat16,
        key=key(0),
    )
    if use_bias:
        biases = jax.tree.map(
            lambda b: normal(0, *b.shape), (experts.w13_bias, experts.w2_bias)
        )
        experts = dataclasses.replace(experts, w13_bias=biases[0], w2_bias=biases[1])
    return MXExperts.from_experts(experts)


def implementations(function, *args):
    return [c.implementation for c in explain(function, *args).choices]


def assert_close(out, expected):
    """Sums in another order may round to the next value; nothing else may differ."""
    out, expected = (np.asarray(a, np.float64) for a in (out, expected))
    ulp = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(expected), 2.0**-9))) - 7)
    assert np.all(np.abs(out - expected) <= 2 * ulp)
    assert np.sum(out != expected) <= 0.1 * out.size


@pytest.mark.parametrize("n, k", [(40, 70), (130, 128), (128, 416)])
@pytest.mark.parametrize("batch", [(), (3,), (2, 5), (0,), (130,)])
def test_linear(blackwell, n, k, batch):
    linear = make_linear(n, k)
    prepared = prepare(linear)
    assert isinstance(prepared.weight, PreparedWeights)
    x = normal(1, *batch, k)
    assert implementations(prepared, x) == ["flashinfer_cutlass"]
    reference = mx_matmul_w8a8(x, linear.weight, implementation="xla")
    assert linear.bias is not None
    expected = reference + linear.bias.reshape((1,) * len(batch) + (n,))
    assert_close(eqx.filter_jit(prepared)(x), expected)


def test_vmapped_linear_is_one_call(blackwell):
    linear = make_linear()
    prepared, x = prepare(linear), normal(1, 6, 70)
    function = jax.jit(jax.vmap(lambda x: prepared(x)))
    assert function.lower(x).as_text().count("custom_call @jmx8.flashinfer.mxfp8_") == 2
    assert_close(function(x), linear(x))


def test_gradient_is_that_of_the_unquantized_activations(blackwell):
    linear, x = make_linear(), normal(1, 6, 70)
    loss = lambda layer: lambda x: jnp.sum(layer(x).astype(jnp.float32) ** 2)
    out = jax.jit(jax.grad(loss(prepare(linear))))(x)
    expected = jax.jit(jax.grad(loss(linear)))(x)
    error = np.linalg.norm(np.asarray(out - expected, np.float64))
    assert error <= 2**-6 * np.linalg.norm(np.asarray(expected, np.float64))


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("activation", ["silu", "relu2", "swigluoai"])
def test_experts(blackwell, activation, use_bias):
    experts = make_experts(activation, use_bias=use_bias)
    prepared = prepare(experts)
    x = normal(1, 2, 3, 96)
    ids, weights = jmx8.route(normal(2, 2, 3, 5), "softmax", 2)
    ids = ids.at[0, 0, 0].set(-1).at[1, 1, 1].set(7)  # not here
    assert implementations(prepared, x, ids, weights) == ["flashinfer_cutlass"]
    expected = mx_moe_w8a8(
        x,
        experts.w13,
        experts.w2,
        ids,
        weights,
        activation=activation,
        w13_bias=experts.w13_bias,
        w2_bias=experts.w2_bias,
        implementation="xla",
    )
    out = eqx.filter_jit(prepared)(x, ids, weights)
    assert_close(out, expected)


@pytest.mark.parametrize("activation", ["silu", "relu2"])
def test_canonical_weights_come_back_bit_for_bit(blackwell, activation):
    model = {
        "linear": make_linear(),
        "experts": make_experts(activation, use_bias=True),
        "other": jnp.ones(3),
        "plain": quantize(normal(0, 32, 64)),
    }
    prepared = prepare(model)
    assert isinstance(prepared["plain"], jmx8.MXArray)
    kinds = [
        type(a) for a in jax.tree.leaves(prepared, is_leaf=lambda a: a is not prepared)
    ]
    assert PreparedWeights not in kinds
    restored = canonical(prepared)
    assert jax.tree.structure(restored) == jax.tree.structure(model)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(model), strict=True):
        assert a.dtype == b.dtype
        assert_bits_equal(a, b)
    again = prepare(prepared)
    assert eqx.tree_equal(again, prepared)
    abstract = jax.eval_shape(prepare, model)
    assert jax.tree.structure(abstract) == jax.tree.structure(prepared)


def test_nothing_is_laid_out_in_a_forward_pass(blackwell):
    linear, experts = (
        prepare(make_linear(256, 128)),
        prepare(make_experts(i=128, h=128)),
    )
    ids, weights = jnp.zeros((4, 2), jnp.int32), jnp.ones((4, 2))

    def forward(linear, experts, x):
        return experts(x, ids, weights), linear(x)

    x = normal(1, 4, 128)
    text = jax.jit(forward).lower(linear, experts, x).as_text()
    main = text[text.index("@main") :]
    weights = [a.shape for a in jax.tree.leaves((linear, experts)) if a.itemsize == 1]
    words = [a.shape for a in jax.tree.leaves(experts) if a.dtype == jnp.int32]
    shapes = ["x".join(map(str, s)) + "xf8E4M3FN" for s in weights if len(s) > 1]
    shapes += ["x".join(map(str, s)) + "xi32" for s in words]
    assert len(shapes) == 5
    for line in main.splitlines():
        # Weights go from the arguments to the kernels, and through nothing else.
        if any(shape in line for shape in shapes):
            assert "@main" in line or "custom_call @jmx8.flashinfer" in line, line


def test_other_devices_and_activations_keep_canonical_weights(monkeypatch):
    linear = make_linear()
    assert eqx.tree_equal(prepare(linear), linear)
    emulated_flashinfer.use(monkeypatch, (9, 0))
    assert isinstance(prepare(linear).weight, jmx8.MXArray)
    emulated_flashinfer.use(monkeypatch)
    assert isinstance(prepare(make_linear(activations="bf16")).weight, jmx8.MXArray)
    assert isinstance(prepare(linear, dtype=jnp.float32).weight, jmx8.MXArray)


def test_weights_that_are_laid_out_still_run_everywhere(blackwell):
    linear, x = make_linear(), normal(1, 6, 70)
    prepared = prepare(linear)
    out = mx_matmul_w8a8(x, prepared.weight, implementation="xla")
    assert_bits_equal(out, mx_matmul_w8a8(x, linear.weight, implementation="xla"))
    w8a16 = with_activations(prepared, "bf16")
    assert isinstance(w8a16.weight, jmx8.MXArray)
    assert_bits_equal(w8a16(x), with_activations(linear, "bf16")(x))
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), prepared.weight)
    function = jax.vmap(mx_matmul_w8a8)
    assert implementations(function, jnp.stack([x, x]), stacked) == ["xla"]


def test_canonical_weights_are_passed_over_with_the_remedy(blackwell):
    linear, x = make_linear(), normal(1, 6, 70)
    (choice,) = explain(linear, x).choices
    assert choice.implementation == "xla"
    assert "`jmx8.prepare` must lay out the weights" in str(choice)


def test_loaded_model_is_laid_out(blackwell):
    from jmx8.data import TINY_QWEN3_MOE

    model = jmx8.load(TINY_QWEN3_MOE)
    leaves = jax.tree.leaves(model, is_leaf=lambda a: isinstance(a, PreparedWeights))
    assert sum(isinstance(a, PreparedWeights) for a in leaves) > 4
    tokens = jnp.arange(6)[None]
    assert set(implementations(model, tokens)) == {"flashinfer_cutlass", "xla"}
    out, _ = jax.jit(lambda model, t: model(t))(model, tokens)
    expected, _ = jax.jit(lambda model, t: model(t))(canonical(model), tokens)
    assert float(jnp.max(jnp.abs(out - expected))) < 0.1


@pytest.mark.parametrize("implementation", [None, "flashinfer_trtllm"])
def test_nnx_model_is_laid_out_as_that_of_equinox(blackwell, implementation):
    nnx = pytest.importorskip("flax.nnx")
    from jmx8.data import TINY_QWEN3_MOE
    from jmx8.models import qwen3_nnx

    loaded = jmx8.load(TINY_QWEN3_MOE)
    plain = canonical(loaded)
    model = prepare(qwen3_nnx.Qwen3(plain), implementation=implementation)
    expected = prepare(plain, implementation=implementation)
    assert isinstance(model, qwen3_nnx.Qwen3)
    state = lambda model: nnx.to_flat_state(nnx.state(model))
    assert_same_state = lambda a, b: jax.tree.map(assert_bits_equal, a, b)
    assert_same_state(state(model), state(qwen3_nnx.Qwen3(expected)))
    contents = [variable.get_value() for _, variable in state(model)]
    layouts = {w.layout.name for w in contents if isinstance(w, PreparedWeights)}
    assert len(layouts) > 1
    assert_same_state(state(canonical(model)), state(qwen3_nnx.Qwen3(plain)))
    if implementation is None:
        assert_same_state(
            state(jmx8.load(TINY_QWEN3_MOE, framework="nnx")), state(model)
        )
        tokens = jnp.arange(6)[None]
        out = jax.jit(lambda model, t: model(t)[0])
        assert_bits_equal(out(model, tokens), out(expected, tokens))

"""`route` and `SparseMoE` against Hugging Face, for every family, in float32."""

import dataclasses
import operator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import GptOssConfig

from jmx8 import canonical, dequantize, route, SwiGLUOAI
from jmx8.nn import _moe, Experts, MXExperts
from tests.hf_moe import (
    correction_bias,
    FAMILIES,
    hf_forward,
    hf_route,
    HIDDEN_SIZE,
    sparse_moe,
)


# Families that differ in what the gradient passes through.
GRADIENT_FAMILIES = ("qwen3_next", "deepseek_v3", "deepseek_v4", "gpt_oss", "llama4")

# The others, with marks. transformers before 5.19 has this one's alpha as a constant.
NEEDS_ALPHA = pytest.mark.skipif(
    not hasattr(GptOssConfig, "swiglu_alpha"),
    reason="GptOssConfig of transformers before 5.19 has no swiglu_alpha",
)
FORWARD_FAMILIES = [
    pytest.param(f, marks=NEEDS_ALPHA if f == "gpt_oss_other_parameters" else ())
    for f in FAMILIES
    if f not in GRADIENT_FAMILIES
]

# Of the output's range. Sums of about a hundred float32 products in another order.
TOLERANCE = 2e-6


def _tokens(seed=0):
    return torch.randn(
        2, 13, HIDDEN_SIZE, generator=torch.Generator().manual_seed(seed)
    )


def _run(function, *args):
    """Runs a function of pytrees under jit; unoptimized, as compiling is most of it."""
    arrays, static = eqx.partition(args, eqx.is_array)
    jitted = jax.jit(
        lambda arrays: function(*eqx.combine(arrays, static)),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    return jitted(arrays)


def _error(actual, expected):
    expected = np.asarray(expected)
    assert actual.shape == expected.shape
    return np.max(np.abs(np.asarray(actual) - expected)) / np.ptp(expected)


def _forward(layer, x):
    return _run(lambda layer, x: layer(x), layer, jnp.asarray(x.detach().numpy()))


def _dense(ids, weights, num_experts):
    """Returns the weights as `[t, e]`, NaN for experts that were not chosen."""
    dense = np.full((len(ids), num_experts), np.nan, np.float32)
    np.put_along_axis(dense, np.asarray(ids), np.asarray(weights), axis=-1)
    return dense


@pytest.mark.parametrize("name", FAMILIES)
def test_routing_is_that_of_hugging_face(name):
    logits, ids, weights = hf_route(name, _tokens().reshape(-1, HIDDEN_SIZE))
    actual = route(
        jnp.asarray(logits),
        **FAMILIES[name].routing,
        correction_bias=correction_bias(name),
    )
    num_experts = logits.shape[1]
    # Hugging Face does not sort, so experts are compared as sets.
    np.testing.assert_allclose(
        _dense(*actual, num_experts), _dense(ids, weights, num_experts), rtol=2e-6
    )


@pytest.mark.parametrize(
    "change",
    [
        {"correction_bias": None},
        {"correction_bias": "negated"},
        {"num_groups": 1, "topk_groups": 1},
        {"topk_groups": 3},
        {"renormalize": False},
        {"scaling_factor": 1.0},
        {"method": "softmax"},
        {"method": "sqrtsoftplus"},
    ],
    ids=str,
)
def test_every_option_of_deepseek_v3_is_needed(change):
    """The comparison with Hugging Face would notice a rule that leaves one out."""
    name = "deepseek_v3"
    bias = correction_bias(name)
    assert bias is not None
    if change.get("correction_bias") == "negated":
        change = {"correction_bias": -bias}
    logits, ids, weights = hf_route(name, _tokens().reshape(-1, HIDDEN_SIZE))
    options: dict[str, Any] = {**FAMILIES[name].routing, "correction_bias": bias}
    options.update(change)
    actual = route(jnp.asarray(logits), **options)
    num_experts = logits.shape[1]
    assert not np.allclose(
        _dense(*actual, num_experts), _dense(ids, weights, num_experts), equal_nan=True
    )


@pytest.mark.parametrize("name", FORWARD_FAMILIES)
def test_layer_is_that_of_hugging_face(name):
    x = _tokens()
    with torch.no_grad():
        expected = hf_forward(name, x)
    assert _error(_forward(sparse_moe(name), x), expected) <= TOLERANCE


@pytest.mark.parametrize("name", GRADIENT_FAMILIES)
def test_layer_and_its_gradient_are_those_of_hugging_face(name):
    x, cotangent = _tokens().requires_grad_(), _tokens(seed=1)
    expected = hf_forward(name, x)
    (expected_gradient,) = torch.autograd.grad(expected, x, cotangent)

    def forward_and_gradient(layer, x, cotangent):
        out, vjp = jax.vjp(layer, x)
        return out, *vjp(cotangent)

    out, gradient = _run(
        forward_and_gradient,
        sparse_moe(name),
        jnp.asarray(x.detach().numpy()),
        jnp.asarray(cotangent.numpy()),
    )
    assert _error(out, expected.detach()) <= TOLERANCE
    assert _error(gradient, expected_gradient) <= 10 * TOLERANCE


def _without(*fields):
    def change(layer):
        for field in fields:
            layer = eqx.tree_at(operator.attrgetter(field), layer, None)
        return layer

    return change


def _with_experts(**fields):
    def change(layer):
        experts = dataclasses.replace(layer.experts, **fields)
        return dataclasses.replace(layer, experts=experts)

    return change


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("qwen3_next", _without("shared_expert_gate")),
        ("glm4_moe", _without("shared_expert")),
        ("gpt_oss", _without("gate.bias")),
        ("gpt_oss", _without("experts.w13_bias")),
        ("gpt_oss", _without("experts.w2_bias")),
        ("gpt_oss", _with_experts(activation=SwiGLUOAI(limit=None))),
        ("llama4", _with_experts(apply_router_weight_on_input=False)),
    ],
)
def test_every_part_of_a_layer_is_needed(name, change):
    """The comparison with Hugging Face would notice a layer that leaves one out."""
    x = _tokens()
    with torch.no_grad():
        expected = hf_forward(name, x)
    assert _error(_forward(change(sparse_moe(name)), x), expected) > 1e-3


@pytest.mark.parametrize("name", ["gpt_oss_other_parameters", "nemotron_h"])
def test_converted_experts_compute_with_the_values_that_they_store(name):
    """Biases, clamps and missing gates; K = 24 is padded."""
    layer = sparse_moe(name)
    assert isinstance(layer.experts, Experts)
    converted = MXExperts.from_experts(layer.experts, activations="bf16")
    values = [dequantize(canonical(w)) for w in (converted.w13, converted.w2)]
    stored = _with_experts(w13=values[0], w2=values[1])(layer)
    expected = _forward(stored, _tokens())
    actual = _forward(dataclasses.replace(layer, experts=converted), _tokens())
    assert _error(actual, expected) <= TOLERANCE


def test_rows_that_relu2_makes_zero_stay_zero_when_quantized():
    """Blocks of zeros are what most tokens of Nemotron-H give."""
    w13 = -jnp.ones((4, 64, 32))
    w2 = jax.random.normal(jax.random.key(0), (4, 32, 64))
    experts = MXExperts.from_experts(
        Experts(w13, w2, activation="relu2"), activations="mxfp8"
    )
    x = jnp.ones((5, 32), jnp.bfloat16).at[0].set(-1)
    ids = jnp.asarray([[e % 4, (e + 1) % 4] for e in range(5)])
    out = _run(lambda experts, *args: experts(*args), experts, x, ids, jnp.ones((5, 2)))
    assert jnp.isfinite(out).all()
    assert jnp.any(out[0] != 0)
    assert (out[1:] == 0).all()


def test_layer_takes_any_leading_axes_and_vmap():
    layer = sparse_moe("deepseek_v3_unnormalized_two_shared")
    x = jnp.asarray(_tokens().numpy())

    def run(x, layer):
        return layer(x)

    expected = _run(run, x, layer)
    flat = _run(run, x.reshape(1, 26, 1, -1), layer)
    np.testing.assert_array_equal(flat, expected.reshape(flat.shape))
    assert _run(run, x[:, :0], layer).shape == (2, 0, HIDDEN_SIZE)
    assert _error(_run(run, x[0, 0], layer), expected[0, 0]) <= TOLERANCE
    per_row = eqx.filter_vmap(run, in_axes=(0, None))
    assert eqx.filter_eval_shape(per_row, x[:, :0], layer).shape == (2, 0, HIDDEN_SIZE)
    assert _error(_run(per_row, x, layer), expected) <= TOLERANCE


@pytest.mark.parametrize("gate_dtype", [jnp.bfloat16, jnp.float32])
def test_router_logits_of_bfloat16_tokens_are_float32(gate_dtype, monkeypatch):
    """As in DeepSeek-V3, GLM-4.5, MiniMax and Nemotron-H, which round neither."""
    layer = sparse_moe("mixtral")
    gate = jax.tree.map(lambda w: w.astype(gate_dtype), layer.gate)
    layer = dataclasses.replace(layer, gate=gate)
    x = jax.random.normal(jax.random.key(0), (6, HIDDEN_SIZE), jnp.bfloat16)
    routed = []

    def spy(logits, *args, **kwargs):
        routed.append(logits)
        return route(logits, *args, **kwargs)

    monkeypatch.setattr(_moe, "route", spy)
    out, logits = _run(lambda layer, x: (layer(x), *routed), layer, x)
    assert out.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    x, weight = np.asarray(x, np.float64), np.asarray(gate.weight, np.float64)
    bound = 2**-20 * (np.abs(x) @ np.abs(weight).T)
    assert (np.abs(logits - x @ weight.T) <= bound).all()

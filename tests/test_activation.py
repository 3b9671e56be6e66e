"""The activations against transformers, and against their formulas in float64."""

import dataclasses
import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import torch
from transformers.activations import ACT2FN
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLExperts

from jmx8 import SwiGLUOAI
from jmx8.ops.moe import apply_activation, is_gated


# name in transformers
HF_NAMES = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
EPS = np.finfo(np.float32).eps
PARAMETERS = [
    SwiGLUOAI(),
    SwiGLUOAI(limit=None),
    SwiGLUOAI(alpha=1.0, beta=0.0, limit=10.0),
    SwiGLUOAI(alpha=1.3, beta=0.5, limit=2.0),
    SwiGLUOAI(alpha=-0.7, beta=-1.0, limit=0.5),
]

apply = jax.jit(apply_activation, static_argnames="activation")


@pytest.fixture
def without_type_checks(monkeypatch):
    """As for a user, who has no import hook that refuses bad arguments earlier."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def _inputs(shape=(40, 96), scale=4.0, seed=0):
    x = np.random.default_rng(seed).normal(scale=scale, size=shape)
    # Values where a branch changes, and the ends of the tails.
    x.reshape(-1)[:12] = [0, -0.0, 1, -1, 7, -7, 7.5, -7.5, 60, -60, 1e-6, -1e-6]
    return x.astype(np.float32)


def _float32(rows):
    return np.asarray(rows, np.float32)


def _sigmoid(x):
    # Of a sign that cannot overflow.
    return np.where(x < 0, np.exp(np.minimum(x, 0)), 1) / (1 + np.exp(-np.abs(x)))


_ERF = np.vectorize(math.erf)
FORMULAS = {
    "silu": lambda g: g * _sigmoid(g),
    "gelu": lambda g: g * 0.5 * (1 + _ERF(g / math.sqrt(2))),
    "gelu_tanh": lambda g: (
        g * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)))
    ),
}


def _swigluoai(x, parameters):
    """The formula in float64, and its magnitude for an error bound."""
    gate, up = np.split(np.float64(x), 2, axis=-1)
    if parameters.limit is not None:
        gate = np.where(gate > parameters.limit, parameters.limit, gate)
        up = np.maximum(np.minimum(up, parameters.limit), -parameters.limit)
    out = gate * _sigmoid(parameters.alpha * gate) * (up + parameters.beta)
    return out, np.abs(gate) * (np.abs(up) + abs(parameters.beta))


# The rule


@pytest.mark.parametrize("activation", HF_NAMES)
def test_gated_activation_is_its_formula(activation):
    x = _inputs()
    gate, up = np.split(np.float64(x), 2, axis=-1)
    error = np.abs(apply(x, activation) - FORMULAS[activation](gate) * up)
    # A factor between 0 and 1 that is off by a few units of float32, times gate and up.
    assert (error <= 4 * EPS * np.abs(gate * up)).all()


@pytest.mark.parametrize("activation", HF_NAMES)
def test_gated_activation_is_that_of_transformers(activation):
    x = _inputs()
    gate, up = torch.tensor(x).chunk(2, dim=-1)
    expected = ACT2FN[HF_NAMES[activation]](gate) * up
    bound = 4 * EPS * (gate * up).abs().numpy()
    assert (np.abs(apply(x, activation) - expected.numpy()) <= bound).all()


def test_relu2_is_that_of_transformers_to_the_bit_and_has_no_gate():
    x = _inputs()
    actual = apply(x, "relu2")
    np.testing.assert_array_equal(actual, ACT2FN["relu2"](torch.tensor(x)).numpy())
    np.testing.assert_array_equal(actual, np.where(x > 0, x * x, 0))


@pytest.mark.parametrize("parameters", PARAMETERS, ids=str)
def test_swigluoai_is_its_formula(parameters):
    x = _inputs()
    expected, magnitude = _swigluoai(x, parameters)
    assert (np.abs(apply(x, parameters) - expected) <= 4 * EPS * magnitude).all()


@pytest.mark.parametrize(
    ("experts", "parameters"),
    [
        (GptOssExperts, SwiGLUOAI()),
        (GptOssExperts, SwiGLUOAI(alpha=1.1, limit=2.0)),
        (MiniMaxM3VLExperts, SwiGLUOAI(alpha=1.3, limit=3.0)),
        (DeepseekV4Experts, SwiGLUOAI(alpha=1.0, beta=0.0, limit=10.0)),
        (DeepseekV4Experts, SwiGLUOAI(alpha=1.0, beta=0.0, limit=1.5)),
    ],
    ids=str,
)
def test_swigluoai_is_that_of_transformers(experts, parameters):
    x = _inputs()
    module = SimpleNamespace(
        alpha=parameters.alpha,
        swiglu_alpha=parameters.alpha,
        limit=parameters.limit,
        swiglu_limit=parameters.limit,
        act_fn=ACT2FN["silu"],
    )
    gate_up = torch.tensor(x)
    if experts is GptOssExperts:  # gate and up alternate
        gate_up = torch.stack(gate_up.chunk(2, dim=-1), dim=-1).flatten(-2)
    expected = experts._apply_gate(module, gate_up).numpy()
    bound = 4 * EPS * _swigluoai(x, parameters)[1]
    assert (np.abs(apply(x, parameters) - expected) <= bound).all()


def test_swigluoai_by_name_has_the_parameters_of_gpt_oss():
    x = _inputs()
    assert SwiGLUOAI() == SwiGLUOAI(alpha=1.702, beta=1.0, limit=7.0)
    np.testing.assert_array_equal(apply(x, "swigluoai"), apply(x, SwiGLUOAI()))


def test_swigluoai_clamps_gate_from_above_only_and_up_on_both_sides():
    parameters = SwiGLUOAI(alpha=1.0, beta=0.0, limit=2.0)
    x = _float32([[5, 5, -5, -5, 5, -5]])  # three gates, three ups
    expected = [[2 * 0.8807971 * -2, 2 * 0.8807971 * 2, -5 * 0.0066928509 * -2]]
    np.testing.assert_allclose(apply(x, parameters), expected, rtol=1e-6)


def test_gate_comes_before_up():
    x = _float32([[30, 20, 5, 7]])
    for activation in HF_NAMES:
        np.testing.assert_array_equal(apply(x, activation), [[150, 140]])
    swapped = _float32([[5, 7, -30, 0]])
    np.testing.assert_allclose(apply(swapped, "silu"), [[-148.99607, 0]], rtol=1e-6)


# Transformations and types


@pytest.mark.parametrize("activation", [*HF_NAMES, "relu2", *PARAMETERS], ids=str)
def test_gradient_is_that_of_pytorch(activation):
    x, cotangent = _inputs(scale=2.0), _inputs(seed=1)
    width = x.shape[-1] if activation == "relu2" else x.shape[-1] // 2
    cotangent = cotangent[:, :width]
    actual = jax.vjp(lambda x: apply(x, activation), x)[1](jnp.asarray(cotangent))[0]

    z = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    gate, up = z.chunk(2, dim=-1)
    if activation == "relu2":
        out = torch.relu(z) ** 2
    elif isinstance(activation, str):
        out = ACT2FN[HF_NAMES[activation]](gate) * up
    else:
        gate = gate.clamp(max=activation.limit) if activation.limit else gate
        limit = activation.limit or torch.inf
        up = up.clamp(-limit, limit)
        out = gate * torch.sigmoid(activation.alpha * gate) * (up + activation.beta)
    (expected,) = torch.autograd.grad(out, z, torch.tensor(cotangent).double())
    # At the very bound of a clamp a subgradient may be chosen.
    limit = getattr(activation, "limit", None)
    inside = np.ones(x.shape, bool) if limit is None else np.abs(x) != limit
    np.testing.assert_allclose(
        np.where(inside, actual, 0), np.where(inside, expected, 0), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("activation", [*HF_NAMES, "relu2", "swigluoai"])
def test_dtype_is_kept_and_leading_axes_are_free(activation, dtype):
    x = jnp.asarray(_inputs((2, 3, 8), scale=1.0).clip(-4, 4), dtype)
    out = apply(x, activation)
    assert out.dtype == dtype
    assert out.shape == (2, 3, 8 if activation == "relu2" else 4)
    expected = apply(x.astype(jnp.float32), activation)
    # A handful of roundings, of values up to 25.
    error = jnp.abs(out.astype(jnp.float32) - expected)
    assert jnp.max(error) <= 4 * float(jnp.finfo(dtype).eps) * 25
    for i in range(2):
        np.testing.assert_array_equal(apply(x[i], activation), out[i])
    assert apply(x[:, :0], activation).shape == (2, 0, out.shape[-1])


@pytest.mark.parametrize("activation", [*HF_NAMES, "relu2", "swigluoai"])
def test_large_inputs_do_not_overflow_inside_and_nan_stays(activation):
    x = _float32([[1e18, -1e18, 3.0, 0.0, 1e18, 1e18, np.nan, 0.0]])
    out = np.asarray(apply(x, activation))[0]
    nan = [6] if activation == "relu2" else [2]
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(out)), nan)
    assert np.isfinite(np.delete(out, nan)).all()


def test_parameters_are_hashable_and_do_not_change():
    """They are static under jit, so equal ones must not compile again."""
    assert hash(SwiGLUOAI(limit=None)) == hash(SwiGLUOAI(limit=None))
    with pytest.raises(dataclasses.FrozenInstanceError):
        SwiGLUOAI().alpha = 2.0  # pyright: ignore[reportAttributeAccessIssue]


def test_only_relu2_has_no_gate():
    for activation in ("silu", "gelu", "gelu_tanh", "swigluoai", SwiGLUOAI(limit=None)):
        assert is_gated(activation)
    assert not is_gated("relu2")


@pytest.mark.parametrize("unknown", ["relu", "SiLU", "swiglu", "", None])
def test_unknown_activation_is_named(unknown, without_type_checks):
    message = (
        "activation: expected one of ['silu', 'gelu', 'gelu_tanh', 'swigluoai', "
        f"'relu2'] or a SwiGLUOAI, got {unknown!r}."
    )
    for function in (is_gated, lambda a: apply_activation(jnp.zeros((2, 4)), a)):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            function(unknown)

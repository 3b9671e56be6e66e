"""Where the W8A8 models of FlashInfer's two MoE kernels round, bit for bit.

Weights are small integers and every scale a power of two, so that float32 holds every
sum exactly, in whatever order: what differs is what was rounded on the way. The models
here are written anew, in float64.
"""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jmx8 import dequantize, mx_matmul_w8a8, mx_moe_w8a8, quantize, SwiGLUOAI
from jmx8.kernels import xla_moe

from .helpers import assert_bits_equal, model_quantize


E, H, I, T, K = 4, 64, 64, 12, 3

# A gate of one half for every input: exact, unlike any sigmoid of something else.
HALF_GATED = SwiGLUOAI(alpha=0.0, beta=0.25, limit=None)


def half_gated(h):
    gate, up = np.split(h, 2, axis=-1)
    return gate * 0.5 * (up + 0.25)


def relu2(h):
    return np.maximum(h, 0) ** 2


CASES = {"gated": (HALF_GATED, half_gated, 2 * I), "relu2": ("relu2", relu2, I)}


@dataclasses.dataclass(frozen=True)
class Rounding:
    """Which values a kernel rounds to the dtype of the layer."""

    product1: bool
    bias1: bool
    activation: bool
    product2: bool
    bias2: bool
    sum2: bool


CUTLASS = Rounding(
    product1=True, bias1=True, activation=True, product2=True, bias2=True, sum2=False
)
TRTLLM = Rounding(
    product1=False,
    bias1=False,
    activation=False,
    product2=False,
    bias2=False,
    sum2=True,
)
ROUNDINGS = {"cutlass": CUTLASS, "trtllm": TRTLLM}


def to_bf16(values):
    return np.asarray(values).astype(np.float32).astype(ml_dtypes.bfloat16)


def through_mxfp8(values):
    codes, scales = model_quantize(values)
    elements = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    return elements * np.repeat(2.0 ** (scales.astype(np.float64) - 127), 32, axis=-1)


def integers(rng, low, high, *shape):
    return rng.integers(low, high, shape, endpoint=True).astype(np.float64)


def make_operands(rows, *, bias_dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    # 7 significant bits: quantizing them rounds.
    x = integers(rng, -100, 100, T, H) / 16
    w13, w2 = integers(rng, -3, 3, E, rows, H) / 8, integers(rng, -3, 3, E, H, I) / 8
    ids = rng.permuted(np.tile(np.arange(-1, E), (T, 1)), axis=1)[:, :K]
    weights = integers(rng, 1, 15, T, K) / 32
    # Finer than bfloat16 resolves: added to it, or rounded to it, they matter.
    b13, b2 = (integers(rng, -1000, 1000, E, n) / 256 for n in (rows, H))
    return (
        jnp.asarray(x, jnp.bfloat16),
        quantize(jnp.asarray(w13, jnp.bfloat16)),
        quantize(jnp.asarray(w2, jnp.bfloat16)),
        jnp.asarray(ids, jnp.int32),
        jnp.asarray(weights, jnp.float32),
        jnp.asarray(b13, bias_dtype),
        jnp.asarray(b2, bias_dtype),
    )


def model(operands, act, rounding, *, biases):
    """The layer as a loop over tokens; exact but for the roundings asked for."""
    f64 = lambda a: np.asarray(a).astype(np.float64)
    x, ids, weights, b13, b2 = (f64(operands[i]) for i in (0, 3, 4, 5, 6))
    w13, w2 = (f64(dequantize(w)) for w in operands[1:3])
    maybe = lambda asked, a: f64(to_bf16(a)) if asked else a
    if not biases:
        b13, b2 = np.zeros_like(b13), np.zeros_like(b2)
    x = through_mxfp8(x)
    out = np.zeros_like(x)
    for t, chosen in enumerate(ids.astype(int)):
        for e, weight in zip(chosen, weights[t], strict=True):
            if e < 0:
                continue
            h = maybe(rounding.product1, w13[e] @ x[t]) + maybe(rounding.bias1, b13[e])
            h = through_mxfp8(maybe(rounding.activation, act(h)))
            y = maybe(rounding.product2, w2[e] @ h) + maybe(rounding.bias2, b2[e])
            out[t] += weight * maybe(rounding.sum2, y)
    return to_bf16(out)


def run(operands, activation, numerics, *, biases=True):
    operands = operands if biases else (*operands[:5], None, None)
    # Jitted, since it is XLA's optimizations that could skip a rounding.
    call = jax.jit(
        lambda *a: xla_moe.moe(
            *a,
            activation=activation,
            apply_router_weight_on_input=False,
            quantize_activations=True,
            numerics=numerics,
        )
    )
    return call(*operands)


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("numerics", ROUNDINGS)
def test_every_rounding_is_where_the_kernel_has_it(numerics, case, biases):
    activation, act, rows = CASES[case]
    operands = make_operands(rows)
    rounding = ROUNDINGS[numerics]
    out = run(operands, activation, numerics, biases=biases)
    assert_bits_equal(out, model(operands, act, rounding, biases=biases))
    # Without any one of the roundings, or with one more, the bits are others.
    for point in dataclasses.fields(Rounding):
        flipped = not getattr(rounding, point.name)
        if not biases and "bias" in point.name:
            continue
        if not biases and flipped and point.name in ("product2", "sum2"):
            continue  # the other of the two has rounded the same value
        other = dataclasses.replace(rounding, **{point.name: flipped})
        others = model(operands, act, other, biases=biases)
        assert np.any(others != np.asarray(out)), point.name


@pytest.mark.parametrize("case", CASES)
def test_the_two_kernels_differ_and_cutlass_is_the_default(case):
    activation, _, rows = CASES[case]
    operands = make_operands(rows)
    cutlass, trtllm = (run(operands, activation, n) for n in ROUNDINGS)
    assert jnp.any(cutlass != trtllm)
    x, w13, w2, ids, weights, b13, b2 = operands
    op = jax.jit(
        lambda: mx_moe_w8a8(
            *(x, w13, w2, ids, weights),
            activation=activation,
            w13_bias=b13,
            w2_bias=b2,
            implementation="xla",
        )
    )
    assert_bits_equal(op(), cutlass)


@pytest.mark.parametrize("numerics", ROUNDINGS)
def test_a_transcendental_activation_stays_within_its_error(numerics):
    rows = 2 * I
    operands = make_operands(rows)

    def silu_gated(h):
        gate, up = np.split(h, 2, axis=-1)
        return gate / (1 + np.exp(-gate)) * up

    out = np.asarray(run(operands, "silu", numerics), np.float64)
    expected = model(operands, silu_gated, ROUNDINGS[numerics], biases=True)
    expected = expected.astype(np.float64)
    # A value next to a boundary may fall to its other side, and no more than that.
    assert np.mean(out != expected) < 0.02
    np.testing.assert_allclose(
        out, expected, rtol=0, atol=0.01 * float(np.std(expected))
    )


def test_float16_that_mxfp8_rounds_beyond_float16_stays_finite():
    x = jnp.full((1, 32), 65504, jnp.float16)
    rounded = 65536  # which float16 does not have
    w = quantize(jnp.full((32, 32), 2.0**-14, jnp.float16))
    product = rounded * 32 * 2.0**-14
    out = mx_matmul_w8a8(x, w, implementation="xla")
    assert_bits_equal(out, jnp.full((1, 32), product, jnp.float16))
    experts = quantize(jnp.full((1, 32, 32), 2.0**-14, jnp.float16))
    ids, weights = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), jnp.float16)
    operands = (x, experts, experts, ids, weights)
    out = mx_moe_w8a8(*operands, activation="relu2", implementation="xla")
    expected = product**2 * 32 * 2.0**-14
    assert_bits_equal(out, jnp.full((1, 32), expected, jnp.float16))

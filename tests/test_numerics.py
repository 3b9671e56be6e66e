"""The numerics contract, bit for bit, against a model that searches for the answer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmx8 import dequantize, MXArray, quantize
from jmx8._numerics import quantize_rows

from .helpers import assert_bits_equal, model_quantize


# Both formulations run on any device; each is fast on one.
FORMULATIONS = {
    "cpu": functools.partial(quantize_rows, for_gpu=False),
    "gpu": functools.partial(quantize_rows, for_gpu=True),
}
formulations = pytest.mark.parametrize("formulation", FORMULATIONS)


def quantized(formulation, x):
    elements, scales = jax.jit(FORMULATIONS[formulation])(jnp.asarray(x))
    return np.asarray(elements).view(np.uint8), np.asarray(scales).view(np.uint8)


def assert_follows_model(formulation, x):
    elements, scales = quantized(formulation, x)
    expected_elements, expected_scales = model_quantize(x)
    np.testing.assert_array_equal(scales, expected_scales)
    np.testing.assert_array_equal(elements, expected_elements)


def block_of(first, rest=0.0, dtype=jnp.float32):
    x = np.full((1, 32), rest, np.float32)
    x[0, 0] = first
    return x.astype(dtype)


@formulations
def test_every_finite_bfloat16_amax(formulation):
    amax = np.arange(0x7F80, dtype=np.uint16).view(jnp.bfloat16)
    rng = np.random.default_rng(0)
    fractions = rng.uniform(-1, 1, (amax.size, 32)).astype(np.float32)
    with np.errstate(over="ignore"):
        x = (fractions * amax.astype(np.float32)[:, None]).astype(jnp.bfloat16)
    x[np.arange(amax.size), rng.integers(0, 32, amax.size)] = amax
    assert_follows_model(formulation, x)


@formulations
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("spread", [1, 8])
def test_random_blocks(formulation, dtype, spread):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((512, 256)) * 2.0 ** rng.integers(-spread, spread, (512, 1))
    assert_follows_model(formulation, x.astype(dtype))


@formulations
def test_rounding_of_every_pair_of_neighbours(formulation):
    # Midpoints of E4M3 neighbours and the floats beside them, under a scale of one.
    positive = np.arange(127, dtype=np.uint8).view(jnp.float8_e4m3fn)
    values = positive.astype(np.float32)
    middle = (values[1:] + values[:-1]) / 2
    x = np.concatenate([middle, np.nextafter(middle, 0), np.nextafter(middle, 449)])
    x = np.concatenate([x, -x]).astype(np.float32)
    blocks = np.zeros((x.size, 32), np.float32)
    blocks[:, 0], blocks[:, 1] = 448.0, x
    assert np.all(quantized(formulation, blocks)[1] == 127)
    assert_follows_model(formulation, blocks)


@formulations
@pytest.mark.parametrize(
    "amax, code",
    [
        (448.0, 127),
        (np.nextafter(np.float32(448), np.float32(449)), 128),
        (224.0, 126),
        (1.75 * 2.0**-118, 1),
        (np.nextafter(np.float32(1.75 * 2.0**-118), np.float32(0)), 0),
        (2.0**-126, 0),
        (2.0**-140, 0),
        (0.0, 0),
        (float(np.finfo(np.float32).max), 247),
        (1.75 * 2.0**127, 246),
    ],
)
def test_scale_is_smallest_power_of_two_that_does_not_saturate(formulation, amax, code):
    elements, scales = quantized(formulation, block_of(amax))
    assert scales.item() == code
    if code == 0:
        assert np.all(elements == 0)
    else:
        assert elements[0, 0] > 0


@formulations
def test_zero_block_keeps_signs(formulation):
    elements, scales = quantized(formulation, block_of(-0.0))
    assert scales.item() == 0
    assert elements[0].tolist() == [0x80] + [0] * 31


@formulations
def test_subnormal_elements_are_zeros(formulation):
    # A scale of 2**-126 would bring 2**-127 back into range; FlashInfer flushes it.
    elements, scales = quantized(
        formulation, block_of(1.75 * 2.0**-118, 2.0**-127).astype(jnp.bfloat16)
    )
    assert scales.item() == 1
    assert elements[0].tolist() == [0x7E] + [0] * 31


@formulations
@pytest.mark.parametrize("infinity", [np.inf, -np.inf])
def test_infinity_takes_the_block(formulation, infinity):
    elements, scales = quantized(formulation, block_of(infinity, -3.0))
    assert scales.item() == 254
    assert elements[0].tolist() == [0x7E] + [0x80] * 31


@formulations
def test_nan_does_not_count_for_the_scale(formulation):
    x = block_of(np.nan, 2.0)
    elements, scales = quantized(formulation, x)
    expected, expected_scales = model_quantize(np.full((1, 32), 2.0))
    assert scales.item() == expected_scales.item()
    assert elements[0, 0] == 0x7E
    np.testing.assert_array_equal(elements[0, 1:], expected[0, 1:])


@formulations
def test_nan_in_all_odd_elements_is_a_nan_scale(formulation):
    x = np.ones((2, 32), np.float32)
    x[0, 1::2] = np.nan  # all odd
    x[1, 0::2] = np.nan  # all even: the odd ones still count
    elements, scales = quantized(formulation, x)
    assert scales[:, 0].tolist() == [0xFF, 119]
    assert np.all(elements[0] == 0x7E)
    assert elements[1].tolist() == [0x7E, 0x78] * 16


def test_widening_of_every_code_pair_is_exact():
    codes = np.arange(256, dtype=np.uint8)
    elements = np.tile(codes.view(jnp.float8_e4m3fn), (256, 1))
    scales = np.repeat(codes[:, None], 8, axis=1).view(jnp.float8_e8m0fnu)
    values = dequantize(MXArray(jnp.asarray(elements), jnp.asarray(scales)))
    exact = elements.astype(np.float64) * 2.0 ** (codes[:, None] - 127.0)
    exact[255] = np.nan
    with np.errstate(over="ignore"):
        expected = exact.astype(np.float32)
    is_normal = ~(np.abs(exact) < 2.0**-126) | (exact == 0)
    np.testing.assert_array_equal(np.asarray(values)[is_normal], expected[is_normal])


def test_rounding_survives_compilation_with_the_widening():
    x = jax.random.normal(jax.random.key(0), (4, 64), jnp.bfloat16)
    round_trip = lambda x: dequantize(quantize(x), jnp.bfloat16)
    assert_bits_equal(jax.jit(round_trip)(x), round_trip(x))
    assert jnp.any(round_trip(x) != x)


@pytest.mark.parametrize("seed", [0, 1])
def test_gaussian_weights_keep_31_db(seed):
    x = 0.02 * jax.random.normal(jax.random.key(seed), (1024, 4096), jnp.bfloat16)
    noise = dequantize(quantize(x)) - x.astype(jnp.float32)
    signal = jnp.sum(jnp.square(x.astype(jnp.float32)))
    assert 10 * jnp.log10(signal / jnp.sum(jnp.square(noise))) >= 31


@pytest.mark.parametrize("axis", [0, 1])
def test_quantizing_shards_equals_sharding_what_was_quantized(axis):
    x = jax.random.normal(jax.random.key(2), (64, 256), jnp.bfloat16)
    whole = quantize(x)
    parts = [quantize(part) for part in jnp.split(x, 4, axis=axis)]
    join = lambda leaves: np.concatenate(
        [np.asarray(leaf).view(np.uint8) for leaf in leaves], axis=axis
    )
    assert_bits_equal(join([p.elements for p in parts]), whole.elements)
    assert_bits_equal(join([p.scales for p in parts]), whole.scales)

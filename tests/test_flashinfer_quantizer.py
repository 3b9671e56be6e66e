"""`jmx8.quantize` gives the bytes of FlashInfer's own quantizer for the host.

Its compiled code is called through the seam that the GPU kernels are called through.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest


tvm_ffi = pytest.importorskip("tvm_ffi")
pytest.importorskip("jax_tvm_ffi")

from jmx8 import quantize
from jmx8.kernels._ffi import Kernel, Output
from jmx8.kernels.flashinfer import modules
from jmx8.kernels.flashinfer.layouts import round_up, swizzle_scales, unswizzle_scales


pytestmark = pytest.mark.cpu


ARCH = "10.0a"  # what runs on the host is the same for every architecture
PATH = modules.find(modules.QUANTIZATION, ARCH)
if PATH is None:
    pytest.skip(
        f"FlashInfer's {modules.QUANTIZATION.name} is not built for {ARCH}; "
        f"`jmx8 build-kernels --arch {ARCH}` builds it",
        allow_module_level=True,
    )


def load_host_function(path, name):
    modules.preload_libraries(path)
    return tvm_ffi.load_module(str(path))[name]


HOST = Kernel(
    name="flashinfer.mxfp8_quantize_host",
    load=functools.partial(load_host_function, PATH, "mxfp8_quantize_host"),
    arguments=("x", "elements", "scales", "layout"),
    platform="cpu",
)
SWIZZLED, LINEAR = 0, 2

# Fields of a float32.
SIGN, MANTISSA = np.uint32(1 << 31), np.uint32((1 << 23) - 1)

# A chunk is 2**20 blocks; its rows and columns are whole tiles of swizzled scales.
ROWS, COLS = 8192, 4096


def flashinfers(x, layout):
    rows, blocks = x.shape[0], x.shape[1] // 32
    size = rows * blocks
    if layout == SWIZZLED:
        size = round_up(rows, 128) * round_up(blocks, 4)
    return HOST(
        x=x.astype(jnp.float32),
        elements=Output(x.shape, jnp.uint8),
        scales=Output((size,), jnp.uint8),
        layout=layout,
    )


def ours(x):
    q = quantize(x)
    as_bytes = lambda a: jax.lax.bitcast_convert_type(a, jnp.uint8)
    return as_bytes(q.elements), as_bytes(q.scales)


@functools.partial(jax.jit, static_argnums=(0, 2))
def count_differences(make, key, layout):
    """Returns how many bytes of the elements and of the scales differ."""
    x = make(key)
    theirs = flashinfers(x, layout)
    elements, scales = ours(x)
    if layout == SWIZZLED:
        scales = swizzle_scales(scales)
    pairs = zip(theirs, (elements, scales.reshape(-1)), strict=True)
    return tuple(jnp.sum(a != b) for a, b in pairs)


def bits(key):
    return jax.random.bits(key, (ROWS, COLS), jnp.uint32)


def as_float32(patterns):
    return jax.lax.bitcast_convert_type(patterns, jnp.float32)


def scaled_blocks(low, high):
    """Returns a maker of uniform blocks, scaled by 2**low to 2**high."""

    def make(key):
        value_key, scale_key = jax.random.split(key)
        # A mantissa between 1 and 2, a sign, and an exponent that varies by 8.
        patterns = bits(value_key)
        blocks = (ROWS, COLS // 32, 1)
        exponents = 127 + jax.random.randint(scale_key, blocks, low, high)
        exponents = jnp.broadcast_to(exponents, (ROWS, COLS // 32, 32))
        exponents = exponents.reshape(ROWS, COLS).astype(jnp.uint32)
        exponents = jnp.maximum(exponents, 8) - (patterns >> 28 & 7)
        return as_float32(patterns & (SIGN | MANTISSA) | exponents << 23)

    return make


def normal(key):
    return jax.random.normal(key, (ROWS, COLS))


def any_finite_float32(key):
    patterns = bits(key)
    is_finite = patterns & 0x7F800000 != 0x7F800000
    return as_float32(jnp.where(is_finite, patterns, patterns ^ 0x40000000))


def any_finite_bfloat16(key):
    patterns = (bits(key) >> 16).astype(jnp.uint16)
    is_finite = patterns & 0x7F80 != 0x7F80
    patterns = jnp.where(is_finite, patterns, patterns ^ 0x4000)
    return jax.lax.bitcast_convert_type(patterns, jnp.bfloat16)


def any_finite_float16(key):
    patterns = (bits(key) >> 16).astype(jnp.uint16)
    is_finite = patterns & 0x7C00 != 0x7C00
    patterns = jnp.where(is_finite, patterns, patterns ^ 0x4000)
    return jax.lax.bitcast_convert_type(patterns, jnp.float16)


def mostly_zeros(key):
    # One element in 64 is a number, so six blocks in ten are zeros of both signs.
    patterns = bits(key)
    sign = as_float32(patterns & SIGN)
    number = as_float32(patterns & (SIGN | MANTISSA) | 0x3F800000)
    return jnp.where(patterns >> 23 & 63 == 0, number, sign)


def subnormal(key):
    return as_float32(bits(key) & (SIGN | MANTISSA))


def amax_at_the_limit(key):
    """448 * 2**k for every k, and the floats next to it, among smaller elements."""
    patterns = bits(key).reshape(ROWS, COLS // 32, 32)
    exponents = 10 + patterns[..., :1] % 244  # lower ones are in a test of their own
    limit = exponents << 23 | 0x600000  # 1.75 * 2**(exponent - 127)
    step = patterns[..., 1:2] % 3 - 1  # wraps to one below
    amax = limit + step
    smaller = exponents - 1 - (patterns >> 28 & 7)
    smaller = patterns & (SIGN | MANTISSA) | smaller << 23
    is_amax = jnp.arange(32)[None, None] == (patterns[..., 2:3] % 32).astype(jnp.int32)
    sign = patterns & SIGN
    return as_float32(jnp.where(is_amax, amax | sign, smaller).reshape(ROWS, COLS))


FAMILIES = {
    "normal": normal,
    "wide": scaled_blocks(-100, 100),
    "tiny": scaled_blocks(-126, -110),
    "huge": scaled_blocks(110, 128),
    "zeros": mostly_zeros,
    "subnormal": subnormal,
    "amax = 448 * 2**k": amax_at_the_limit,
    "any float32": any_finite_float32,
    "any bfloat16": any_finite_bfloat16,
    "any float16": any_finite_float16,
}
assert len(FAMILIES) * ROWS * COLS // 32 >= 10_000_000


@pytest.mark.parametrize("name", FAMILIES)
def test_same_bytes_for_a_million_blocks(name):
    i = list(FAMILIES).index(name)
    key = jax.random.key(i)
    layout = SWIZZLED if i % 2 else LINEAR
    differences = count_differences(FAMILIES[name], key, layout)
    assert tuple(map(int, differences)) == (0, 0)


@pytest.mark.parametrize("layout", [LINEAR, SWIZZLED])
@pytest.mark.parametrize("rows, blocks", [(1, 1), (130, 5), (129, 7), (256, 4)])
def test_same_bytes_whatever_the_padding(rows, blocks, layout):
    x = jax.random.normal(jax.random.key(rows), (rows, blocks * 32))
    elements, scales = jax.jit(flashinfers, static_argnums=1)(x, layout)
    if layout == SWIZZLED:  # the host function leaves the padding alone
        scales = unswizzle_scales(scales, rows, blocks)
    expected_elements, expected_scales = ours(x)
    np.testing.assert_array_equal(elements, expected_elements)
    np.testing.assert_array_equal(scales.reshape(rows, blocks), expected_scales)


def test_the_one_amax_that_differs():
    # The host rounds amax / 448 to a float32. For the last amax below 1.75 * 2**-118
    # that is no subnormal any more. The GPU sees no such amax: its inputs are bfloat16
    # and float16. Around each other limit, and around this one, all others agree.
    exponents = np.arange(1, 254, dtype=np.uint32)[:, None] << 23 | 0x600000
    offsets = np.arange(-8, 9, dtype=np.int32).astype(np.uint32)[None]
    amax = (exponents + offsets).view(np.float32)
    x = np.zeros((*amax.shape, 32), np.float32)
    x[..., 7], x[..., 8] = -amax, amax / 3
    x = jnp.asarray(x.reshape(amax.size, 32))
    theirs, theirs_scales = jax.jit(flashinfers, static_argnums=1)(x, LINEAR)
    elements, scales = ours(x)
    differs = np.asarray(theirs_scales) != np.asarray(scales).reshape(-1)
    assert amax.reshape(-1)[differs].view(np.uint32).tolist() == [0x04DFFFFF]
    np.testing.assert_array_equal(theirs[~differs], elements[~differs])
    assert theirs_scales[differs] == 1 and scales[differs] == 0
    assert np.float32(1.75 * 2.0**-118).view(np.uint32) == 0x04E00000


def test_infinity_differs_as_the_contract_says():
    # The contract is the GPU kernel's, whose conversion saturates where this one does
    # not. All else is the same: finite elements are zeros of their sign.
    x = jax.random.normal(jax.random.key(0), (512, 256)).reshape(512, 8, 32)
    x = x.at[:, :, 5].set(jnp.inf).at[:, :, 9].set(-jnp.inf).reshape(512, 256)
    theirs, theirs_scales = jax.jit(flashinfers, static_argnums=1)(x, LINEAR)
    elements, scales = ours(x)
    is_finite = np.isfinite(x)
    np.testing.assert_array_equal(theirs[is_finite], elements[is_finite])
    assert set(np.unique(elements[is_finite])) == {0x00, 0x80}
    assert np.all(theirs_scales == 0xFF) and np.all(scales == 0xFE)
    assert np.all(theirs[~is_finite] & 0x7F == 0x7F)
    assert np.all(elements[~is_finite] == 0x7E)


def test_nan_differs_as_the_contract_says():
    # The host's maximum forgets what came before a NaN, so only one in front does no
    # harm, as all of them on the GPU; and NaN stays NaN, where the GPU makes it 448.
    x = jax.random.normal(jax.random.key(1), (512, 256)).reshape(512, 8, 32)
    x = x.at[:, :, 0].set(jnp.nan).reshape(512, 256)
    theirs, theirs_scales = jax.jit(flashinfers, static_argnums=1)(x, LINEAR)
    elements, scales = ours(x)
    is_nan = np.isnan(x)
    np.testing.assert_array_equal(theirs_scales, scales.reshape(-1))
    np.testing.assert_array_equal(theirs[~is_nan], elements[~is_nan])
    assert np.all(theirs[is_nan] & 0x7F == 0x7F) and np.all(elements[is_nan] == 0x7E)

"""The arithmetic of MXFP8: the scale rule, rounding to E4M3, and exact widening.

Works on plain arrays whose last axis is K, a multiple of 32. All of it is integer
arithmetic on float32 bits and products with powers of two: float `log2` and `exp2` are
not exact on every device.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ._device import default_device
from ._mxfp8 import BLOCK_SIZE as BLOCK_SIZE, E4M3_MAX, E8M0_BIAS as E8M0_BIAS


_MIN_NORMAL = 2.0**-126  # of float32 and of bfloat16
_INF_BITS = 0x7F800000
_NAN_BITS = 0x7FC00000
_MAX_MANTISSA_BITS = 0x600000  # 448 = 1.75 * 2**8, and 0.75 * 2**23 = 0x600000
_MIN_SCALED_BITS = 0x04E00000  # 1.75 * 2**-118: below it amax / 448 is subnormal


def quantize_rows(x: Array, *, for_gpu: bool | None = None) -> tuple[Array, Array]:
    """Returns E4M3 elements `[..., k]` and E8M0 scales `[..., k // 32]`.

    Args:
        x: Array `[..., k]` of a float dtype; see `quantize` for the rule.
        for_gpu: Which of two formulations of the same bits to trace. XLA's GPU and CPU
            compilers each vectorize only one of them. None follows the default device.
    """
    if for_gpu is None:
        for_gpu = default_device().platform == "gpu"
    return _quantize_rows(x, for_gpu)


# Jitted so that a call outside `jit` is one fused program without float32 temporaries.
@functools.partial(jax.jit, static_argnums=1, inline=True)
def _quantize_rows(x: Array, for_gpu: bool) -> tuple[Array, Array]:
    *batch, k = x.shape
    blocks = x.reshape(*batch, k // BLOCK_SIZE, BLOCK_SIZE)
    amax, odd_is_nan = (_amax_gpu if for_gpu else _amax_cpu)(blocks)
    # The barriers keep XLA from computing the scales once more for the elements, and
    # from folding the rounding into a later widening.
    codes = jax.lax.optimization_barrier(_scale_codes(amax, odd_is_nan))
    inverse = _inverse_scales(codes)[..., None]
    elements = (_round_gpu if for_gpu else _round)(blocks, inverse)
    elements = jax.lax.optimization_barrier(elements.reshape(x.shape))
    return elements, jax.lax.bitcast_convert_type(codes, jnp.float8_e8m0fnu)


def dequantize_rows(elements: Array, scales: Array) -> Array:
    """Returns the float32 values `[..., k]`; exact unless below 2**-126."""
    on_cpu = default_device().platform == "cpu"
    return _dequantize_rows(elements, scales, on_cpu)


@functools.partial(jax.jit, static_argnums=2, inline=True)
def _dequantize_rows(elements: Array, scales: Array, on_cpu: bool) -> Array:
    *batch, k = elements.shape
    blocks = elements.astype(jnp.float32).reshape(*batch, k // BLOCK_SIZE, BLOCK_SIZE)
    codes = jax.lax.bitcast_convert_type(scales, jnp.uint8).astype(jnp.int32)
    # 2**(code - 127) reaches outside float32's normal range; its two halves do not.
    half = codes >> 1
    first = _power_of_two(half - E8M0_BIAS // 2)
    first = jnp.where(codes == 255, jnp.nan, first)
    second = _power_of_two(codes - half - E8M0_BIAS // 2 - 1)
    if on_cpu:
        # XLA would compute both factors again for each of their 32 elements.
        first, second = jax.lax.optimization_barrier((first, second))
    return (blocks * first[..., None] * second[..., None]).reshape(*batch, k)


def _power_of_two(exponent: Array) -> Array:
    """Returns 2**exponent as float32, exponent an int32 within [-126, 127]."""
    return jax.lax.bitcast_convert_type((exponent + E8M0_BIAS) << 23, jnp.float32)


def _magnitude_bits(blocks: Array) -> tuple[Array, Array]:
    """Returns |x| as float32 bits, NaN as 0, and whether an odd element is a number."""
    bits = jax.lax.bitcast_convert_type(blocks.astype(jnp.float32), jnp.uint32)
    magnitude = bits & jnp.uint32(0x7FFFFFFF)
    is_nan = magnitude > _INF_BITS
    is_odd = jnp.broadcast_to(np.arange(BLOCK_SIZE) % 2 == 1, blocks.shape)
    return jnp.where(is_nan, jnp.uint32(0), magnitude), is_odd & ~is_nan


def _amax_cpu(blocks: Array) -> tuple[Array, Array]:
    """Returns each block's absmax as float32 bits, and whether its odd half is NaN."""
    magnitude, is_odd_number = _magnitude_bits(blocks)
    zero = jnp.uint32(0)
    amax, has_number = jax.lax.reduce(
        (magnitude, is_odd_number.astype(jnp.uint32)),
        (zero, zero),
        lambda a, b: (jnp.maximum(a[0], b[0]), a[1] | b[1]),
        (blocks.ndim - 1,),
    )
    return amax, has_number == 0


def _amax_gpu(blocks: Array) -> tuple[Array, Array]:
    """The same through one reduction of one word, the flag in the free sign bit."""
    magnitude, is_odd_number = _magnitude_bits(blocks)
    flag, rest = np.uint32(1 << 31), np.uint32((1 << 31) - 1)
    word = jax.lax.reduce(
        magnitude | jnp.where(is_odd_number, flag, np.uint32(0)),
        jnp.uint32(0),
        lambda a, b: ((a | b) & flag) | jnp.maximum(a & rest, b & rest),
        (blocks.ndim - 1,),
    )
    return word & rest, (word & flag) == 0


def _scale_codes(amax: Array, odd_is_nan: Array) -> Array:
    """Returns the E8M0 codes, as uint8, of float32 magnitudes given as bits."""
    exponent = (amax >> 23).astype(jnp.int32)
    codes = exponent - 8 + ((amax & 0x7FFFFF) > _MAX_MANTISSA_BITS).astype(jnp.int32)
    codes = jnp.where(amax < _MIN_SCALED_BITS, 0, codes)
    codes = jnp.where(amax == _INF_BITS, 254, codes)
    # The kernel's last step is `even > odd ? even : odd`, where an odd NaN wins.
    return jnp.where(odd_is_nan, 255, codes).astype(jnp.uint8)


def _inverse_scales(codes: Array) -> Array:
    """Returns 2**(127 - code) as float32: 0 for codes 0 and 254, NaN for 255."""
    codes = codes.astype(jnp.int32)
    bits = jnp.where(codes == 0, 0, (254 - codes) << 23)
    bits = jnp.where(codes == 255, _NAN_BITS, bits)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _round(x: Array, inverse: Array) -> Array:
    """Returns the E4M3 elements of values and their inverse scales."""
    x = x.astype(jnp.float32)
    x = jnp.where(jnp.abs(x) < _MIN_NORMAL, x * 0, x)  # keeps the sign of zero
    inverse = jnp.broadcast_to(inverse, x.shape)
    scaled = x * inverse
    # The scale rule leaves no finite value above 448. What is NaN here was NaN, or
    # infinite and multiplied by 0.
    scaled = jnp.where(jnp.isnan(scaled), E4M3_MAX, scaled)
    return scaled.astype(jnp.float8_e4m3fn)


def _round_gpu(blocks: Array, inverse: Array) -> Array:
    """The same, four elements to a word: XLA does not merge stores of single bytes."""
    words = blocks.reshape(*blocks.shape[:-1], BLOCK_SIZE // 4, 4)
    out = jnp.uint32(0)
    for i in range(4):
        byte = jax.lax.bitcast_convert_type(_round(words[..., i], inverse), jnp.uint8)
        out = out | byte.astype(jnp.uint32) << (8 * i)
    return jax.lax.bitcast_convert_type(out, jnp.float8_e4m3fn)

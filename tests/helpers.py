"""Assertions and independent models shared by the tests."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from jmx8 import dequantize, MXArray


E4M3_MIN_SUBNORMAL = 2.0**-9


def assert_bits_equal(actual, expected):
    """Compares codes, not values: the right test for quantize and layout changes."""
    as_bytes = lambda x: np.asarray(x).view(np.uint8)
    np.testing.assert_array_equal(as_bytes(actual), as_bytes(expected))


def assert_matmul_close(out: jax.Array, x: jax.Array, w: MXArray, *, acc_bits: int):
    """Checks `out` against the exact product, within bounds that rounding explains.

    Two errors are allowed: rounding the result to `out.dtype`, and an accumulator of
    `acc_bits` significant bits. The second scales with sum(|x| * |w|), not with the
    result, so cancellation does not need a hand-tuned atol.
    """
    x64, w64 = np.asarray(x, np.float64), np.asarray(dequantize(w), np.float64)
    w64 = np.swapaxes(w64, -1, -2)
    assert_within(out, x64 @ w64, np.abs(x64) @ np.abs(w64), acc_bits=acc_bits)


def assert_within(out, exact, magnitude, *, acc_bits: int):
    """Checks the error against `eps(out) * |exact|` and `2**-acc_bits * magnitude`."""
    rounding = float(jnp.finfo(out.dtype).eps) * np.abs(exact)
    error = np.abs(np.asarray(out, np.float64) - exact)
    bound = rounding + 2.0**-acc_bits * magnitude
    assert np.all(error <= bound), f"error is {np.max(error / bound):.2f}x the bound"


def model_quantize(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantizes finite `[..., k]` by the definition, in exact float64 arithmetic.

    Not a transcription of the implementation: the scale is searched for, and elements
    are rounded by looking for the nearest of all E4M3 values. Returns uint8 codes of
    elements and scales.
    """
    x = np.asarray(x, np.float64)
    blocks = x.reshape(*x.shape[:-1], -1, 32)
    blocks = np.where(np.abs(blocks) < 2.0**-126, blocks * 0, blocks)
    amax = np.max(np.abs(blocks), axis=-1)
    # The smallest code in [1, 254] whose scale keeps amax within 448.
    limits = 448.0 * 2.0 ** (np.arange(255) - 127.0)
    codes = np.maximum(np.searchsorted(limits, amax, side="left"), 1)
    codes = np.where(amax < 1.75 * 2.0**-118, 0, codes)
    scaled = blocks * np.where(codes == 0, 0.0, 2.0 ** (127.0 - codes))[..., None]
    return round_to_e4m3(scaled).reshape(x.shape), codes.astype(np.uint8)


def round_to_e4m3(values: np.ndarray) -> np.ndarray:
    """Returns the codes of the nearest E4M3 values, ties to the even code."""
    codes = np.arange(127, dtype=np.uint8)  # 0 to 448; 0x7F is NaN
    exponent, mantissa = codes >> 3, (codes & 7).astype(np.float64)
    table = np.where(
        exponent == 0,
        mantissa * E4M3_MIN_SUBNORMAL,
        (8 + mantissa) * 2.0 ** (exponent.astype(np.float64) - 10),
    )
    magnitude = np.minimum(np.abs(values), 448.0)
    upper = np.clip(np.searchsorted(table, magnitude), 1, 126)
    below, above = magnitude - table[upper - 1], table[upper] - magnitude
    take_upper = (above < below) | ((above == below) & (upper % 2 == 0))
    rounded = np.where(take_upper, upper, upper - 1).astype(np.uint8)
    return rounded | (np.signbit(values).astype(np.uint8) << 7)


def run_on_four_devices(script: str) -> None:
    """Runs a program of this folder where the CPU is four devices; it must succeed."""
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", str(pathlib.Path(__file__).with_name(script))],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == "all good"

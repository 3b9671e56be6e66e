"""FlashInfer's CUDA quantizer: activations to MXFP8, scales as the kernels want them.

Below compute capability 10.0 the bodies of its kernels are compiled away: a call
succeeds, and leaves whatever the output buffers held. Nothing in FlashInfer checks the
device, so `mxfp8_quantize` does, whoever calls it; there is no other way to the kernel.
"""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Float8e4m3fn, UInt8

from ... import _device
from ..._mx_array import BLOCK_SIZE
from .._ffi import Kernel, Output
from . import modules
from .layouts import round_up


# What tells whether a call is supported: an array, or the shape and dtype of one.
Abstract = jax.Array | jax.ShapeDtypeStruct

# Order of the scales: whole tiles of 128 or 8 rows and 4 columns, or rows.
ScaleLayout = Literal["128x4", "8x4", "linear"]

# FlashInfer's numbers, and the rows and columns that the scales are padded to.
_LAYOUTS = {"128x4": (0, 128, 4), "8x4": (1, 8, 4), "linear": (2, 1, 1)}

# Programmatic dependent launch, which FlashInfer uses wherever there is one. Kernels of
# XLA among its own are launched without, and wait for all that came before them.
ENABLE_PDL = True


def unsupported(dtype: DTypeLike, k: int) -> str | None:
    """Returns why `mxfp8_quantize` cannot quantize `[..., k]` here, None if it can."""
    if problem := _device_problem():
        return problem
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"FlashInfer quantizes bfloat16 and float16, not {jnp.dtype(dtype)}"
    if k % BLOCK_SIZE != 0:
        return f"the last axis must be a multiple of {BLOCK_SIZE}, got {k}"
    return modules.unavailable(modules.QUANTIZATION, _device.compute_capability())


def capability() -> modules.Capability:
    """Returns the device's compute capability, which is 10.0 or later.

    Raises:
        NotImplementedError: If it is not.
    """
    if problem := _device_problem():
        raise NotImplementedError(f"mxfp8_quantize: {problem}.")
    found = _device.compute_capability()
    assert found is not None
    return found


def _device_problem() -> str | None:
    """Returns why the kernel would write nothing here, None if it would write."""
    capability = _device.compute_capability()
    if capability is None or capability < (10, 0) or _has_older_gpu():
        here = capability and ".".join(map(str, capability))
        here = f"compute capability {here}" if here else "not an NVIDIA GPU"
        return (
            "FlashInfer's mxfp8_quantize needs compute capability 10.0 on every GPU of "
            f"the process, and writes nothing below; this device is {here}"
        )
    return None


def _has_older_gpu() -> bool:
    """Tells whether a computation may be placed where the kernel writes nothing."""
    versions = (getattr(d, "compute_capability", None) for d in jax.local_devices())
    majors = (version.partition(".")[0] for version in versions if version)
    return any(not major.isdigit() or int(major) < 10 for major in majors)


@functools.cache
def _kernel(capability: modules.Capability) -> Kernel:
    return Kernel(
        name="flashinfer.mxfp8_quantize",
        load=lambda: modules.load(modules.QUANTIZATION, capability)["mxfp8_quantize"],
        arguments=("x", "elements", "scales", "layout", "alignment", "enable_pdl"),
    )


def mxfp8_quantize(
    x: Float[Array, "*m k"], layout: ScaleLayout
) -> tuple[Float8e4m3fn[Array, "*m k"], UInt8[Array, " size"]]:
    """Quantizes rows by the rule of `jmx8.quantize`.

    Args:
        x: `[..., k]`, bfloat16 or float16; k a multiple of 32.
        layout: Order of the scales.

    Returns:
        Elements `[..., k]`, and the flat bytes of the scales of all rows: as many as
        blocks if linear, padded to whole tiles with zeros if not.

    Raises:
        NotImplementedError: If it cannot run here, below compute capability 10.0 above
            all; when it is traced.
    """
    if problem := unsupported(x.dtype, x.shape[-1]):
        raise NotImplementedError(f"mxfp8_quantize: {problem}.")
    number, tile_rows, tile_cols = _LAYOUTS[layout]
    rows = math.prod(x.shape[:-1])
    blocks = x.shape[-1] // BLOCK_SIZE
    size = round_up(rows, tile_rows) * round_up(blocks, tile_cols)
    if size == 0:
        return jnp.zeros(x.shape, jnp.float8_e4m3fn), jnp.zeros(0, jnp.uint8)
    elements, scales = _kernel(capability())(
        x=x,
        elements=Output(x.shape, jnp.float8_e4m3fn),
        scales=Output((size,), jnp.uint8),
        layout=number,
        alignment=BLOCK_SIZE,
        enable_pdl=ENABLE_PDL,
    )
    return elements, scales


def pad_last(x: Float[Array, "*m k"], k: int) -> Float[Array, "*m {k}"]:
    """Pads the last axis to k with zeros, which quantize to zeros."""
    if x.shape[-1] == k:
        return x
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, k - x.shape[-1])])

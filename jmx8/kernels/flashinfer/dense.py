"""W8A8 products through FlashInfer's CUTLASS kernel `mxfp8_gemm`.

Compute capability 10.0, 10.3 and 11.0 have one module, 12.0 and 12.1 another one with
the same functions. Weights come as `prepare.dense_cutlass` lays them out.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Float8e4m3fn, UInt8

from ... import _device
from .._ffi import Kernel, Output, Workspace
from . import modules, quantize


# What FlashInfer sets aside. The kernel allocates for itself, and fails, if it needs
# more.
_WORKSPACE_BYTES = 40 << 20

_DTYPES = (jnp.bfloat16, jnp.float16)


def _module(capability: modules.Capability | None) -> modules.Module:
    """Returns the module for a device, or the one whose absence there is told."""
    is_consumer = capability in modules.GEMM_SM120.capabilities
    return modules.GEMM_SM120 if is_consumer else modules.GEMM


@functools.cache
def _kernel(capability: modules.Capability) -> Kernel:
    return Kernel(
        name="flashinfer.mxfp8_gemm",
        load=lambda: modules.load(_module(capability), capability)["mxfp8_gemm"],
        arguments=("x", "w", "x_scales", "w_scales", "out", "workspace", "tactic"),
    )


def num_tactics(capability: modules.Capability) -> int:
    """Returns how many tactics `matmul_w8a8` has on a device; they count from 0."""
    module: Any = modules.load(_module(capability), capability)
    return module["mxfp8_gemm_tactic_num"]()


def unsupported(
    x: quantize.Abstract, elements: quantize.Abstract, *, out_dtype: DTypeLike
) -> str | None:
    """Returns why `matmul_w8a8` cannot run here, None if it can."""
    n, k = elements.shape[-2:]
    if jnp.dtype(out_dtype) not in _DTYPES:
        return f"mxfp8_gemm returns bfloat16 or float16, not {jnp.dtype(out_dtype)}"
    if n < 128 or k < 128 or n % 32 or k % 32:
        return f"mxfp8_gemm needs n and k of at least 128, 32 by 32, got {n=} and {k=}"
    capability = _device.compute_capability()
    problem = modules.unavailable(_module(capability), capability)
    return problem or quantize.unsupported(x.dtype, k)


def matmul_w8a8(
    x: Float[Array, "*g m k"],
    elements: Float8e4m3fn[Array, "*g np kp"],
    scales: UInt8[Array, "*g size"],
    *,
    n: int,
    out_dtype: DTypeLike,
    tactic: int = -1,
) -> Float[Array, "*g m {n}"]:
    """Computes `q(x) @ w.T`, with one call for each group.

    Args:
        x: `[*g, m, k]`, bfloat16 or float16.
        elements: Of the prepared weight, `[*g, np, kp]`; kp may exceed k, which pads.
        scales: Of the prepared weight, `[*g, size]`.
        n: Rows of the weight before it was padded.
        out_dtype: bfloat16 or float16.
        tactic: Which of `num_tactics` kernels; -1 for FlashInfer's default.

    Returns:
        `[*g, m, n]`.
    """
    *groups, m, _ = x.shape
    if x.size == 0:
        return jnp.zeros((*groups, m, n), out_dtype)
    if groups:
        return jnp.stack(
            [
                matmul_w8a8(*group, n=n, out_dtype=out_dtype, tactic=tactic)
                for group in zip(x, elements, scales, strict=True)
            ]
        )
    padded_n, padded_k = elements.shape
    x_elements, x_scales = quantize.mxfp8_quantize(
        quantize.pad_last(x, padded_k), "128x4"
    )
    (out,) = _kernel(quantize.capability())(
        x=x_elements,
        w=elements,
        x_scales=x_scales,
        w_scales=scales,
        out=Output((m, padded_n), out_dtype),
        workspace=Workspace(_WORKSPACE_BYTES),
        tactic=tactic,
    )
    return out[:, :n]

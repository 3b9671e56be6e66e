"""FlashInfer's Blackwell kernels in numpy, on host memory, in their own layouts.

Written from the description of what the kernels read and write, so that a layer that
runs through them shows whether weights, scales and arguments are where they belong.
"""

import ctypes
import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import tvm_ffi

from jmx8 import _device
from jmx8.kernels.flashinfer import cutlass_moe, dense, modules, quantize

from .helpers import model_quantize


def use(monkeypatch, capability=(10, 0)):
    """Makes the device claim to be a Blackwell whose kernels are these functions."""
    monkeypatch.setattr(_device, "compute_capability", lambda: capability)
    monkeypatch.setattr(modules, "unavailable", lambda module, capability: None)
    monkeypatch.setattr(quantize, "_has_older_gpu", lambda: False)
    for module, function in (
        (quantize, mxfp8_quantize),
        (dense, mxfp8_gemm),
        (cutlass_moe, run_moe),
    ):
        original = module._kernel

        def emulated(*key, original=original, function=function):
            load = lambda: tvm_ffi.convert(function)
            return dataclasses.replace(original(*key), load=load, platform="cpu")

        monkeypatch.setattr(module, "_kernel", emulated)
    monkeypatch.setattr(cutlass_moe, "runner", lambda *key: _Runner())


class _Runner(dict):
    def __missing__(self, name):
        assert name == "get_workspace_size"
        return lambda *sizes: 256


def host(tensor) -> Any:
    """Returns a numpy array on the tensor's memory; numpy's DLPack has no FP8."""
    dtype = jnp.dtype(str(tensor.dtype))
    size = math.prod(tensor.shape) * dtype.itemsize
    memory = (ctypes.c_uint8 * size).from_address(tensor.data_ptr())
    return np.frombuffer(memoryview(memory), dtype).reshape(tuple(tensor.shape))


def e4m3(tensor):
    """Returns the values of an E4M3 tensor."""
    return host(tensor).astype(np.float64)


def offsets(rows, blocks):
    """Returns where the 128x4 layout has the scale of each row and block."""
    m, k = np.indices((rows, blocks))
    tile = (m // 128) * -(-blocks // 4) + k // 4
    return tile * 512 + (m % 32) * 16 + (m % 128 // 32) * 4 + k % 4


def wide(elements, scales):
    """Returns the values of a matrix, its scales 128x4-swizzled bytes."""
    rows, columns = elements.shape
    codes = scales.reshape(-1)[offsets(rows, columns // 32)].astype(np.float64)
    return elements * np.repeat(2.0 ** (codes - 127), 32, axis=1)


def mxfp8_quantize(x, elements, scales, layout, alignment, enable_pdl):
    assert (layout, alignment) == (0, 32)
    rows = host(x).astype(np.float64).reshape(-1, x.shape[-1])
    codes, scale_codes = model_quantize(rows)
    host(elements).view(np.uint8)[...] = codes.reshape(elements.shape)
    out = host(scales)
    out[...] = 0
    out[offsets(*scale_codes.shape)] = scale_codes


def mxfp8_gemm(x, w, x_scales, w_scales, out, workspace, tactic):
    (n, k), m = w.shape, x.shape[0]
    assert n >= 128 and k >= 128 and n % 32 == 0 and k % 32 == 0
    product = wide(e4m3(x), host(x_scales)) @ wide(e4m3(w), host(w_scales)).T
    assert product.shape == (m, n)
    host(out)[...] = product.astype(np.float32).astype(host(out).dtype)


def run_moe(*arguments):
    given = dict(zip(cutlass_moe._ARGUMENTS, arguments, strict=True))
    out, ids = host(given["out"]), host(given["topk_ids"])
    round_to = lambda a: a.astype(np.float32).astype(out.dtype).astype(np.float64)
    scales13, ones13, scales2, ones2 = map(host, given["quant_scales"])
    assert np.all(ones13 == 1) and np.all(ones2 == 1)
    w13, w2 = e4m3(given["w13"]), e4m3(given["w2"])
    num_experts = w2.shape[0]
    x = wide(e4m3(given["x"]), host(given["x_scales"]))
    bias = lambda name, e: 0.0 if given[name] is None else host(given[name])[e]
    sums = np.zeros(out.shape)
    for t, (chosen, factors) in enumerate(
        zip(ids, host(given["topk_weights"]), strict=True)
    ):
        for e, factor in zip(chosen, factors, strict=True):
            if e >= num_experts:  # of the other shard
                continue
            h = round_to(wide(w13[e], scales13[e].view(np.uint8)) @ x[t])
            h = round_to(activate(h + bias("w13_bias", e), given))
            codes, scale_codes = model_quantize(h[None])
            values = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
            h = values * np.repeat(2.0 ** (scale_codes.astype(float) - 127), 32, axis=1)
            y = round_to(wide(w2[e], scales2[e].view(np.uint8)) @ h[0])
            sums[t] += factor * (y + bias("w2_bias", e))
    out[...] = sums.astype(np.float32).astype(out.dtype)


def activate(h, given):
    if given["activation_type"] == 6:
        return np.maximum(h, 0) ** 2
    assert given["activation_type"] == 3
    up, gate = np.split(h, 2)
    alpha, beta, limit = (
        None if given[name] is None else host(given[name])[0]
        for name in ("swiglu_alpha", "swiglu_beta", "swiglu_limit")
    )
    if limit is not None:
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    gate = gate / (1 + np.exp(-(1 if alpha is None else alpha) * gate))
    return gate * (up + (0 if beta is None else beta))

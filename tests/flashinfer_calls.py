"""What jmx8 passes to FlashInfer's kernels, recorded on a machine that has no GPU.

The backends run as they are, under `jax.jit`. The device claims to be a B200, and what
would load a compiled function loads one that notes its arguments and writes results
that the test gives.
"""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import tvm_ffi

from jmx8 import _device, quantize as reference_quantize, SwiGLUOAI
from jmx8.kernels.flashinfer import (
    cutlass_moe,
    dense,
    modules,
    prepare,
    quantize,
    trtllm_moe,
)
from jmx8.kernels.flashinfer.layouts import swizzle_scales

from .flashinfer_recorder import Argument, CAPABILITY, describe


Calls = list[tuple[str, list[Argument]]]


def to_torch(a: jax.Array) -> torch.Tensor:
    """Returns the array as a tensor with the same bytes."""
    data = np.asarray(a)
    data = torch.from_numpy(data.reshape(-1).view(np.uint8).copy())
    return data.view(getattr(torch, a.dtype.name)).reshape(a.shape)


def quantized(x: jax.Array, layout: str) -> tuple[jax.Array, jax.Array]:
    """Returns what FlashInfer's quantizer returns: elements and flat scales."""
    q = reference_quantize(x)
    scales = jax.lax.bitcast_convert_type(q.scales, jnp.uint8)
    if layout == "linear":
        return q.elements, scales.reshape(-1)
    return q.elements, swizzle_scales(scales, 128 if layout == "128x4" else 8)


def _describe(value: Any) -> Argument:
    if isinstance(value, tvm_ffi.Tensor):
        return describe(torch.from_dlpack(value))
    if isinstance(value, tvm_ffi.Array):
        return Argument("list", value=[_describe(item) for item in value])
    return describe(value)


class Runner:
    """Stands for the runner that `cutlass_fused_moe`'s module makes."""

    def __init__(self, run_moe: Callable[..., None], workspace: int):
        self._functions = {
            "run_moe": tvm_ffi.convert(run_moe),
            "get_workspace_size": self._size,
        }
        self._workspace = workspace
        self.sized: list[tuple] = []

    def _size(self, *args):
        self.sized.append(args)
        return self._workspace

    def __getitem__(self, name: str):
        return self._functions[name]


@contextlib.contextmanager
def recorded(capability=CAPABILITY, *, results: dict[str, Any] | None = None):
    """Runs jmx8's Blackwell backends against recorders.

    Args:
        capability: What the device claims to be.
        results: For a function's name, what it writes to each of its outputs: pairs of
            a position and an array.

    Yields:
        The calls: pairs of a function's name and its arguments.
    """
    calls: Calls = []

    def recorder(name):
        def function(*args):
            calls.append((name, [_describe(arg) for arg in args]))
            for position, array in (results or {}).get(name, ()):
                target = torch.from_dlpack(args[position]).view(torch.uint8)
                target.copy_(to_torch(array).view(torch.uint8).reshape(target.shape))

        return function

    def load(module, capability):
        if module in (modules.CUTLASS_MOE_SM100, modules.CUTLASS_MOE_SM103):
            return {"init": init}
        name = {
            modules.QUANTIZATION: "mxfp8_quantize",
            modules.TRTLLM_MOE: "trtllm_fp8_block_scale_moe",
        }.get(module, "mxfp8_gemm")
        return {name: tvm_ffi.convert(recorder(name))}

    def init(*args):
        dtypes = [getattr(torch, str(arg)) for arg in args[:3]]
        calls.append(("init", [*map(describe, (*dtypes, *args[3:]))]))
        return Runner(recorder("run_moe"), 12_345)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_device, "compute_capability", lambda: capability)
        patch.setattr(modules, "load", load)
        patch.setattr(modules, "unavailable", lambda module, capability: None)
        # A kernel that was registered stays, so each of these is one of its own.
        patch.setattr(cutlass_moe, "runner", inspect.unwrap(cutlass_moe.runner))
        for backend in (quantize, dense, cutlass_moe, trtllm_moe):
            patch.setattr(backend, "_kernel", _on_cpu(inspect.unwrap(backend._kernel)))
        yield calls


def _on_cpu(kernel):
    made = {}

    def make(*key):
        if key not in made:
            made[key] = dataclasses.replace(kernel(*key), platform="cpu")
        return made[key]

    return make


def normal(seed, shape, dtype=jnp.bfloat16):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def assert_same_call(actual, expected, names, uninitialized=("out",)):
    """Compares two records; of what a kernel only writes, no bytes."""
    assert len(actual) == len(expected) == len(names)
    for position, (ours, theirs, name) in enumerate(
        zip(actual, expected, names, strict=True), start=1
    ):
        if name in uninitialized:
            ours, theirs = ours._replace(value=None), theirs._replace(value=None)
        assert ours == theirs, f"argument {position}, {name}"


HIDDEN, INNER, EXPERTS, TOP_K = 256, 128, 8, 2
SHAPES = [(1, HIDDEN, INNER), (5, 320, 96), (130, HIDDEN, INNER)]
ACTIVATIONS = ["silu", "swigluoai", SwiGLUOAI(1.0, 0.0, None), "relu2"]


class Layer:
    """The operands of an MoE layer, and FlashInfer's view of them."""

    def __init__(self, tokens, hidden, inner, activation, dtype=jnp.bfloat16):
        self.activation = activation
        halves = 1 if activation == "relu2" else 2
        self.gated = halves == 2
        self.x = normal(1, (tokens, hidden), dtype)
        self.w13 = reference_quantize(normal(2, (EXPERTS, halves * inner, hidden)))
        self.w2 = reference_quantize(normal(3, (EXPERTS, hidden, inner)))
        keys = jax.random.split(jax.random.key(4), tokens)
        draw = lambda key: jax.random.permutation(key, jnp.arange(-1, EXPERTS + 1))
        self.ids = jax.vmap(draw)(keys)[:, :TOP_K].astype(jnp.int32)
        self.weights = jax.random.uniform(jax.random.key(5), (tokens, TOP_K))
        self.w13_bias = normal(6, (EXPERTS, halves * inner), dtype)
        self.w2_bias = normal(7, (EXPERTS, hidden), dtype)
        padded = prepare.padded_moe_size(hidden) - hidden
        self.x_padded = jnp.pad(self.x, [(0, 0), (0, padded)])

    def prepared(self, layout):
        """Returns elements and scales of both weights."""
        return (
            *layout(self.gated).prepare(self.w13),
            *layout(False).prepare(self.w2),
        )

    def prepared_biases(self, layout):
        biases = ((self.w13_bias, self.gated), (self.w2_bias, False))
        return tuple(layout(gated).prepare(bias)[0] for bias, gated in biases)

    @property
    def torch_activation(self):
        return {"relu2": 6, "gelu": 4, "gelu_tanh": 8}.get(self.activation, 3)

    def swiglu(self):
        """Returns alpha, beta and limit as FlashInfer's wrappers take them."""
        oai = SwiGLUOAI() if self.activation == "swigluoai" else self.activation
        if not isinstance(oai, SwiGLUOAI):
            return None, None, None
        full = lambda value: None if value is None else torch.full((EXPERTS,), value)
        return full(oai.alpha), full(oai.beta), full(oai.limit)

"""FlashInfer's compiled checks accept jmx8's calls and refuse mistakes.

The real modules are called from JAX through the seam, with buffers in host memory that
claim to be on a GPU. Every check of theirs runs; a call that passes them all ends where
a kernel would be launched, since there is no driver.
"""

import ctypes
import dataclasses
import functools
import inspect
import re
import subprocess
from typing import Any

import jax
import jax.numpy as jnp
import pytest


tvm_ffi = pytest.importorskip("tvm_ffi")
pytest.importorskip("jax_tvm_ffi")

from jmx8 import _device, quantize as reference_quantize
from jmx8.kernels._ffi import Kernel, Output, Workspace
from jmx8.kernels.flashinfer import dense, modules, prepare, quantize
from jmx8.kernels.flashinfer.layouts import swizzle_scales


pytestmark = pytest.mark.cpu


ARCH, CAPABILITY = "10.0a", (10, 0)


def has_driver():
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


if has_driver():
    pytest.skip(
        "a GPU would be given pointers to host memory: there must be no CUDA driver",
        allow_module_level=True,
    )

# Passes a function's buffers on as if they were on the first GPU.
RELABEL = """
#include <tvm/ffi/tvm_ffi.h>
#include <vector>
namespace ffi = tvm::ffi;

ffi::Function relabel(ffi::Function function) {
  return ffi::Function::FromPacked(
      [function](const ffi::AnyView* args, int32_t num_args, ffi::Any* result) {
        std::vector<ffi::AnyView> views(args, args + num_args);
        std::vector<DLTensor> tensors;
        tensors.reserve(num_args);
        for (ffi::AnyView& view : views) {
          if (auto tensor = view.try_cast<DLTensor*>()) {
            tensors.push_back(**tensor);
            tensors.back().device = DLDevice{kDLCUDA, 0};
            view = &tensors.back();
          }
        }
        function.CallPacked(views.data(), num_args, result);
      });
}
TVM_FFI_DLL_EXPORT_TYPED_FUNC(relabel, relabel);
"""


@pytest.fixture(scope="session")
def relabel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("relabel")
    source, library = folder / "relabel.cc", folder / "relabel.so"
    source.write_text(RELABEL)
    includes = [f"-I{path}" for path in tvm_ffi.libinfo.include_paths()]
    flags = ["-std=c++17", "-shared", "-fPIC"]
    subprocess.run(["g++", *flags, *includes, source, "-o", library], check=True)
    return tvm_ffi.load_module(str(library))["relabel"]


@functools.cache
def load(module):
    path = modules.find(module, ARCH)
    if path is None:
        pytest.skip(
            f"FlashInfer's {module.name} is not built for {ARCH}; "
            f"`jmx8 build-kernels --arch {ARCH} --module {module.name}` builds it"
        )
    modules.preload_libraries(path)
    return tvm_ffi.load_module(str(path))


@pytest.fixture
def on_host(relabel, monkeypatch):
    """Returns a function that makes a kernel's real function take host buffers."""
    monkeypatch.setattr(_device, "compute_capability", lambda: CAPABILITY)
    monkeypatch.setattr(modules, "unavailable", lambda module, capability: None)

    def on_host(kernel: Kernel, module: modules.Module, name: str) -> Kernel:
        function = load(module)[name]
        load_it = lambda: relabel(function)
        return dataclasses.replace(kernel, load=load_it, platform="cpu")

    return on_host


def error_of(run, *operands):
    with pytest.raises(jax.errors.JaxRuntimeError) as info:
        jax.block_until_ready(jax.jit(run)(*operands))
    return str(info.value)


@pytest.fixture
def quantizer(on_host):
    kernel = inspect.unwrap(quantize._kernel)(CAPABILITY)
    return on_host(kernel, modules.QUANTIZATION, "mxfp8_quantize")


# Where FlashInfer first asks the driver for something: past all of its checks but one,
# of the dtype, which the shape of the launch comes before.
NO_DRIVER = "cudaGetDevice.*CUDA driver version is insufficient"


@pytest.mark.parametrize("layout", ["128x4", "8x4", "linear"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("shape", [(1, 32), (130, 96), (2, 3, 64)])
def test_quantizer_accepts_our_calls(quantizer, monkeypatch, layout, dtype, shape):
    monkeypatch.setattr(quantize, "_kernel", lambda capability: quantizer)
    x = jnp.ones(shape, dtype)
    message = error_of(lambda x: quantize.mxfp8_quantize(x, layout), x)
    assert re.search(NO_DRIVER, message), message


@pytest.mark.parametrize(
    "change, message",
    [
        ({}, NO_DRIVER),
        ({"x": jnp.ones((4, 48), jnp.bfloat16)}, "k must be divisible by SF_VEC_SIZE"),
        ({"x": jnp.ones(64, jnp.bfloat16)}, "Input should be >=2D tensor"),
        ({"alignment": 33}, "alignment must be divisible by SF_VEC_SIZE"),
        ({"enable_pdl": None}, "Expected `bool` but got `None`"),
    ],
)
def test_quantizer_refuses_mistakes(quantizer, change, message):
    right = {
        "x": jnp.ones((4, 64), jnp.bfloat16),
        "elements": Output((4, 64), jnp.float8_e4m3fn),
        "scales": Output((512,), jnp.uint8),
        "layout": 0,
        "alignment": 32,
        "enable_pdl": True,
    }
    found = error_of(lambda: quantizer(**(right | change)))
    assert re.search(message, found), found


@pytest.fixture
def gemm(on_host):
    kernel = inspect.unwrap(dense._kernel)(CAPABILITY)
    return on_host(kernel, modules.GEMM, "mxfp8_gemm")


# Descriptors for the copies of a launch cannot be made without a driver.
LAUNCH = "Failed to initialize cutlass MXFP8 gemm on sm100. Error: Error Internal"


def quantize_in_xla(x, layout):
    assert layout == "128x4"
    q = reference_quantize(x)
    return q.elements, swizzle_scales(jax.lax.bitcast_convert_type(q.scales, jnp.uint8))


@pytest.mark.parametrize(
    "m, n, k",
    [(1, 128, 128), (3, 96, 64), (128, 160, 288), (129, 130, 512), (1000, 4096, 96)],
)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_gemm_accepts_our_calls(gemm, monkeypatch, m, n, k, dtype):
    monkeypatch.setattr(dense, "_kernel", lambda capability: gemm)
    monkeypatch.setattr(quantize, "mxfp8_quantize", quantize_in_xla)
    x, w = jnp.ones((m, k), dtype), reference_quantize(jnp.ones((n, k)))
    weight = prepare.dense_cutlass().prepare(w)
    run = lambda x, *weight: dense.matmul_w8a8(x, *weight, n=n, out_dtype=dtype)
    assert LAUNCH in error_of(run, x, *weight)


def fp8(*shape):
    return jnp.ones(shape, jnp.float8_e4m3fn)


def gemm_arguments(m=3, n=160, k=288, **changes: Any):
    """Returns the arguments of a right call, or of one with changes."""
    scales = lambda rows: jnp.ones(-(-rows // 128) * 128 * 12, jnp.uint8)
    return {
        "x": fp8(m, k),
        "w": fp8(n, k),
        "x_scales": scales(m),
        "w_scales": scales(n),
        "out": Output((m, n), jnp.bfloat16),
        "workspace": Workspace(1024),
        "tactic": -1,
    } | changes


def test_gemm_has_all_its_tactics(gemm, monkeypatch):
    monkeypatch.setattr(modules, "load", lambda module, capability: load(module))
    count = dense.num_tactics(CAPABILITY)
    assert count == 32
    for tactic in range(-1, count):
        arguments = gemm_arguments(tactic=tactic)
        assert LAUNCH in error_of(lambda: gemm(**arguments)), tactic  # noqa: B023


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "w is [k, n]": ({"w": fp8(288, 160)}, "mat1 and mat2 shapes cannot be multiplied"),
    "x is 1-D": ({"x": fp8(288)}, "mat1 must be a matrix or a batch of matrices"),
    "x is not FP8": (
        {"x": jnp.ones((3, 288), jnp.bfloat16)},
        "Inconsistency of Tensor type: mat1",
    ),
    "w is not E4M3": (
        {"w": jnp.ones((160, 288), jnp.float8_e5m2)},
        "Inconsistency of Tensor type: mat2",
    ),
    "scales of x are E8M0": (
        {"x_scales": jnp.ones(1536, jnp.float8_e8m0fnu)},
        "Inconsistency of Tensor type: mat1Scale",
    ),
    "scales of w are float32": (
        {"w_scales": jnp.ones(3072, jnp.float32)},
        "Inconsistency of Tensor type: mat2Scale",
    ),
    "scales of x are linear": (
        {"x_scales": jnp.ones(3 * 9, jnp.uint8)},
        "mat1Scale size mismatch, expected 1536, got 27",
    ),
    "scales of w are too many": (
        {"w_scales": jnp.ones(4096, jnp.uint8)},
        "mat2Scale size mismatch, expected 3072, got 4096",
    ),
    "out is transposed": (
        {"out": Output((160, 3), jnp.bfloat16)},
        "out shape mismatch at dimension 0: expected 3, got 160",
    ),
    "out is float32": (
        {"out": Output((3, 160), jnp.float32)},
        "out_dtype must be one of fp16/bf16",
    ),
    "out has an axis too many": (
        {"out": Output((1, 3, 160), jnp.bfloat16)},
        "out must have 2 dimensions, but got 3",
    ),
    "no such tactic": ({"tactic": 99}, "tactic must be between 0 and 32"),
    "tactic is None": ({"tactic": None}, "Expected `int` but got `None`"),
    "n is odd": ({"n": 130}, "Expected n to be divisible by 32"),
    "k is odd": ({"k": 272}, "Expected k to be divisible by 32"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_gemm_refuses_mistakes(gemm, name):
    changes, message = MISTAKES[name]
    found = error_of(lambda: gemm(**gemm_arguments(**changes)))
    assert message in found, found

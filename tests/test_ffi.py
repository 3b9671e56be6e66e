"""The FFI seam, with functions on host memory in place of kernels."""

import dataclasses
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest


tvm_ffi = pytest.importorskip("tvm_ffi")
jax_tvm_ffi = pytest.importorskip("jax_tvm_ffi")

from jmx8.kernels import _adapter
from jmx8.kernels._ffi import Kernel, Output, Workspace


pytestmark = pytest.mark.cpu

# Allocates and returns memory as FlashInfer's launchers do.
ALLOCATING = """
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/tvm_ffi.h>
namespace ffi = tvm::ffi;

ffi::Array<ffi::Tensor> fill(ffi::Tensor out, int64_t size, double value) {
  auto scratch = ffi::Tensor::FromEnvAlloc(
      TVMFFIEnvTensorAlloc, {size}, out.dtype(), out.device());
  auto* from = static_cast<float*>(scratch.data_ptr());
  for (int64_t i = 0; i < size; ++i) from[i] = value;
  auto* to = static_cast<float*>(out.data_ptr());
  for (int64_t i = 0; i < out.size(0); ++i) to[i] = from[i % size];
  return {out, scratch};
}
TVM_FFI_DLL_EXPORT_TYPED_FUNC(fill, fill);
"""


def make_kernel(function, arguments, name="test.function"):
    return Kernel(name, lambda: tvm_ffi.convert(function), arguments, platform="cpu")


def host(buffer) -> Any:
    """Returns the buffer as a numpy array that shares its memory."""
    return np.from_dlpack(buffer)


def make_recorder(arguments):
    """Returns a kernel and the list that its calls are noted in."""
    calls = []

    def read(value):
        if isinstance(value, tvm_ffi.Array):
            return [read(item) for item in value]
        # A copy: a buffer must not outlive its call.
        is_tensor = isinstance(value, tvm_ffi.Tensor)
        return host(value).copy() if is_tensor else value

    return make_kernel(lambda *args: calls.append([*map(read, args)]), arguments), calls


def add_one(x, out):
    host(out)[...] = host(x) + 1


ADD_ONE = make_kernel(add_one, ("x", "out"), "test.add_one")


def call_add_one(x):
    return ADD_ONE(x=x, out=Output(x.shape, x.dtype))[0]


def test_every_kind_of_argument_arrives_in_its_place():
    names = ("a", "out", "none", "yes", "one", "half", "text", "ints", "empty")
    kernel, calls = make_recorder((*names, "pair", "scratch", "b"))
    a, b = jnp.arange(6, dtype=jnp.float32).reshape(2, 3), jnp.ones(4, jnp.int8)
    constants = {"none": None, "yes": True, "one": 1, "half": 0.5}
    long = "longer than seven bytes " * 9
    (out,) = jax.jit(
        lambda a, b: kernel(
            a=a,
            b=b,
            pair=(b, a),
            scratch=Workspace(96),
            out=Output((5,), jnp.float16),
            **constants,
            text=long,
            ints=(-1, 7),
            empty=(),
        )
    )(a, b)
    assert (out.shape, out.dtype) == ((5,), jnp.float16)
    (call,) = calls
    call = dict(zip(kernel.arguments, call, strict=True))
    for name, value in constants.items():
        assert call[name] is value or (call[name], type(call[name])) == (value, float)
    assert [call[name] for name in ("text", "ints", "empty")] == [long, [-1, 7], []]
    np.testing.assert_array_equal(call["a"], a)
    np.testing.assert_array_equal(call["b"], b)
    for actual, expected in zip(call["pair"], (b, a), strict=True):
        np.testing.assert_array_equal(actual, expected)
    assert (call["scratch"].shape, call["scratch"].dtype) == ((96,), np.uint8)
    assert (call["out"].shape, call["out"].dtype) == ((5,), np.float16)


def test_constants_are_told_apart_by_type():
    kernel, calls = make_recorder(("out", "value"))
    for value in (1, True, 1.0, 0, False, -1):
        kernel(out=Output((), jnp.float32), value=value)
    assert [repr(value) for _, value in calls] == "1 True 1.0 0 False -1".split()


def test_registers_once_for_each_plan():
    kernel, _ = make_recorder(("x", "out", "tactic"))
    call = lambda x, tactic: kernel(x=x, out=Output((1,), x.dtype), tactic=tactic)
    call(jnp.ones(3), 0)
    before = jax_tvm_ffi.registered_count()
    for shape in ((3,), (4,), (2, 2)):
        jax.jit(lambda x: call(x, 0))(jnp.ones(shape))
    assert jax_tvm_ffi.registered_count() == before
    call(jnp.ones(3), 1)
    assert jax_tvm_ffi.registered_count() == before + 1


def test_same_target_in_every_process():
    lowered = jax.jit(call_add_one).lower(jnp.ones(2)).as_text()
    assert "@jmx8.test.add_one.f389e9e6" in lowered


@pytest.mark.parametrize(
    "bindings, message",
    [
        ({"x": 1.0}, r"missing=\['out'\], surplus=\[\]"),
        ({"x": 1, "out": 2, "y": 3}, r"missing=\[\], surplus=\['y'\]"),
        ({"x": [1, 2], "out": None}, r"x must be an array, Output, .* got \[1, 2\]"),
        ({"x": (1, 2.0), "out": None}, r"x must be .* tuple of ints or of arrays"),
        ({"x": np.ones(3), "out": None}, r"x must be an array"),
    ],
)
def test_wrong_bindings_raise_before_the_call(bindings, message):
    with pytest.raises(TypeError, match=message):
        ADD_ONE(**bindings)


@pytest.mark.parametrize(
    "dtype",
    "float8_e4m3fn float8_e8m0fnu bfloat16 float16 float32 uint8 int32 bool".split(),
)
def test_buffers_are_shared_not_copied(dtype):
    addresses = []
    note = lambda *buffers: addresses.extend(b.data_ptr() for b in buffers)
    kernel = make_kernel(note, ("x", "out"))
    x = jax.random.bits(jax.random.key(0), (64,), jnp.uint8)
    x = (x & 1).astype(bool) if dtype == "bool" else x.view(jnp.dtype(dtype))
    (out,) = jax.jit(lambda x: kernel(x=x, out=Output((256,), dtype)))(x)
    pointers = [a.unsafe_buffer_pointer() for a in (x, out)]
    assert addresses == pointers


def test_aliased_output_works_in_place():
    def double(x):
        host(x)[...] *= 2

    # The function takes the buffer once; the plan gives it twice.
    kernel = make_kernel(lambda x, out: double(out), ("x", "out"), "test.double")
    call = lambda x: kernel(x=x, out=Output(x.shape, x.dtype, alias="x"))[0]
    x = jnp.arange(1024, dtype=jnp.float32)
    np.testing.assert_array_equal(jax.jit(call)(x), 2 * np.arange(1024))
    np.testing.assert_array_equal(x, np.arange(1024))  # not donated: XLA copies
    pointer = x.unsafe_buffer_pointer()
    out = jax.jit(call, donate_argnums=0)(x)
    assert out.unsafe_buffer_pointer() == pointer


@pytest.fixture(scope="module")
def fill(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fill")
    source, library = folder / "fill.cc", folder / "fill.so"
    source.write_text(ALLOCATING)
    includes = [f"-I{path}" for path in tvm_ffi.libinfo.include_paths()]
    flags = ["-std=c++17", "-shared", "-fPIC"]
    command = ["g++", *flags, *includes, str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    module = tvm_ffi.load_module(str(library))
    return Kernel("test.fill", lambda: module["fill"], ("out", "size", "value"), "cpu")


def test_arena_serves_allocations_and_results_are_dropped(fill):
    call = lambda size, arena: fill(
        out=Output((4,), jnp.float32), size=size, value=3.0, arena=arena
    )
    # Twice in one program: the arena is free again after each call.
    outs = jax.jit(lambda: [*call(100, 512), *call(128, 512)])()
    np.testing.assert_array_equal(outs, np.full((2, 4), 3, np.float32))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"requested 516 .* 512"):
        jax.block_until_ready(call(129, 512))
    with pytest.raises(jax.errors.JaxRuntimeError, match="allocator is nullptr"):
        jax.block_until_ready(call(1, 0))


def test_error_keeps_its_message_and_the_process_goes_on():
    def refuse(x, out):
        raise ValueError(f"x must have 3 axes, got {x.ndim}")

    kernel = make_kernel(refuse, ("x", "out"), "test.refuse")
    call = jax.jit(lambda x: kernel(x=x, out=Output((1,), x.dtype)))
    for _ in range(2):
        with pytest.raises(jax.errors.JaxRuntimeError, match="3 axes, got 1"):
            jax.block_until_ready(call(jnp.ones(2)))
    np.testing.assert_array_equal(call_add_one(jnp.ones(2)), [2, 2])


def test_scan_eval_shape_and_no_elements():
    x = jnp.zeros((2, 3))
    final, _ = jax.lax.scan(lambda c, _: (call_add_one(c), None), x, length=5)
    np.testing.assert_array_equal(final, np.full((2, 3), 5))
    assert jax.eval_shape(call_add_one, x) == jax.ShapeDtypeStruct((2, 3), x.dtype)
    assert jax.jit(call_add_one)(x[:0]).shape == (0, 3)


def test_transformations_without_a_rule_raise():
    x = jnp.ones((2, 3))
    with pytest.raises(NotImplementedError, match=r"no batching rule\. Use"):
        jax.vmap(call_add_one)(x)
    with pytest.raises(NotImplementedError, match="ifferentiation"):
        jax.grad(lambda x: jnp.sum(call_add_one(x)))(x)


def test_export_for_a_gpu_needs_none():
    on_gpu = dataclasses.replace(ADD_ONE, platform="gpu", name="test.on_gpu")
    call = jax.jit(lambda x: on_gpu(x=x, out=Output(x.shape, x.dtype)))
    disabled = [jax.export.DisabledSafetyCheck.custom_call("jmx8.test.on_gpu.f389e9e6")]
    exported = jax.export.export(call, platforms=["cuda"], disabled_checks=disabled)
    module = exported(jax.ShapeDtypeStruct((4,), jnp.float32)).mlir_module()
    assert "custom_call @jmx8.test.on_gpu" in module


def test_mesh_refuses_sharded_operands_outside_shard_map():
    command = [sys.executable, "-m", "tests.sharded_ffi"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_adapter_is_built_once_and_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("JMX8_CACHE_DIR", str(tmp_path))
    assert _adapter.adapter_unavailable() is None
    path = _adapter.make_once(_adapter.adapter_path(), _adapter._compile)
    built = path.stat().st_mtime_ns
    assert _adapter.make_once(_adapter.adapter_path(), _adapter._compile) == path
    assert path.stat().st_mtime_ns == built
    assert [p.name for p in path.parent.glob("[!.]*")] == [path.name]
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert _adapter.adapter_unavailable() is None


def test_missing_compiler_is_explained(tmp_path, monkeypatch):
    monkeypatch.setenv("JMX8_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "there is no C++ compiler" in (_adapter.adapter_unavailable() or "")
    with pytest.raises(RuntimeError, match="install g\\+\\+ or set CXX"):
        _adapter.make_once(_adapter.adapter_path(), _adapter._compile)
    assert not _adapter.adapter_path().exists()

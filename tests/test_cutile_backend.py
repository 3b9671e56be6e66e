"""Tests of where the cuTile backends run, and of what is compiled for them."""

import functools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from jmx8 import quantize
from jmx8.kernels._prepared import prepare_weights
from jmx8.kernels.cutile import _backend, _cubins, _launch, ahead, dense, moe
from jmx8.kernels.flashinfer import _version, prepare
from jmx8.kernels.sm90 import library

from .test_cutile import moe_operands, MOE_OPTIONS


def reason_of(unsupported, *operands):
    """Asks while tracing, as the ops do."""
    reasons = []
    jax.eval_shape(lambda *a: reasons.append(unsupported(*a)), *operands)
    return reasons[0]


@pytest.fixture
def hopper(monkeypatch):
    """Makes the backends believe in an H200 without jmx8's own kernels."""
    monkeypatch.setattr("jmx8._device.compute_capability", lambda: (9, 0))
    monkeypatch.setattr(library, "why_not_here", lambda: "left out")
    monkeypatch.setattr(_version, "installed_version", lambda package: "1.7.0")


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("JMX8_CACHE_DIR", str(tmp_path))
    return tmp_path


def put(cubin, compiler=_cubins.TUNED_COMPILER):
    path = _cubins.path_of(cubin, compiler)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(compiler.encode())
    return path


class TestCache:
    def cubin(self):
        return _launch.Cubin("moe", "_f", "sm_90", (("occupancy", 2),), ())

    def test_prefers_the_compiler_that_tiles_are_for(self, cache):
        assert _cubins.find(self.cubin()) is None
        other = put(self.cubin(), "13.5.37")
        assert _cubins.find(self.cubin()) == other
        tuned = put(self.cubin())
        assert _cubins.find(self.cubin()) == tuned
        assert _cubins.load(self.cubin()) == _cubins.TUNED_COMPILER.encode()
        assert _cubins.missing([self.cubin()]) == []

    def test_a_failed_compilation_says_why(self, cache, monkeypatch):
        script = "import sys; sys.exit('no compiler')"
        monkeypatch.setattr(sys, "executable", sys.executable)
        run = subprocess.run
        monkeypatch.setattr(
            subprocess,
            "run",
            lambda command, **options: run([command[0], "-c", script], **options),
        )
        with pytest.raises(RuntimeError, match=r"(?s)1 cuTile kernels.*no compiler"):
            _cubins.load(self.cubin())

    @pytest.mark.parametrize(
        ("version", "reason"),
        [
            (None, "FlashInfer is not installed"),
            ("0.8.0", r"0\.8\.0 is installed and jmx8 works with 0\.7\.2"),
        ],
    )
    def test_why_not_compile(self, version, reason, monkeypatch):
        monkeypatch.setattr(_version, "installed_version", lambda *_: version)
        assert re.search(reason, _cubins.why_not_compile() or "")


class TestUnsupported:
    def why_not(self, *operands, w13_bias=None, w2_bias=None):
        operands = (*operands, w13_bias, w2_bias)
        return reason_of(functools.partial(moe.unsupported, **MOE_OPTIONS), *operands)

    @pytest.mark.cpu
    def test_other_devices(self):
        assert "compute capability 8.9, 9.0" in self.why_not(*moe_operands())
        assert "compute capability 8.9, 9.0" in self.why_not_dense(4)

    def test_cuda_tile_missing(self, hopper, monkeypatch):
        monkeypatch.setattr(_version, "installed_version", lambda *_: None)
        assert "cuda-tile" in self.why_not(*moe_operands())

    def test_operands(self, hopper):
        x, w13, w2, ids, weights = moe_operands()
        bias = jax.ShapeDtypeStruct((4, 64), jnp.float32)
        plain = jax.ShapeDtypeStruct(w2.shape, jnp.bfloat16)
        wide = jax.ShapeDtypeStruct(x.shape, jnp.float32)
        assert "biases" in self.why_not(x, w13, w2, ids, weights, w2_bias=bias)
        assert "not MXFP8" in self.why_not(x, w13, plain, ids, weights)
        assert "x is float32" in self.why_not(wide, w13, w2, ids, weights)
        assert "32 bits" in self.why_not(*moe_operands(t=1 << 30))
        padded = jax.eval_shape(
            quantize, jax.ShapeDtypeStruct((4, 64, 100), jnp.bfloat16)
        )
        assert "multiple of 32" in self.why_not(x, w13, padded, ids, weights)

    def test_weights_of_another_layout(self, hopper):
        w = jax.eval_shape(quantize, jax.ShapeDtypeStruct((64, 64), jnp.bfloat16))
        layout = prepare.dense_cutlass()
        w = jax.eval_shape(lambda w: prepare_weights(w, layout), w)
        x = jax.ShapeDtypeStruct((4, 64), jnp.bfloat16)
        options = {"out_dtype": jnp.dtype(jnp.bfloat16)}
        reason = reason_of(functools.partial(dense.unsupported, **options), x, w)
        assert "laid out for mxfp8_gemm" in reason

    def test_kernels_not_compiled(self, hopper, cache, monkeypatch):
        monkeypatch.setattr(_cubins, "why_not_compile", lambda: "it is Sunday")
        reason = self.why_not(*moe_operands())
        assert "it is Sunday" in reason and "build-kernels --arch 9.0" in reason
        for cubin in moe.required_cubins("sm_90", (3, 2), 4, 64, 128, "silu"):
            put(cubin)
        assert self.why_not(*moe_operands()) is None

    def test_kernels_that_can_be_compiled(self, hopper, cache, monkeypatch):
        monkeypatch.setattr(_cubins, "why_not_compile", lambda: None)
        assert self.why_not(*moe_operands()) is None

    def why_not_dense(self, m, dtype=jnp.bfloat16, groups=()):
        return reason_of(
            functools.partial(dense.unsupported, out_dtype=jnp.float32),
            jax.ShapeDtypeStruct((*groups, m, 64), dtype),
            _backend.abstract_weights(*groups, 32, 64),
        )

    def test_dense(self, hopper, cache, monkeypatch):
        monkeypatch.setattr(_cubins, "why_not_compile", lambda: None)
        assert self.why_not_dense(4) is None
        assert "x is float16" in self.why_not_dense(4, jnp.float16)
        assert "nothing" in self.why_not_dense(0)
        assert "group" in self.why_not_dense(4, groups=(2,))
        assert "faster" in self.why_not_dense(dense.MOST_ROWS + 1)


def test_a_batch_axis_is_refused(hopper, cache):
    """The ops fold it into the operands; a kernel would misread it."""
    for cubin in dense.required_cubins("sm_90", 4, 32, 64):
        put(cubin)
    run = jax.vmap(lambda x, w: dense.run(x, w, out_dtype=jnp.bfloat16), (0, None))
    x = jax.ShapeDtypeStruct((3, 4, 64), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="no batching rule"):
        jax.eval_shape(run, x, _backend.abstract_weights(32, 64))


class TestAhead:
    def test_covers_every_token_count(self):
        size = (16, 2, 64, 128)
        found = set(ahead.moe_cubins("9.0", *size, max_tokens=150))
        for t in range(1, 151):
            required = moe.required_cubins("sm_90", (t, 2), 16, 64, 128, "silu")
            assert found >= set(required), t

    def test_another_architecture_is_refused(self):
        with pytest.raises(ValueError, match=r"9\.0"):
            ahead.dense_cubins("10.0", 64, 64)

    def test_nothing_missing_compiles_nothing(self, cache):
        cubins = ahead.dense_cubins("9.0", 64, 64, max_rows=4)
        for cubin in cubins:
            put(cubin)
        assert ahead.compile_ahead(cubins) == 0

    def test_buildable(self, cache, monkeypatch):
        cubins = functools.partial(ahead.dense_cubins, n=64, k=64, max_rows=4)
        built = ahead.buildable("dense", cubins)
        assert (9, 0) in built.capabilities
        assert built.find("9.0a") is None
        monkeypatch.setattr(_cubins, "why_not_compile", lambda: None)
        monkeypatch.setattr(_cubins, "compile_missing", lambda c: [put(x) for x in c])
        folder = built.build("9.0a", None)
        assert folder == built.find("9.0") == _cubins.folder("sm_90")
        assert len(list(folder.glob("*.cubin"))) == len(set(cubins("9.0")))

    def test_no_compiler_is_told(self, cache, monkeypatch):
        monkeypatch.setattr(_cubins, "why_not_compile", lambda: "no compiler")
        with pytest.raises(RuntimeError, match="no compiler"):
            ahead.compile_ahead(ahead.dense_cubins("9.0", 64, 64, max_rows=4))


def test_a_process_that_only_runs_imports_neither_flashinfer_nor_torch(tmp_path):
    pytest.importorskip("cuda.tile")
    script = """
import sys, jax, jax.numpy as jnp
from jmx8.kernels.cutile import _backend, _cubins, dense
x = jax.ShapeDtypeStruct((4, 64), jnp.bfloat16)
w = _backend.abstract_weights(32, 64)
for cubin in dense.required_cubins("sm_90", 4, 32, 64):
    path = _cubins.path_of(cubin, "13.3.36")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"cubin")
import jmx8._device
jmx8._device.compute_capability = lambda: (9, 0)
run = jax.jit(lambda x, w: dense.run(x, w, out_dtype=jnp.bfloat16))
check = jax.export.DisabledSafetyCheck.custom_call("cutile_launch")
jax.export.export(run, platforms=["cuda"], disabled_checks=[check])(x, w)
print(sorted({"torch", "flashinfer", "cuda.tile"} & set(sys.modules)))
"""
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        env={
            "JMX8_CACHE_DIR": str(tmp_path),
            "PATH": "",
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
            "JAX_PLATFORMS": "cpu",
        },
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "['cuda.tile']"

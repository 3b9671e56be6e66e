"""Tuning FlashInfer's kernels, emulated: the tactic reaches the kernel."""

import re
import time

import jax
import jax.numpy as jnp
import pytest

from jmx8 import autotune, explain, mx_matmul_w8a8, mx_moe_w8a8, quantize
from jmx8.kernels import tactics
from jmx8.kernels.flashinfer import backends, cutlass_moe, modules
from jmx8.ops import autotune as measuring

from .helpers import assert_bits_equal


pytest.importorskip("jax_tvm_ffi")

from . import emulated_flashinfer


pytestmark = pytest.mark.cpu

normal = lambda seed, *shape: jax.random.normal(
    jax.random.key(seed), shape, jnp.bfloat16
)


@pytest.fixture(autouse=True)
def table(monkeypatch, tmp_path):
    path = tmp_path / "tactics.json"
    monkeypatch.setattr(tactics, "path", lambda: path)
    monkeypatch.setattr(measuring, "_CALLS", 3)
    monkeypatch.setattr(measuring, "_ROUNDS", 3)
    return path


@pytest.fixture
def gemm(monkeypatch):
    """Returns the tactics that `mxfp8_gemm` ran with. 1 is fast, 2 raises."""
    ran = []
    compute = emulated_flashinfer.mxfp8_gemm

    def mxfp8_gemm(*arguments):
        ran.append(arguments[-1])
        if arguments[-1] == 2:
            raise ValueError("tactic needs a cluster of 4")
        time.sleep(0 if arguments[-1] == 1 else 10e-3)
        compute(*arguments)

    monkeypatch.setattr(emulated_flashinfer, "mxfp8_gemm", mxfp8_gemm)
    emulated_flashinfer.use(monkeypatch)
    module = {"mxfp8_gemm_tactic_num": lambda: 4}
    monkeypatch.setattr(modules, "load", lambda which, capability: module)
    return ran


@pytest.fixture
def moe(monkeypatch):
    """Returns the tactics that `run_moe` ran with. (1, 2) is fast, (0, _) wrong."""
    ran = []
    place = cutlass_moe._ARGUMENTS.index("profile_ids")
    compute = emulated_flashinfer.run_moe

    def run_moe(*arguments):
        first, second = arguments[place]
        ran.append((first, second))
        time.sleep((first != 1) * 10e-3 + (second != 2) * 10e-3)
        compute(*arguments)
        if first == 0:
            emulated_flashinfer.host(arguments[0])[0, :] *= 2

    monkeypatch.setattr(emulated_flashinfer, "run_moe", run_moe)
    emulated_flashinfer.use(monkeypatch)
    runner = {
        "get_workspace_size": lambda *sizes: 256,
        "get_gemm1_tactic_count": lambda: 2,
        "get_gemm2_tactic_count": lambda: 3,
    }
    monkeypatch.setattr(cutlass_moe, "runner", lambda *key: runner)
    return ran


def target(function, *operands):
    """Returns the custom call of a new trace, with the hash of its constants."""
    text = jax.jit(lambda *operands: function(*operands)).lower(*operands).as_text()
    (name,) = set(re.findall(r"@(jmx8\.flashinfer\.mxfp8_gemm\.[0-9a-f]{8})", text))
    return name


def test_dense(gemm):
    w = backends.prepare_matmul(normal(0, 1, 96), quantize(normal(1, 40, 96)))[1]
    x = normal(2, 3, 96)
    run = lambda x: jax.block_until_ready(jax.jit(lambda x: mx_matmul_w8a8(x, w))(x))
    default = run(x)
    assert gemm == [-1]
    by_default = target(mx_matmul_w8a8, x, w)
    report = autotune(mx_matmul_w8a8, x, w)
    (tuned,) = report.tuned
    assert tuned.implementation == "flashinfer_cutlass"
    assert tuned.tactic == (1,) and tuned.default == (-1,)
    assert set(tuned.seconds) == {(-1,), (0,), (1,), (3,)}
    assert "tactic needs a cluster of 4" in tuned.left_out[(2,)]
    assert "PreparedWeights(bfloat16[40,96], " in tuned.call
    gemm.clear()
    assert_bits_equal(run(x), default)
    run(normal(3, 4, 96))
    run(normal(4, 5, 96))
    assert gemm == [1, 1, -1]
    # The same table gives the same program, read a second time too.
    tuned_target = target(mx_matmul_w8a8, x, w)
    tactics._read.cache_clear()
    assert target(mx_matmul_w8a8, x, w) == tuned_target != by_default


def test_moe(moe):
    w13, w2 = (quantize(normal(i, 3, *s)) for i, s in enumerate(((64, 96), (96, 32))))
    x, ids = normal(2, 3, 96), jnp.array([[0, 1], [2, 0], [1, 3]])
    weights = jnp.ones((3, 2), jnp.float32)
    _, w13, w2, *_ = backends.CUTLASS_MOE.prepare(x, w13, w2, ids, weights, None, None)

    def layer(x):
        return mx_moe_w8a8(x, w13, w2, ids, weights, activation="silu")

    default = jax.block_until_ready(jax.jit(layer)(x))
    assert moe == [(-1, -1)]
    (tuned,) = autotune(layer, x).tuned
    assert tuned.tactic == (1, 2)
    assert set(tuned.seconds) == {(-1, -1), (1, -1), (1, 2), (1, 3), (1, 4)}
    assert set(tuned.left_out) == {(0, -1)}
    moe.clear()
    assert_bits_equal(jax.jit(lambda x: layer(x))(x), default)
    assert moe == [(1, 2)]
    (choice,) = explain(layer, x).choices
    assert choice.reason.endswith("; tuned: tactic=(1, 2)")

"""Tests of the backend "sm90" under JAX's transformations, on a Hopper GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from benchmarks._timing import kernel_times, replay_seconds
from jmx8 import _numerics, explain, mx_matmul, mx_moe, mx_ragged_dot, quantize, route
from jmx8.kernels._ffi import Output
from jmx8.kernels.sm90 import kernels

from .helpers import assert_bits_equal, assert_matmul_close, model_quantize
from .sm90_calls import ACC_BITS


pytestmark = pytest.mark.gpu(9)

matmul = functools.partial(mx_matmul, implementation="sm90")
moe = functools.partial(mx_moe, implementation="sm90")


def compiled(run, *operands) -> str:
    return run.lower(*operands).compile().as_text() or ""


def normal(seed, *shape, dtype=jnp.bfloat16):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def moe_operands(t, e=16, top_k=4, h=256, i=128, num_experts=16):
    ids, weights = route(normal(3, t, num_experts, dtype=jnp.float32), "softmax", top_k)
    return (
        normal(0, t, h),
        quantize(normal(1, e, 2 * i, h)),
        quantize(normal(2, e, h, i)),
        ids,
        weights,
    )


@pytest.mark.parametrize("m", [1, 3, 64, 300])
@pytest.mark.parametrize("out_dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("k", [512, 500])
def test_the_op_runs_the_kernel_under_jit(m, out_dtype, k):
    x, w = normal(m, m, k), quantize(normal(1, 384, k))
    run = jax.jit(functools.partial(matmul, out_dtype=out_dtype))
    assert "jmx8.sm90.gemm" in compiled(run, x, w)
    out = run(x, w)
    assert_matmul_close(out, x, w, acc_bits=ACC_BITS)
    assert_bits_equal(out, run(x, w))
    (choice,) = explain(mx_matmul, x, w).choices
    assert choice.implementation == "sm90"


@pytest.mark.parametrize("t", [1, 40, 600])
def test_a_layer_runs_the_kernels_under_jit(t):
    operands = moe_operands(t)
    run = jax.jit(moe)
    text = compiled(run, *operands)
    assert "jmx8.sm90.moe" in text and "jmx8.sm90.gemm" not in text
    out, reference = run(*operands), mx_moe(*operands, implementation="xla")
    assert_bits_equal(out, run(*operands))
    error = np.linalg.norm(out.astype(jnp.float32) - reference.astype(jnp.float32))
    assert error <= 6e-3 * np.linalg.norm(reference.astype(jnp.float32))


@pytest.mark.parametrize("sizes", [(30, 0, 20, 1), (0, 0, 0, 0), (0, 64, 0, 0)])
def test_ragged_dot_runs_the_kernels(sizes):
    x, w, sizes = normal(0, 64, 256), quantize(normal(1, 4, 96, 256)), jnp.array(sizes)
    run = jax.jit(functools.partial(mx_ragged_dot, implementation="sm90"))
    assert "jmx8.sm90.permute" in compiled(run, x, w, sizes)
    out, exact = run(x, w, sizes), mx_ragged_dot(x, w, sizes, implementation="xla")
    assert_bits_equal(out, run(x, w, sizes))
    np.testing.assert_array_equal(out[jnp.sum(sizes) :].astype(jnp.float32), 0)
    error = np.linalg.norm(out.astype(jnp.float32) - exact.astype(jnp.float32))
    assert error <= 3e-3 * np.linalg.norm(exact.astype(jnp.float32))


def test_experts_elsewhere_contribute_nothing():
    x, w13, w2, ids, weights = moe_operands(70, e=16, num_experts=64)
    parts = [
        moe(x, w13, w2, ids, weights, local_expert_offset=offset)
        for offset in (0, 16, 32, 48)
    ]
    whole = jax.tree.map(lambda a: jnp.concatenate([a] * 4), (w13, w2))
    summed = sum(part.astype(jnp.float32) for part in parts)
    together = moe(x, whole[0], whole[1], ids, weights).astype(jnp.float32)
    error = np.linalg.norm(summed - together)
    assert error <= 4e-3 * np.linalg.norm(together)


def test_vmap_is_one_call_of_more_rows():
    x, w = normal(0, 5, 7, 256), quantize(normal(1, 192, 256))
    batched = jax.jit(jax.vmap(matmul, (0, None)))
    assert_bits_equal(batched(x, w), matmul(x.reshape(35, 256), w).reshape(5, 7, 192))
    text = compiled(batched, x, w)
    assert text.count('custom_call_target="jmx8.sm90.gemm') == 1
    groups = quantize(normal(2, 5, 192, 256))
    out = jax.jit(jax.vmap(matmul))(x, groups)
    assert_matmul_close(out, x, groups, acc_bits=ACC_BITS)


def test_vmap_of_a_layer_over_sequences():
    x, w13, w2, ids, weights = moe_operands(24)
    split = lambda a: a.reshape(4, 6, *a.shape[1:])
    batched = jax.jit(jax.vmap(moe, (0, None, None, 0, 0)))
    out = batched(split(x), w13, w2, split(ids), split(weights))
    assert_bits_equal(out, split(moe(x, w13, w2, ids, weights)))


def test_shard_map_over_one_device():
    mesh = Mesh(np.array(jax.devices()[:1]), ("d",))
    spec = PartitionSpec
    x, w = normal(0, 9, 256), quantize(normal(1, 192, 256))
    sharded = jax.shard_map(
        matmul,
        mesh=mesh,
        in_specs=(spec(), spec("d")),
        out_specs=spec(None, "d"),
        check_vma=False,
    )
    assert_bits_equal(jax.jit(sharded)(x, w), matmul(x, w))
    operands = moe_operands(20)
    experts = jax.shard_map(
        lambda *a: jax.lax.psum(moe(*a), "d"),
        mesh=mesh,
        in_specs=(spec(), spec("d"), spec("d"), spec(), spec()),
        out_specs=spec(),
        check_vma=False,
    )
    assert_bits_equal(jax.jit(experts)(*operands), moe(*operands))


def test_a_chain_of_calls_is_captured():
    """Outside a CUDA graph a call costs the host 3.5 µs, which would show."""
    length, w = 400, quantize(normal(1, 64, 64))

    def chain(x):
        for _ in range(length):
            x = matmul(x, w)
        return x

    run, x = jax.jit(chain), normal(0, 1, 64)
    us = replay_seconds(run, x) * 1e6 / length
    kernels = kernel_times(lambda: jax.block_until_ready(run(x)))
    kernel = sum(kernel.us for kernel in kernels) / length
    print(f"\n{us:.2f} µs a call, {kernel:.2f} µs of it in the kernel")
    assert us - kernel <= 0.5


ROUTINGS = {
    "softmax": {"method": "softmax", "top_k": 8},
    "as_they_are": {"method": "softmax", "top_k": 8, "renormalize": False},
    "topk_softmax": {"method": "topk_softmax", "top_k": 4},
    "one": {"method": "sigmoid", "top_k": 1, "renormalize": False},
    "groups": {
        "method": "sigmoid",
        "top_k": 8,
        "num_groups": 8,
        "topk_groups": 4,
        "scaling_factor": 2.5,
    },
    "sqrtsoftplus": {"method": "sqrtsoftplus", "top_k": 6, "scaling_factor": 1.5},
}


@pytest.mark.parametrize("case", ROUTINGS)
@pytest.mark.parametrize("e", [32, 128, 256, 512])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("with_bias", [False, True])
def test_route_selects_as_xla_does(case, e, dtype, with_bias):
    logits = jax.random.normal(jax.random.key(e), (333, e))
    # In eighths there are ties, of experts and of groups.
    logits = jnp.concatenate([logits, jnp.round(logits * 8) / 8, jnp.zeros((3, e))])
    logits = logits.astype(jnp.bfloat16).astype(dtype)
    bias = jnp.round(jax.random.normal(jax.random.key(1), (e,)) * 4) / 4
    bias = bias.astype(jnp.float32) if with_bias else None
    results = [
        jax.jit(functools.partial(route, **ROUTINGS[case], implementation=name))(
            logits, correction_bias=bias
        )
        for name in ("sm90", "xla")
    ]
    ids, weights = zip(*results, strict=True)
    np.testing.assert_array_equal(*ids)
    np.testing.assert_allclose(*weights, rtol=2e-6, atol=1e-30)


@jax.jit
def quantize_in_kernel(x):
    return kernels.QUANTIZE(
        x=x,
        elements=Output(x.shape, jnp.float8_e4m3fn),
        scales=Output((*x.shape[:-1], x.shape[-1] // 32), jnp.float8_e8m0fnu),
    )


def test_quantize_is_bit_equal_for_every_bfloat16():
    patterns = np.tile(np.arange(1 << 16, dtype=np.uint16), 32)
    mixed = np.random.default_rng(0).permutation(patterns)
    # In their order, the values of one block are of one size.
    for codes in (patterns, mixed, np.sort(patterns)):
        x = jax.lax.bitcast_convert_type(codes.reshape(-1, 256), jnp.bfloat16)
        expected = _numerics.quantize_rows(x, for_gpu=True)
        for ours, theirs in zip(quantize_in_kernel(x), expected, strict=True):
            assert_bits_equal(ours, theirs)


@pytest.mark.parametrize("shape", [(1, 32), (3, 96), (7, 5, 2080), (4096, 4096)])
def test_quantize_follows_the_definition(shape):
    scale = jnp.exp2(jax.random.randint(jax.random.key(2), shape[:-1], -60, 60))
    x = normal(1, *shape) * scale[..., None].astype(jnp.bfloat16)
    elements, scales = quantize_in_kernel(x)
    rows = slice(64)  # the model is slow
    model_elements, model_scales = model_quantize(np.asarray(x)[rows])
    assert_bits_equal(elements[rows], model_elements)
    assert_bits_equal(scales[rows], model_scales)
    w = jax.jit(quantize)(x)
    assert_bits_equal(w.elements, elements)
    assert_bits_equal(w.scales, scales)

"""The bridge on a GPU, with those of FlashInfer's kernels that Hopper has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest


tvm_ffi = pytest.importorskip("tvm_ffi")

from jmx8.kernels._ffi import Kernel, Output

from .flashinfer_hopper import rmsnorm, rope, silu_and_mul, topk
from .helpers import assert_within


pytestmark = pytest.mark.gpu(9)

normal = lambda seed, *shape: jax.random.normal(
    jax.random.key(seed), shape, jnp.bfloat16
)


def test_rmsnorm():
    x, weight = normal(0, 37, 2048), normal(1, 2048)
    out = jax.jit(rmsnorm)(x, weight)
    x64, w64 = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    exact = x64 / np.sqrt(np.mean(x64**2, axis=-1, keepdims=True) + 1e-6) * w64
    assert_within(out, exact, np.abs(exact), acc_bits=16)


def test_silu_and_mul():
    x = normal(0, 5, 3, 2 * 768)
    out = jax.jit(silu_and_mul)(x)
    gate, up = np.split(np.asarray(x, np.float64), 2, axis=-1)
    exact = gate / (1 + np.exp(-gate)) * up
    assert_within(out, exact, np.abs(exact), acc_bits=16)


def test_topk():
    x = jax.random.normal(jax.random.key(0), (9, 4096), jnp.float32)
    indices, values = jax.jit(lambda x: topk(x, 8))(x)
    expected_values, expected = jax.lax.top_k(x, 8)
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_array_equal(values, expected_values)


def test_rope():
    q, k = normal(0, 11, 8, 128), normal(1, 11, 2, 128)
    positions = jnp.arange(100, 111, dtype=jnp.int32)
    outs = jax.jit(rope)(q, k, positions)
    frequencies = 1e4 ** (-np.arange(64) / 64)
    angles = np.asarray(positions, np.float64)[:, None, None] * frequencies
    for x, out in zip((q, k), outs, strict=True):
        a, b = np.split(np.asarray(x, np.float64), 2, axis=-1)
        cos, sin = np.cos(angles), np.sin(angles)
        exact = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
        # The angles are float32: 111 rad have 17 bits left behind the point.
        magnitude = np.tile(np.abs(a) + np.abs(b), 2)
        assert_within(out, exact, magnitude, acc_bits=14)


def test_buffers_are_shared_not_copied():
    addresses = []
    note = lambda *buffers: addresses.extend(b.data_ptr() for b in buffers)
    kernel = Kernel("test.note", lambda: tvm_ffi.convert(note), ("x", "out"))
    x = normal(0, 1024)
    (out,) = jax.jit(lambda x: kernel(x=x, out=Output((64,), x.dtype)))(x)
    assert addresses == [a.unsafe_buffer_pointer() for a in (x, out)]


def test_error_inside_the_wrapper_surfaces_and_the_process_goes_on():
    q, k = normal(0, 11, 8, 128), normal(1, 12, 2, 128)  # one token more
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"size\(0\)"):
        jax.block_until_ready(jax.jit(rope)(q, k, jnp.zeros(11, jnp.int32)))
    test_silu_and_mul()


def test_replayed_graph_sees_the_buffers_of_each_call():
    weight = 1 + normal(1, 512) / 8

    def chain(x):
        for _ in range(50):
            x = rmsnorm(x, weight)
        return x

    def scan(x):
        return jax.lax.scan(lambda c, _: (rmsnorm(c, weight), None), x, length=50)[0]

    chain, scan = jax.jit(chain), jax.jit(scan)
    for seed in range(5):  # the command buffer is recorded, then replayed
        x = normal(seed, 16, 512)
        np.testing.assert_array_equal(chain(x), scan(x))


@pytest.mark.skipif(len(jax.local_devices()) < 2, reason="needs two devices")
def test_two_devices_at_once():
    mesh = jax.make_mesh((2,), ("d",), devices=jax.local_devices()[:2])
    spec = jax.P("d")
    x = jax.device_put(normal(0, 64, 512), jax.NamedSharding(mesh, spec))
    both = jax.shard_map(silu_and_mul, mesh=mesh, in_specs=spec, out_specs=spec)
    out = jax.jit(both)(x)
    one = silu_and_mul(jax.device_put(x, jax.local_devices()[0]))
    np.testing.assert_array_equal(out, one)
    with pytest.raises(jax.errors.JaxRuntimeError, match="inside jax"):
        jax.block_until_ready(jax.jit(silu_and_mul)(x))

"""`mx_ragged_dot` through the functions of `jmx8.kernels.sm90`, emulated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmx8 import explain, mx_ragged_dot, quantized
from jmx8._mx_array import quantize

from .helpers import assert_bits_equal


pytest.importorskip("jax_tvm_ffi")
from .emulated_sm90 import assert_close, names_of, normal


pytestmark = pytest.mark.cpu


def run(x, w, sizes, implementation=None, **options):
    call = lambda x, w, sizes: mx_ragged_dot(
        x, w, sizes, implementation=implementation, **options
    )
    return jax.jit(call)(x, w, sizes)


@pytest.mark.parametrize("sizes", [[2, 0, 5, 1], [0, 0, 0, 0], [0, 9, 0, 0]])
@pytest.mark.parametrize("k", [64, 70])
@pytest.mark.parametrize("out_dtype", [None, jnp.float32])
def test_is_the_product(calls, sizes, k, out_dtype):
    x, w, sizes = normal(0, 9, k), quantize(normal(1, 4, 48, k)), jnp.array(sizes)
    out = run(x, w, sizes, out_dtype=out_dtype)
    assert names_of(calls) == ["permute", "gemm"]
    assert_close(out, run(x, w, sizes, "xla", out_dtype=out_dtype))
    # Exactly, whatever is in memory.
    outside = out[int(jnp.sum(sizes)) :]
    np.testing.assert_array_equal(outside.astype(jnp.float32), 0)


def test_vmap_is_one_call(calls):
    x, w = normal(0, 2, 9, 64), quantize(normal(1, 2, 4, 48, 64))
    sizes = jnp.array([[2, 0, 5, 1], [1, 1, 1, 1]])
    out = jax.jit(jax.vmap(mx_ragged_dot))(x, w, sizes)
    assert names_of(calls) == ["permute", "gemm"]
    assert_bits_equal(out[1], run(x[1], jax.tree.map(lambda a: a[1], w), sizes[1]))


def test_ragged_dot_of_jax_reaches_the_kernel(calls):
    x, w, sizes = normal(0, 9, 64), quantize(normal(1, 4, 48, 64)), jnp.arange(4)
    function = quantized(
        lambda x, w: jax.lax.ragged_dot(x, w.mT, sizes), activations="bf16"
    )
    out = jax.jit(function)(x, w)
    assert names_of(calls) == ["permute", "gemm"]
    assert_bits_equal(out, run(x, w, sizes))


def test_reasons(calls):
    x, w, sizes = normal(0, 9, 64), quantize(normal(1, 4, 48, 64)), jnp.arange(4)
    reason = lambda *operands: str(explain(mx_ragged_dot, *operands))
    assert "-> sm90" in reason(x, w, sizes)
    assert "x is float32" in reason(x.astype(jnp.float32), w, sizes)
    assert "nothing to compute" in reason(x[:0], w, sizes)
    many = jax.eval_shape(lambda: quantize(jnp.ones((1025, 48, 64), jnp.bfloat16)))
    assert "at most 1024 groups" in reason(x, many, jnp.zeros(1025, jnp.int32))

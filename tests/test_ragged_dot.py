"""`mx_ragged_dot`: rows in groups, times one weight each."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jmx8
from jmx8 import (
    dequantize,
    mx_ragged_dot,
    mx_ragged_dot_w8a8,
    quantize,
    quantized,
)

from .convert_helpers import assert_same_bytes, normal
from .helpers import assert_within


SIZES = [[2, 0, 5, 1], [0, 0, 0, 8], [1, 1, 1, 1], [0, 0, 0, 0], [8, 0, 0, 0]]


def exact(x, w, sizes):
    """Returns the product of float64 arrays, row by row."""
    groups = np.repeat(np.arange(len(sizes)), sizes)
    out = np.zeros((x.shape[0], w.shape[1]))
    for row, group in enumerate(groups):
        out[row] = w[group] @ x[row]
    return out


def assert_ragged(out, x, w, sizes):
    x64 = np.asarray(x, np.float64)
    w64 = np.asarray(dequantize(w), np.float64)
    magnitude = exact(np.abs(x64), np.abs(w64), sizes)
    assert_within(out, exact(x64, w64, sizes), magnitude, acc_bits=20)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype, k", [(jnp.bfloat16, 70), (jnp.float32, 64)])
def test_is_the_product(sizes, dtype, k):
    x, w = normal(0, (8, k), dtype), quantize(normal(1, (4, 48, k)))
    out = jax.jit(mx_ragged_dot)(x, w, jnp.array(sizes))
    assert out.dtype == dtype
    assert_ragged(out, x, w, sizes)


def test_many_rows():
    x, w = normal(0, (300, 64)), quantize(normal(1, (4, 48, 64)))
    sizes = np.array([130, 1, 0, 150])
    assert_ragged(jax.jit(mx_ragged_dot)(x, w, jnp.array(sizes)), x, w, sizes)
    empty = mx_ragged_dot(x[:0], w, jnp.array(sizes))
    assert empty.shape == (0, 48)


def test_w8a8_is_the_product_of_quantized_rows():
    x, w, sizes = normal(0, (8, 64)), quantize(normal(1, (4, 48, 64))), SIZES[0]
    out = jax.jit(mx_ragged_dot_w8a8)(x, w, jnp.array(sizes))
    assert_ragged(out, dequantize(quantize(x)), w, sizes)


@pytest.mark.parametrize("in_axes", [(0, None, 0), (None, 0, None), (0, 0, 0)])
def test_vmap_is_a_loop(in_axes):
    sizes = jnp.array([SIZES[0], SIZES[2]])
    args = [normal(0, (2, 8, 64)), quantize(normal(1, (2, 4, 48, 64))), sizes]
    at = lambda i: [
        arg if axis is None else jax.tree.map(lambda a: a[i], arg)
        for arg, axis in zip(args, in_axes, strict=True)
    ]
    args = [
        arg if axis == 0 else jax.tree.map(lambda a: a[0], arg)
        for arg, axis in zip(args, in_axes, strict=True)
    ]
    out = jax.jit(jax.vmap(mx_ragged_dot, in_axes))(*args)
    expected = [jax.jit(mx_ragged_dot)(*at(i)) for i in range(2)]
    assert_same_bytes(out, jnp.stack(expected))


def test_gradient_is_that_of_the_exact_product():
    x, w = normal(0, (8, 64), jnp.float32), quantize(normal(1, (4, 48, 64)))
    sizes, g = jnp.array(SIZES[0]), normal(2, (8, 48), jnp.float32)
    loss = lambda x: jnp.sum(mx_ragged_dot(x, w, sizes) * g)
    grad = jax.jit(jax.grad(loss))(x)
    w64 = np.swapaxes(np.asarray(dequantize(w), np.float64), 1, 2)
    g64 = np.asarray(g, np.float64)
    magnitude = exact(np.abs(g64), np.abs(w64), SIZES[0])
    assert_within(grad, exact(g64, w64, SIZES[0]), magnitude, acc_bits=20)


@pytest.mark.parametrize("axes", ["gkn", "gnk", "kgn"])
def test_quantized_ragged_dot(axes):
    x, w, sizes = normal(0, (8, 64)), quantize(normal(1, (4, 48, 64))), SIZES[0]
    order = tuple("gnk".index(axis) for axis in axes)
    numbers = lax.RaggedDotDimensionNumbers(
        (([1], [axes.index("k")]), ([], [])), [0], [axes.index("g")]
    )

    def function(x, w):
        w = jnp.transpose(w, order)
        return lax.ragged_dot_general(x, w, jnp.array(sizes), numbers)

    out = jax.jit(quantized(function, activations="bf16"))(x, w)
    assert_same_bytes(out, jax.jit(mx_ragged_dot)(x, w, jnp.array(sizes)))
    choices = jmx8.explain(quantized(function, activations="mxfp8"), x, w).choices
    assert [choice.op.split("(")[0] for choice in choices] == ["mx_ragged_dot_w8a8"]


def test_refuses_what_does_not_fit():
    unchecked = inspect.unwrap(mx_ragged_dot)  # without the tests' own type checks
    x, w, sizes = normal(0, (8, 64)), quantize(normal(1, (4, 48, 64))), jnp.arange(4)
    with pytest.raises(TypeError, match="w must be an MXArray"):
        unchecked(x, x, sizes)
    with pytest.raises(TypeError, match="x must have a floating dtype"):
        unchecked(x.astype(jnp.int32), w, sizes)
    with pytest.raises(TypeError, match="group_sizes must have a integer dtype"):
        unchecked(x, w, sizes.astype(jnp.float32))
    with pytest.raises(ValueError, match=r"x must be \[m, k\] and w \[g, n, k\]"):
        mx_ragged_dot(x[:, :32], w, sizes)
    with pytest.raises(ValueError, match="one for each group"):
        mx_ragged_dot(x, w, sizes[:3])
    assert jmx8.explain(mx_ragged_dot, x, w, sizes).choices

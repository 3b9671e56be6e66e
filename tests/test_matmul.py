import functools
import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmx8 import dequantize, mx_matmul, mx_matmul_w8a8, MXArray, quantize
from jmx8.nn import MXLinear

from .helpers import assert_bits_equal, assert_matmul_close


# Accumulator precision that each implementation may claim, in bits; never loosened.
ACC_BITS = {"xla": 20}
IMPLEMENTATIONS = ["xla"]
implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def operands(m, n, k, dtype=jnp.bfloat16):
    x_key, w_key = jax.random.split(jax.random.key(m + n + k))
    x = jax.random.normal(x_key, (m, k), dtype)
    return x, quantize(jax.random.normal(w_key, (n, k), jnp.bfloat16))


@implementations
@pytest.mark.parametrize("m", [0, 1, 7, 64, 129])
@pytest.mark.parametrize("n, k", [(128, 128), (161, 256), (3, 70), (256, 4096)])
def test_matches_exact_product(implementation, m, n, k):
    x, w = operands(m, n, k)
    out = jax.jit(mx_matmul, static_argnames="implementation")(
        x, w, implementation=implementation
    )
    assert out.shape == (m, n) and out.dtype == jnp.bfloat16
    assert_matmul_close(out, x, w, acc_bits=ACC_BITS[implementation])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("out_dtype", [None, jnp.float32])
def test_dtypes(dtype, out_dtype):
    x, w = operands(5, 33, 96, dtype)
    out = mx_matmul(x, w, out_dtype=out_dtype)
    assert out.dtype == (dtype if out_dtype is None else out_dtype)
    assert_matmul_close(out, x, w, acc_bits=20)


@implementations
@pytest.mark.parametrize("k", [70, 256])
def test_w8a8_is_the_product_of_both_quantized(implementation, k):
    x, w = operands(9, 40, k)
    out = jax.jit(mx_matmul_w8a8, static_argnames="implementation")(
        x, w, implementation=implementation
    )
    exact_x = dequantize(quantize(x))
    assert_matmul_close(out, exact_x, w, acc_bits=ACC_BITS[implementation])
    assert jnp.any(out != mx_matmul(x, w))


def test_leading_axes_are_rows():
    x, w = operands(24, 8, 70)
    expected = mx_matmul(x, w)
    assert_bits_equal(mx_matmul(x.reshape(2, 3, 4, 70), w).reshape(24, 8), expected)
    assert_bits_equal(mx_matmul(x[0], w), expected[0])


def test_operators_agree_with_the_op():
    x, w = operands(6, 8, 70)
    expected = mx_matmul(x, w)
    assert_bits_equal(x @ w.T, expected)
    assert_bits_equal(np.asarray(x) @ w.T, expected)
    assert_bits_equal(w @ x[0], expected[0])
    assert_bits_equal((w @ x.T).T, expected)
    assert_bits_equal(mx_matmul(x, w.T), expected)


def test_groups_have_their_own_weights():
    x, w = operands(6, 8, 70)
    _, other = operands(5, 8, 70)
    stack = jax.tree.map(lambda *a: jnp.stack(a), w, other)
    out = mx_matmul(jnp.stack([x, x]), stack)
    assert_bits_equal(out[0], mx_matmul(x, w))
    assert_bits_equal(out[1], mx_matmul(x, other))


def count_dots(f, *args):
    # Counted before optimization: batching decides it, not the compiler.
    return jax.jit(f).lower(*args).as_text().count("stablehlo.dot_general")


@pytest.mark.cpu
@pytest.mark.parametrize("activations", ["bf16", "mxfp8"])
def test_vmapped_linear_is_one_matmul(activations):
    x, w = operands(24, 8, 70)
    layer = MXLinear.from_weight(w, jnp.ones(8), activations=activations)
    batch = x.reshape(2, 3, 4, 70)
    apply = jax.vmap(jax.vmap(jax.vmap(layer)))
    text = jax.jit(apply).lower(batch).as_text()
    assert text.count("stablehlo.dot_general") == 1
    assert "(tensor<24x96xbf16>, tensor<8x96xbf16>) -> tensor<24x8xf32>" in text
    assert_bits_equal(apply(batch).reshape(24, 8), layer(x))


@pytest.mark.cpu
def test_vmap_over_weights_is_one_grouped_matmul():
    x, w = operands(6, 8, 70)
    stack = jax.tree.map(lambda a: jnp.stack([a, a, a]), w)
    for in_axes, left in (((None, 0), x), ((0, 0), jnp.stack([x, x, x]))):
        f = jax.vmap(mx_matmul, in_axes)
        assert count_dots(f, left, stack) == 1
        assert_bits_equal(f(left, stack)[2], mx_matmul(x, w))


def test_nested_vmap_over_inputs_and_weights():
    x, w = operands(6, 8, 70)
    stack = jax.tree.map(lambda a: jnp.stack([a, a, a]), w)
    f = jax.vmap(jax.vmap(mx_matmul, (None, 0)), (0, None))
    out = f(x, stack)
    assert out.shape == (6, 3, 8)
    assert_bits_equal(out[:, 1], mx_matmul(x, w))


@pytest.mark.parametrize("op", [mx_matmul, mx_matmul_w8a8])
def test_gradient_with_respect_to_activations(op):
    x, w = operands(5, 8, 70, jnp.float32)
    weights = jax.random.normal(jax.random.key(1), (5, 8))
    loss = lambda x: jnp.sum(op(x, w) * weights)
    expected = np.asarray(weights, np.float64) @ np.asarray(dequantize(w), np.float64)
    for gradient in (
        jax.grad(loss)(x),
        jax.jit(jax.grad(loss))(x),
        jax.grad(jax.checkpoint(loss))(x),
        jax.vmap(jax.grad(lambda x, c: jnp.sum(op(x, w) * c)))(x, weights),
    ):
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)


def test_gradient_through_a_module_leaves_weights_alone():
    layer = MXLinear(64, 8, key=jax.random.key(0))
    gradients = eqx.filter_grad(lambda l: jnp.sum(l(jnp.ones((3, 64)))))(layer)
    assert not jnp.any(gradients.weight.elements.astype(jnp.float32))
    assert jnp.all(gradients.weight.scales.astype(jnp.float32) < 1e-37)  # not NaN
    np.testing.assert_array_equal(gradients.bias, jnp.full(8, 3.0))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_bias_is_added_before_the_rounding(dtype):
    x, w = operands(5, 8, 70)
    bias = 100 * jax.random.normal(jax.random.key(1), (8,), dtype)
    out = mx_matmul(x, w, bias=bias)
    wide = mx_matmul(x, w, out_dtype=jnp.float32) + bias.astype(jnp.float32)[None]
    assert_bits_equal(out, wide.astype(jnp.bfloat16))
    assert jnp.any(out != mx_matmul(x, w) + bias.astype(jnp.bfloat16)[None])
    layer = MXLinear.from_weight(w, bias, activations="bf16")
    assert_bits_equal(layer(x), out)


def test_gradient_with_respect_to_the_bias():
    x, w = operands(6, 8, 64, jnp.float32)
    weights = jax.random.normal(jax.random.key(1), (6, 8))
    loss = lambda bias: jnp.sum(mx_matmul(x, w, bias=bias) * weights)
    gradient = jax.jit(jax.grad(loss))(jnp.ones(8))
    np.testing.assert_allclose(gradient, jnp.sum(weights, axis=0), rtol=1e-5)
    each = jax.vmap(
        jax.grad(lambda bias, x, c: jnp.sum(mx_matmul(x, w, bias=bias) * c)),
        (None, 0, 0),
    )(jnp.ones(8), x, weights)
    np.testing.assert_allclose(each, weights, rtol=1e-5)


@pytest.mark.cpu
@pytest.mark.parametrize("bias_axis", [None, 0])
@pytest.mark.parametrize("w_axis", [None, 0])
@pytest.mark.parametrize("x_axis", [None, 0])
def test_vmap_over_the_bias_is_one_matmul(x_axis, w_axis, bias_axis):
    axes = (x_axis, w_axis, bias_axis)
    if not any(axis == 0 for axis in axes):
        return
    x, w = operands(6, 8, 64)
    bias = jax.random.normal(jax.random.key(1), (8,))
    stack = lambda a, axis: a if axis is None else jnp.stack([a, -a, a])
    stack_bytes = lambda a: jnp.stack([a, a, a])
    given = (
        stack(x, x_axis),
        w if w_axis is None else jax.tree.map(stack_bytes, w),
        stack(bias, bias_axis),
    )
    op = lambda x, w, bias: mx_matmul(x, w, bias=bias)
    assert count_dots(jax.vmap(op, axes), *given) == 1
    out = jax.vmap(op, axes)(*given)
    sign = lambda axis: 1 if axis is None else -1
    assert_bits_equal(out[1], op(x * sign(x_axis), w, bias * sign(bias_axis)))
    twice = [
        a if axis is None else jax.tree.map(stack_bytes, a)
        for a, axis in zip(given, axes, strict=True)
    ]
    assert_bits_equal(jax.vmap(jax.vmap(op, axes), axes)(*twice)[2], out)


def test_inside_scan_and_shard_map_and_eval_shape():
    x, w = operands(4, 64, 64)
    step = lambda x, _: (mx_matmul(x, w), None)
    scanned = jax.jit(lambda x: jax.lax.scan(step, x, None, length=3)[0])(x)
    unrolled = functools.reduce(lambda x, _: mx_matmul(x, w), range(3), x)
    assert_bits_equal(scanned, unrolled)
    mesh = jax.make_mesh((1,), ("m",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    sharded = jax.shard_map(
        mx_matmul, mesh=mesh, in_specs=(spec("m"), spec()), out_specs=spec("m")
    )
    assert_bits_equal(jax.jit(sharded)(x, w), mx_matmul(x, w))
    assert jax.eval_shape(mx_matmul, x, w).shape == (4, 64)


def test_mismatched_operands_are_named():
    unchecked = inspect.unwrap(mx_matmul)  # without the tests' own type checks
    x, w = operands(4, 8, 64)
    with pytest.raises(ValueError, match=r"x\.shape=\(4, 32\) and w\.shape=\(8, 64\)"):
        mx_matmul(x[:, :32], w)
    with pytest.raises(TypeError, match=r"w must be an MXArray, got .*jmx8.quantize"):
        unchecked(x, dequantize(w))
    with pytest.raises(TypeError, match="x must be a float array, got dtype int32"):
        unchecked(x.astype(jnp.int32), w)
    with pytest.raises(ValueError, match=r"bias must have shape \(8,\), .* got \(4,\)"):
        mx_matmul(x, w, bias=jnp.ones(4))
    with pytest.raises(TypeError, match="bias must be a float array, got dtype int32"):
        unchecked(x, w, bias=jnp.ones(8, jnp.int32))
    stack: MXArray = jax.tree.map(lambda a: jnp.stack([a, a]), w)
    with pytest.raises(ValueError, match=r"x must be \[\*g, m, k\] for weights"):
        mx_matmul(x, stack)

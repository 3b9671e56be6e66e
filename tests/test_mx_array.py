import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmx8 import _mx_array, dequantize, MXArray, quantize

from .helpers import assert_bits_equal


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(0), (6, 70), jnp.bfloat16)


@pytest.mark.parametrize("axis, expected", [(-1, (6, 96)), (-2, (70, 32))])
def test_shape_is_that_of_the_source(x, axis, expected):
    w = quantize(x, axis=axis)
    assert w.shape == x.shape and w.ndim == 2 and w.size == 420
    assert w.elements.shape == expected
    assert w.scales.shape == (expected[0], expected[1] // 32)
    assert w.nbytes == expected[0] * expected[1] * 33 // 32
    assert w.dtype == jnp.bfloat16


def test_padding_holds_zeros_and_is_cut_off(x):
    w = quantize(x)
    assert np.all(np.asarray(w.elements).view(np.uint8)[:, 70:] == 0)
    padded = quantize(jnp.pad(x, ((0, 0), (0, 26))))
    assert_bits_equal(w.elements, padded.elements)
    assert_bits_equal(w.scales, padded.scales)
    np.testing.assert_array_equal(dequantize(w), dequantize(padded)[:, :70])


def test_quantizing_along_either_axis_is_the_transpose_of_the_other(x):
    along_rows, along_columns = quantize(x), quantize(x.T, axis=-2)
    assert_bits_equal(along_rows.elements, along_columns.elements)
    np.testing.assert_array_equal(dequantize(along_rows).T, dequantize(along_columns))


def test_transpose_moves_no_data(x):
    w = quantize(x)
    assert w.T.shape == (70, 6) and w.T.T.shape == (6, 70)
    assert w.T.elements is w.elements
    np.testing.assert_array_equal(dequantize(w.T), dequantize(w).T)


def test_mT_of_a_stack(x):
    w = quantize(jnp.stack([x, x, x]))
    assert w.mT.shape == (3, 70, 6)
    with pytest.raises(ValueError, match=r"needs 2 axes, got \(3, 6, 70\). Use `mT`"):
        _ = w.T


def test_leaves_have_names(x):
    leaves = jax.tree_util.tree_flatten_with_path({"w": quantize(x)})[0]
    paths = [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in leaves]
    assert paths == ["w/elements", "w/scales"]


def test_survives_transformations(x):
    stack = jnp.stack([x, x + 1])
    batched = jax.vmap(quantize)(stack)
    assert batched.shape == (2, 6, 70)
    assert_bits_equal(batched.elements, quantize(stack).elements)
    abstract = jax.eval_shape(quantize, x)
    assert abstract.shape == x.shape and abstract.scales.dtype == jnp.float8_e8m0fnu
    assert jax.tree.map(lambda _: None, abstract).elements is None
    assert jax.jit(lambda w: w)(batched).shape == batched.shape
    _, rows = jax.lax.scan(lambda c, w: (c, dequantize(w)), None, batched)
    np.testing.assert_array_equal(rows, dequantize(batched))


def test_repr_says_what_it_is(x):
    assert repr(quantize(x)) == "MXArray(bfloat16[6,70], MXFP8 along axis -1, 594 B)"
    assert repr(quantize(x, axis=-2)).startswith("MXArray(bfloat16[6,70], MXFP8 along")
    assert "abstract" in repr(jax.eval_shape(quantize, x))


@pytest.mark.parametrize(
    "convert", [jnp.asarray, np.asarray, jnp.sin, lambda w: jnp.zeros((6, 70)) + w]
)
def test_is_never_converted_silently(x, convert):
    with pytest.raises(TypeError, match="MXArray"):
        convert(quantize(x))
    assert not hasattr(MXArray, "__jax_array__")


def test_products_that_would_contract_another_axis_are_refused(x):
    w = quantize(x)
    with pytest.raises(TypeError, match=r"Write `x @ w.T`"):
        _ = x @ w
    with pytest.raises(TypeError, match=r"Write `w.T @ x`"):
        _ = w.T @ x


def test_wrong_scales_shape_is_reported(x):
    w = quantize(x)
    message = r"elements of shape \(6, 96\) need scales of shape \(6, 3\), got \(6, 1\)"
    with pytest.raises(ValueError, match=message):
        MXArray(w.elements, w.scales[:, :1])
    with pytest.raises(ValueError, match="must be a multiple of 32"):
        MXArray(w.elements[:, :70], w.scales)
    with pytest.raises(ValueError, match=r"padding must be in \[0, 32\), got 40"):
        MXArray(w.elements, w.scales, padding=40)


def test_bad_arguments_of_quantize(x):
    with pytest.raises(TypeError, match="must be a float array, got dtype int32"):
        inspect.unwrap(_mx_array.quantize)(jnp.zeros((4, 32), jnp.int32))
    with pytest.raises(ValueError, match="axis must be -1 or -2"):
        quantize(x, axis=0)
    with pytest.raises(ValueError, match="axis must be -1 or -2"):
        quantize(x[0], axis=-2)

"""`jmx8.quantized`: what it refuses, what it says, and the fallback."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jmx8
from jmx8 import dequantize, quantize, quantized

from .convert_helpers import assert_same_bytes, normal


X = normal(0, (5, 64))
W = quantize(normal(1, (64, 64)), axis=-2)
PADDED = quantize(normal(2, (40, 64)), axis=-2)
STACK = quantize(normal(3, (3, 96, 64)))

REFUSED = {
    "add": (lambda x, w: x + w[:, :5].T, "`add` of .*bfloat16\\[5,64\\].* no rule"),
    "sum": (lambda x, w: x * jnp.sum(w), "`reduce_sum` of .*float32\\[64,64\\]"),
    "scaled": (lambda x, w: x @ (w * 2), "`mul` of .*bfloat16\\[64,64\\]"),
    "other axis": (
        lambda x, w: x @ w.T,
        "`dot_general`.*contracts axis 0 of the weight, whose blocks run along axis 1. "
        "Quantize it along the contracted axis",
    ),
    "cut blocks": (lambda x, w: x[:, 8:] @ w[8:], "begin and end between blocks"),
    "strided blocks": (lambda x, w: x[:, ::2] @ w[::2], "got 0:64:2"),
    "cut by reshape": (
        lambda x, w: jnp.einsum(
            "tab,abf->tf", x.reshape(5, 4, 16), w.reshape(4, 16, 64)
        ),
        "`reshape`.*would cut its blocks",
    ),
    "mixed by reshape": (
        lambda x, w: x.reshape(-1)[:64] @ w.reshape(64 * 64).reshape(64, 64),
        "`reshape`.*would cut its blocks",
    ),
    "flipped": (lambda x, w: x @ jnp.flip(w, 1), "`rev` of"),
    "unknown blocks": (
        lambda x, w: x[:, :32] @ lax.dynamic_slice_in_dim(w, x.shape[0], 32),
        "`dynamic_slice`.*takes 32 of the 64 elements along axis 0",
    ),
    "rows of k": (lambda x, w: x @ w[jnp.arange(64)], "`gather`.*that of the blocks"),
    "scan over k": (
        lambda x, w: lax.scan(lambda c, row: (c + row[0], None), x[0, 0], w)[0],
        "`scan`.*loop over the first axis.*would cut its blocks",
    ),
    "two weights": (lambda x, w: x @ (w @ w), "both operands are MXFP8"),
    "to integers": (lambda x, w: w.astype(jnp.int8), "stands for floats, not for int8"),
    "joined with another": (
        lambda x, w: x @ jnp.concatenate([w, x.T], 1),
        "joins MXFP8 arrays with others",
    ),
    "in one branch": (
        lambda x, w: lax.cond(x[0, 0] > 0, lambda: w, lambda: jnp.zeros_like(w)),
        "`cond`.*return MXFP8 arrays in some cases",
    ),
    "broadcast along k": (
        lambda x, w: jnp.broadcast_to(w[None], (2, 64, 64)) + 1,
        "`add` of",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_names_what_it_refuses(name):
    function, message = REFUSED[name]
    with pytest.raises(
        NotImplementedError, match=f"(?s)quantized: .*{message}"
    ) as info:
        quantized(function)(X, W)
    assert "test_quantized_errors.py" in str(info.value) or name == "flipped"
    assert 'fallback="dequantize"' in str(info.value)


@pytest.mark.parametrize(
    "name", [n for n in REFUSED if n not in ("in one branch", "scan over k")]
)
def test_the_fallback_widens_and_says_so(name):
    function, _ = REFUSED[name]
    with pytest.warns(UserWarning, match=r"quantized: `\w+` of .* Dequantized MXFP8"):
        out = jax.jit(quantized(function, fallback="dequantize", activations="bf16"))(
            X, W
        )
    widened = function(X, dequantize(W, jnp.bfloat16))
    if name == "to integers":
        np.testing.assert_array_equal(out, widened)
        return
    # Some products are one of jmx8 now, which sums in another order.
    np.testing.assert_allclose(
        np.asarray(out, np.float32),
        np.asarray(widened, np.float32),
        rtol=0.02,
        atol=0.1,
    )


def test_the_fallback_says_nothing_where_there_is_a_rule():
    # Warnings are errors in these tests.
    function = lambda x, w: jax.nn.relu(x @ w)
    out = quantized(function, fallback="dequantize", activations="bf16")(X, W)
    assert_same_bytes(out, jax.nn.relu(jmx8.mx_matmul(X, W)))


def test_padding_is_not_merged():
    with pytest.raises(NotImplementedError, match="would cut its blocks"):
        quantized(lambda w: w.T.reshape(-1))(PADDED)
    with pytest.raises(NotImplementedError, match="some hold less than 32"):
        quantized(lambda w: jnp.concatenate([w, w]))(PADDED)
    with pytest.raises(NotImplementedError, match="of padding"):
        stack = quantize(normal(3, (3, 64, 40)))
        quantized(lambda x, w: jnp.einsum("gd,gfd->f", x, w))(normal(4, (3, 40)), stack)
    out = quantized(lambda w: w[32:])(PADDED)
    assert out.shape == (8, 64) and out.padding == 24


def test_shapes_are_those_the_function_was_written_for():
    seen = []
    quantized(lambda w, v: seen.append((w.shape, w.dtype, v.shape)))(W, PADDED)
    assert seen == [((64, 64), jnp.bfloat16, (40, 64))]
    with pytest.raises(TypeError, match=r"\(5, 64\).*\(40, 64\)|contracting"):
        quantized(lambda x, w: x @ w)(X, PADDED)


def test_only_plain_ragged_dots():
    sizes = jnp.array([[1, 2, 2]])
    numbers = lax.RaggedDotDimensionNumbers((([2], [2]), ([], [])), [1], [0])
    ragged = lambda x, w: lax.ragged_dot_general(x, w, sizes, numbers)
    with pytest.raises(NotImplementedError, match=r"only rows .* in groups"):
        quantized(ragged)(X[None], STACK)


def test_options_are_checked():
    unchecked = inspect.unwrap(quantized)  # without the tests' own type checks
    with pytest.raises(ValueError, match=r"activations must be one of .* got 'fp8'"):
        unchecked(lambda w: w, activations="fp8")
    with pytest.raises(ValueError, match=r"fallback must be one of .* got 'warn'"):
        unchecked(lambda w: w, fallback="warn")


def test_looks_like_the_function():
    def encode(params, x):
        """Encodes."""
        return x @ params

    wrapped = quantized(encode)
    assert (wrapped.__name__, wrapped.__doc__) == ("encode", "Encodes.")
    assert str(inspect.signature(wrapped)) == "(params, x)"
    assert_same_bytes(wrapped(normal(0, (64, 8)), X), encode(normal(0, (64, 8)), X))

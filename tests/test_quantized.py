"""`jmx8.quantized`: functions that were written for ordinary arrays."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmx8
from jmx8 import dequantize, quantize, quantized

from .helpers import assert_within


def normal(seed, *shape, dtype=jnp.bfloat16):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def exact(function, *args):
    """Runs `function` in float64 on the exact values of its arguments."""
    with jax.enable_x64(True):
        widened = [
            np.asarray(dequantize(a) if isinstance(a, jmx8.MXArray) else a, np.float64)
            if isinstance(a, jmx8.MXArray) or jnp.issubdtype(a.dtype, jnp.floating)
            else np.asarray(a)
            for a in args
        ]
        return np.asarray(jax.jit(function)(*widened))


def assert_as_exact(function, *args, **options):
    """Checks that products were computed of exact weights, summed in float32."""
    out = jax.jit(quantized(function, activations="bf16"))(*args)
    magnitude = exact(function, *map(_abs, args))
    reference = exact(function, *args)
    assert out.shape == reference.shape
    assert_within(out, reference, magnitude, acc_bits=20)


def _abs(a):
    if isinstance(a, jmx8.MXArray):
        return jnp.abs(dequantize(a))
    return jnp.abs(a) if jnp.issubdtype(a.dtype, jnp.floating) else a


def stable_hlo(function, *args):
    """What is handed to XLA, without the names."""
    text = jax.jit(function).lower(*args).as_text()
    return re.sub(r"@[\w.<>]+", "@", text)


# Each is written for ordinary arrays, and computes products with one weight.
X, W = normal(0, 2, 5, 64), normal(1, 96, 64)
KERNEL = quantize(normal(2, 64, 96), axis=-2)
STACK = quantize(normal(3, 3, 96, 64))
HEADS = quantize(normal(4, 4 * 32, 48), axis=-2)
PRODUCTS = {
    "x @ w": (lambda x, w: x @ w, X, KERNEL),
    "x @ w.T": (lambda x, w: x @ w.T, X, quantize(W)),
    "w @ x": (lambda x, w: w @ x, normal(5, 64, 7), quantize(W)),
    "w @ vector": (lambda x, w: w @ x, normal(5, 64), quantize(W)),
    "vector @ w": (lambda x, w: x @ w, normal(5, 64), KERNEL),
    "padded k": (
        lambda x, w: x @ w,
        normal(5, 7, 40),
        quantize(normal(6, 40, 9), axis=-2),
    ),
    "einsum": (lambda x, w: jnp.einsum("btd,fd->btf", x, w), X, quantize(W)),
    "einsum, reversed": (lambda x, w: jnp.einsum("fd,btd->fbt", w, x), X, quantize(W)),
    "einsum, groups": (
        lambda x, w: jnp.einsum("gtd,gfd->gtf", x, w),
        normal(5, 3, 7, 64),
        STACK,
    ),
    "einsum, groups inside": (
        lambda x, w: jnp.einsum("tgd,gfd->tgf", x, w),
        normal(5, 7, 3, 64),
        STACK,
    ),
    "einsum, no rows": (
        lambda x, w: jnp.einsum("gd,gfd->gf", x, w),
        normal(5, 3, 64),
        STACK,
    ),
    "einsum, all experts": (
        lambda x, w: jnp.einsum("td,gfd->tgf", x, w),
        normal(5, 7, 64),
        STACK,
    ),
    "matmul, groups": (
        lambda x, w: jnp.matmul(x, jnp.swapaxes(w, -1, -2)),
        normal(5, 3, 7, 64),
        STACK,
    ),
    "heads out": (
        lambda x, w: jnp.einsum("btd,dhk->bhtk", x, w.reshape(64, 4, 24)),
        X,
        KERNEL,
    ),
    "heads in": (
        lambda x, w: jnp.einsum("bthk,hkd->btd", x, w.reshape(4, 32, 48)),
        normal(5, 2, 5, 4, 32),
        HEADS,
    ),
    "heads in, other order": (
        lambda x, w: jnp.einsum("btkh,hkd->btd", x, w.reshape(4, 32, 48)),
        normal(5, 2, 5, 32, 4),
        HEADS,
    ),
    "heads as groups": (
        lambda x, w: jnp.einsum("bthk,hkd->bhtd", x, w.reshape(4, 32, 48)),
        normal(5, 2, 5, 4, 32),
        HEADS,
    ),
    "flattened": (
        lambda x, w: x @ w.reshape(1, 4, 32, 48).reshape(4 * 32, 48),
        normal(5, 7, 128),
        HEADS,
    ),
    "merged rows": (
        lambda x, w: x @ w.reshape(3 * 96, 64).T,
        normal(5, 7, 64),
        STACK,
    ),
    "cast": (lambda x, w: x @ w.astype(x.dtype), X.astype(jnp.float32), KERNEL),
    "half precision": (
        lambda x, w: x @ w.astype(x.dtype),
        normal(5, 7, 64, dtype=jnp.float16),
        KERNEL,
    ),
    "some columns": (lambda x, w: x @ w[:, 3:90:2], X, KERNEL),
    "some blocks": (lambda x, w: x[..., 32:] @ w[32:], X, KERNEL),
    "one of a stack": (lambda x, w: x @ w[1].T, X, STACK),
    "axes that come and go": (
        lambda x, w: jnp.squeeze(w[None, :, None], (0, 2)).T @ x,
        normal(5, 64, 7),
        KERNEL,
    ),
    "broadcast": (
        lambda x, w: jnp.einsum("gtd,gdf->gtf", x, jnp.broadcast_to(w, (3, *w.shape))),
        normal(5, 3, 7, 64),
        KERNEL,
    ),
    "split": (lambda x, w: jnp.split(w, 3)[1] @ x, normal(5, 64, 7), quantize(W)),
    "split, summed": (
        lambda x, w: sum(x @ part.astype(x.dtype) for part in jnp.split(w, 3, axis=1)),
        X.astype(jnp.float32),
        KERNEL,
    ),
    "joined": (lambda x, w: x @ jnp.concatenate([w, w[:, :5]], axis=1), X, KERNEL),
    "joined along k": (
        lambda x, w: jnp.concatenate([x, x], -1) @ jnp.concatenate([w, w]),
        X,
        KERNEL,
    ),
    "vmap over rows": (
        lambda x, w: jax.vmap(lambda v: w @ v)(x),
        normal(5, 7, 64),
        quantize(W),
    ),
    "vmap over a stack": (
        lambda x, w: jax.vmap(lambda w: x @ w.T)(w),
        normal(5, 7, 64),
        STACK,
    ),
    "vmap over both": (
        lambda x, w: jax.vmap(lambda x, w: x @ w.T)(x, w),
        normal(5, 3, 7, 64),
        STACK,
    ),
    "vmap over columns": (
        lambda x, w: jax.vmap(lambda c: x @ c, in_axes=1)(w),
        normal(5, 7, 64),
        KERNEL,
    ),
}


def kernel(seed, *shape, contract, dtype=jnp.bfloat16):
    """A kernel with several axes of a kind, which keeps its shape."""
    w = {"w": normal(seed, *shape, dtype=dtype)}
    return jmx8.quantize_params(w, contract={"w": contract}, donate=False)["w"]


PRODUCTS |= {
    "kernel, heads out": (
        lambda x, w: jnp.einsum("btd,dhk->bhtk", x, w),
        X,
        kernel(7, 64, 4, 24, contract=(0,)),
    ),
    "kernel, padded": (
        lambda x, w: jnp.einsum("td,dhk->thk", x, w),
        normal(5, 7, 40),
        kernel(7, 40, 4, 24, contract=(0,)),
    ),
    "kernel, heads in": (
        lambda x, w: jnp.einsum("bthk,hkd->btd", x, w),
        normal(5, 2, 5, 4, 32),
        kernel(7, 4, 32, 48, contract=(0, 1)),
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name):
    function, x, w = PRODUCTS[name]
    assert_as_exact(function, x, w)
    choices = jmx8.explain(quantized(function), x, w).choices
    assert all(choice.op.startswith("mx_matmul") for choice in choices) and choices


def test_kernels_whose_blocks_span_heads_are_refused():
    w = kernel(7, 4, 16, 48, contract=(0, 1))
    with pytest.raises(NotImplementedError, match=r"argument MXArray.*cut its blocks"):
        quantized(lambda x, w: jnp.einsum("thk,hkd->td", x, w))(normal(5, 7, 4, 16), w)


def test_what_is_not_touched_comes_back_as_it_was():
    w = kernel(7, 64, 4, 24, contract=(0,))
    returned, _ = quantized(lambda w, x: (w, x + 1))(w, X)
    assert returned is w

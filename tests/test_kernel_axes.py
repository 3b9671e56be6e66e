"""Kernels with several axes to contract or to keep."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmx8
from jmx8._kernel_axes import einsum_axes, KernelAxes
from jmx8.ops.folded import einsum, FoldedKernel

from .flax_helpers import normal
from .helpers import assert_bits_equal, assert_within


def quantized(kernel, axes):
    tree = {"w": kernel}
    return jmx8.quantize_params(tree, contract=axes, donate=False)["w"]


EQUATIONS = [
    ("bk,kn->bn", (40, 6)),
    ("bk,nk->bn", (6, 40)),
    ("btd,sndh->sbtnh", (3, 2, 40, 5)),
    ("btnh,nhd->btd", (2, 20, 6)),
    ("bhd,ahd->bha", (6, 4, 32)),  # a batch axis between the others
    ("gtk,gkn->tgn", (3, 32, 6)),
    ("abgk,kgn->gnab", (32, 3, 5)),
]


def sizes_of(spec, shape):
    x, w = spec.split("->")[0].split(",")
    sizes = dict(zip(w, shape, strict=True))
    return [sizes.get(c, 4) for c in x.replace("...", "xy")]


@pytest.mark.parametrize("spec, shape", EQUATIONS)
def test_einsum_is_exact(spec, shape):
    kernel, x = normal(1, shape), normal(2, sizes_of(spec, shape))
    axes = einsum_axes(spec)
    w = quantized(kernel, axes)
    assert w.shape == kernel.shape and w.ndim == kernel.ndim and w.size == kernel.size
    y = jax.jit(lambda x, w: einsum(spec, x, FoldedKernel.of(w, axes, shape, "")))(x, w)
    x64, w64 = np.asarray(x, np.float64), np.asarray(jmx8.dequantize(w), np.float64)
    magnitude = np.einsum(spec, np.abs(x64), np.abs(w64))
    assert_within(y, np.einsum(spec, x64, w64), magnitude, acc_bits=20)
    # The general transformation knows such kernels too, if it can keep blocks whole.
    if shape[axes.contracted[-1]] % 32 == 0:
        general = jax.jit(jmx8.quantized(lambda x, w: jnp.einsum(spec, x, w)))(x, w)
        assert_within(general, np.einsum(spec, x64, w64), magnitude, acc_bits=20)


@pytest.mark.parametrize(
    "axes", [a for n in (1, 2) for a in itertools.permutations(range(3), n)]
)
def test_flattening_is_undone(axes):
    roles = KernelAxes(axes[:1], axes[1:])
    kernel = normal(0, (3, 4, 5))
    flat = roles.flatten(kernel)
    assert flat.shape == roles.flat_shape(kernel.shape)
    assert_bits_equal(roles.unflatten(flat, kernel.shape), kernel)


def test_each_row_is_quantized_as_a_matrix():
    kernel = normal(0, (64, 4, 24))
    w = quantized(kernel, (0,))
    flat = jax.jit(lambda k: jmx8.quantize(k.reshape(64, 96), axis=-2))(kernel)
    assert_bits_equal(w.elements, flat.elements)
    assert_bits_equal(w.scales, flat.scales)
    assert_bits_equal(w.flat.elements, flat.elements)
    assert repr(w).endswith("axes (0,) of a kernel)")


def test_stack_comes_and_goes():
    kernel = normal(0, (3, 2, 64, 5))
    w = quantized(kernel, KernelAxes((2,), (0,)))
    assert w.shape == (3, 2, 64, 5)
    shapes = []
    jax.vmap(lambda w: shapes.append(w.shape))(w)
    jax.lax.scan(lambda _, w: (None, shapes.append(w.shape)), None, w)
    assert set(shapes) == {(2, 64, 5)}


def test_what_is_not_supported_says_so():
    w = quantized(normal(0, (4, 16, 6)), (0, 1))
    with pytest.raises(TypeError, match=r"`x @ w\.flat`"):
        _ = normal(1, (3, 64)) @ w
    assert (normal(1, (3, 64)) @ w.flat).shape == (3, 6)
    for spec in ("bk,...k->b", "bk,kk->b", "bk,kn->b"):
        with pytest.raises(ValueError, match="einsum: an MXArray needs an equation"):
            einsum_axes(spec)
    for axes in (KernelAxes(()), KernelAxes((0,), (0,)), KernelAxes((3,))):
        with pytest.raises(ValueError, match="needs at least one contracted axis"):
            axes.normalize(3)
    with pytest.raises(ValueError, match="not one of the last 2 axes"):
        quantized(normal(0, (4, 16, 6)), (0, 3))
    with pytest.raises(TypeError, match="can be indexed with"):
        _ = w[0]
    assert w[...] is w

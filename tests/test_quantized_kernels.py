"""`jmx8.quantized` reaches the kernels, emulated on the host."""

import re

import jax
import jax.numpy as jnp
import pytest

from jmx8 import dequantize, quantized
from jmx8._mx_array import quantize
from jmx8.kernels import tactics


pytest.importorskip("jax_tvm_ffi")
from . import emulated_sm90
from .emulated_sm90 import assert_close, names_of, normal


pytestmark = pytest.mark.cpu

KERNEL = quantize(normal(1, 96, 160), axis=-2)
GROUPS = quantize(normal(1, 3, 160, 96))
# Each is one product, and so one call of a kernel.
PRODUCTS = {
    "x @ w": (lambda x, w: x @ w, (5, 96), KERNEL),
    "x @ w.T": (lambda x, w: x @ w.T, (5, 96), KERNEL.T),
    "einsum": (lambda x, w: jnp.einsum("btd,fd->btf", x, w), (2, 5, 96), KERNEL.T),
    "heads": (
        lambda x, w: jnp.einsum("td,dhk->htk", x, w.reshape(96, 4, 40)),
        (5, 96),
        KERNEL,
    ),
    "groups": (lambda x, w: jnp.einsum("gtd,gfd->gtf", x, w), (3, 5, 96), GROUPS),
    "vmap": (lambda x, w: jax.vmap(lambda v: v @ w)(x), (5, 96), KERNEL),
}


@pytest.fixture
def calls(monkeypatch, tmp_path):
    monkeypatch.setattr(tactics, "path", lambda: tmp_path / "tactics.json")
    return emulated_sm90.use(monkeypatch)


@pytest.mark.parametrize("name", PRODUCTS)
def test_one_call_of_the_kernel_and_no_float_copy_of_the_weight(calls, name):
    function, shape, w = PRODUCTS[name]
    x = normal(0, *shape)
    jitted = jax.jit(quantized(function, activations="bf16"))
    text = jitted.lower(x, w).compile().as_text()
    assert text and text.count("custom_call_target=") == 1 and " dot(" not in text
    assert not re.search(r"\b(bf16|f16|f32)\[(3,)?(160,96|96,160)\]", text)
    out = jitted(x, w)
    assert names_of(calls) == ["gemm"]
    widened = function(x.astype(jnp.float32), dequantize(w))
    assert_close(out, widened.astype(x.dtype))

"""`jmx8.quantized` reaches the kernels, emulated on the host."""

import math
import pathlib
import re
import runpy

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

from jmx8 import dequantize, quantize_params, quantized
from jmx8._mx_array import quantize
from jmx8.convert._walk import walk

from .convert_helpers import is_mx


pytest.importorskip("jax_tvm_ffi")
from .emulated_sm90 import assert_close, names_of, normal


pytestmark = pytest.mark.cpu

FOLDER = pathlib.Path(__file__).parents[1] / "examples"

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


# What to call in an example, the converted weights, and what it takes besides.
EXAMPLES = {
    "equinox_module": ("Block", "converted", "x"),
    "plain_dict": ("function", "converted", "tokens"),
    "flax_linen": ("apply", "params", "tokens"),
    "flax_nnx": ("run", "model", "tokens"),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_call_kernels_and_make_no_float_weight(name, request):
    if name.startswith("flax"):
        pytest.importorskip("flax")
    # Flax's norms promote bfloat16 to float32.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        made = runpy.run_path(str(FOLDER / f"{name}.py"))
        request.getfixturevalue("calls")
        function, converted, given = (made[key] for key in EXAMPLES[name])
        if name.startswith("flax"):
            function = function.__wrapped__  # not what the example has compiled
        if name == "equinox_module":  # is float32, which the kernels do not take
            function = lambda block, x: quantized(block)(x)
            block = made["Block"](256, 8, key=jax.random.key(0))
            block, given = of_bfloat16((block, given))
            converted = quantize_params(block, contract=made["contract"])
        arrays, static = eqx.partition(converted, eqx.is_array)
        run = jax.jit(lambda arrays, x: function(eqx.combine(arrays, static), x))
        # Not compiled: XLA's CPU compiler itself makes float16 of what a scan slices.
        text = run.lower(arrays, given).as_text()
    weights = [leaf.value for leaf in walk(converted) if is_mx(leaf.value)]
    targets = re.findall(r"custom_call @jmx8[.]sm90[.](\w+)", text)
    assert targets.count("gemm") == len(weights) > 0
    floats = re.findall(r"tensor<((?:\d+x)+)(?:bf16|f16|f32)>", text)
    sizes = {math.prod(map(int, shape.split("x")[:-1])) for shape in floats}
    is_stack = name == "plain_dict"  # of which a scan takes one
    assert sizes and sizes.isdisjoint(w.size for w in weights)
    assert not is_stack or sizes.isdisjoint(math.prod(w.shape[1:]) for w in weights)


def of_bfloat16(tree):
    cast = lambda a: a.astype(jnp.bfloat16) if eqx.is_inexact_array(a) else a
    return jax.tree.map(cast, tree)

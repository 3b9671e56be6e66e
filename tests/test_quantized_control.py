"""`jmx8.quantized`: control flow, transformations, and what is compiled."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import jmx8
from jmx8 import dequantize, mx_matmul, mx_matmul_w8a8, quantize, quantized
from jmx8.ops.ragged_dot import mx_ragged_dot

from .convert_helpers import assert_same_bytes, normal
from .jaxprs import largest_float


X = normal(0, (5, 64))
W = quantize(normal(1, (64, 64)), axis=-2)
LAYERS = quantize(normal(2, (3, 64, 64)), axis=-2)
EXPERTS = quantize(normal(3, (3, 96, 64)))
SIZES = jnp.array([2, 0, 2])


def layer(x, w):
    return jax.nn.silu(x @ w)


def mx_layer(x, w):
    return jax.nn.silu(mx_matmul(x, w))


def loop(product):
    return lambda x, w: lax.fori_loop(0, 3, lambda _, x: product(x, w), x)


def scan_layers(product):
    return lambda x, ws: lax.scan(lambda x, w: (product(x, w), x[0]), x, ws)


def scan_rows(product):
    return lambda x, w: lax.scan(lambda c, v: (c, product(v[None], w)), 0, x)[1]


def while_loop(product):
    def function(x, w):
        go_on = lambda state: (state[1] < 4) & (jnp.sum(state[0] * 0) == 0)
        step = lambda state: (product(state[0], w), state[1] + 1)
        return lax.while_loop(go_on, step, (x, 0))[0]

    return function


def cond(product):
    return lambda x, w: lax.cond(
        x[0, 0] > 0, product, lambda x, w: product(-x, w), x, w
    )


def switch(product):
    branches = [product, lambda x, w: x, lambda x, w: -product(x, w)]
    return lambda x, w: lax.switch(2, branches, x, w)


def nested(product):
    def step(x, w):
        x = lax.cond(jnp.sum(x) > 0, jax.jit(product), lambda x, w: x, x, w)
        return jax.checkpoint(product)(x, w), None

    return lambda x, ws: lax.scan(step, x, ws)[0]


def with_custom_jvp(product):
    function = jax.custom_jvp(lambda x, w: product(x, w))
    function.defjvp(lambda primals, tangents: (function(*primals), tangents[0]))
    return function


def with_custom_vjp(product):
    function = jax.custom_vjp(lambda x, w: product(x, w))
    function.defvjp(lambda x, w: (function(x, w), None), lambda _, g: (g, None))
    return function


def straight_through(product):
    """A custom gradient on a value that comes from a weight, but on no weight."""
    round_ = jax.custom_vjp(lambda x: jnp.round(x))
    round_.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))
    return lambda x, w: product(round_(product(x, w)), w)


CONTROL = {
    "jit": (jax.jit, X, W),
    "fori_loop": (loop, X, W),
    "scan over layers": (scan_layers, X, LAYERS),
    "scan over rows": (scan_rows, X, W),
    "while_loop": (while_loop, X, W),
    "cond": (cond, X, W),
    "switch": (switch, X, W),
    "checkpoint": (jax.checkpoint, X, W),
    "nested": (nested, X, LAYERS),
    "custom_jvp": (with_custom_jvp, X, W),
    "custom_vjp": (with_custom_vjp, X, W),
    "custom_vjp of values": (straight_through, X, W),
}


@pytest.mark.parametrize("name", CONTROL)
def test_control_flow_gives_the_bits_of_calls_by_hand(name):
    make, x, w = CONTROL[name]
    assert_same_bytes(
        jax.jit(quantized(make(layer), activations="bf16"))(x, w),
        jax.jit(make(mx_layer))(x, w),
    )


def heads(x, w):
    x = jnp.einsum("td,dhk->htk", x, w.reshape(64, 2, 32))
    return jnp.einsum("htk,dhk->td", x, w.T.reshape(64, 2, 32))


def mx_heads(x, w):
    x = jnp.transpose(mx_matmul(x, w).reshape(5, 2, 32), (1, 0, 2))
    return mx_matmul(jnp.transpose(x, (1, 0, 2)).reshape(5, 64), w.T)


SAME = {
    "x @ w": (lambda x, w: x @ w, mx_matmul, X, W),
    "x @ w.T": (lambda x, w: x @ w.T, lambda x, w: mx_matmul(x, w), X, W.T),
    "einsum": (lambda x, w: jnp.einsum("td,fd->tf", x, w), mx_matmul, X, W.T),
    "groups": (
        lambda x, w: jnp.einsum("gtd,gfd->gtf", x, w),
        mx_matmul,
        normal(0, (3, 5, 64)),
        EXPERTS,
    ),
    "ragged_dot": (
        lambda x, w: lax.ragged_dot(x, w.swapaxes(1, 2), SIZES),
        lambda x, w: mx_ragged_dot(x, w, SIZES),
        X,
        EXPERTS,
    ),
    "fori_loop": (loop(layer), loop(mx_layer), X, W),
    "scan over layers": (scan_layers(layer), scan_layers(mx_layer), X, LAYERS),
    "while_loop": (while_loop(layer), while_loop(mx_layer), X, W),
    "cond": (cond(layer), cond(mx_layer), X, W),
    "vmap": (
        lambda x, w: jax.vmap(lambda v: v @ w)(x),
        lambda x, w: mx_matmul(x, w),
        X,
        W,
    ),
}


def lowered(function, *args):
    return jax.jit(lambda *args: function(*args)).lower(*args)


def without_names(text):
    return re.sub(r"@[\w.<>]+", "@", text)


@pytest.mark.parametrize("name", SAME)
def test_what_is_compiled_is_that_of_calls_by_hand(name):
    function, by_hand, x, w = SAME[name]
    actual = lowered(quantized(function, activations="bf16"), x, w)
    expected = lowered(by_hand, x, w)
    assert without_names(actual.as_text()) == without_names(expected.as_text())


def test_what_is_compiled_for_w8a8_is_that_of_calls_by_hand():
    actual = lowered(quantized(lambda x, w: x @ w, activations="mxfp8"), X, W)
    expected = lowered(mx_matmul_w8a8, X, W)
    assert without_names(actual.as_text()) == without_names(expected.as_text())


@pytest.mark.parametrize("name", [*CONTROL, *SAME])
def test_no_weight_is_widened_outside_an_op(name):
    if name in CONTROL:
        make, x, w = CONTROL[name]
        function = make(layer)
    else:
        function, _, x, w = SAME[name]
    one_layer = 64 * 64  # activations are smaller
    assert 0 < largest_float(quantized(function), x, w) < one_layer


def test_the_search_for_widened_weights_finds_one():
    function = lambda x, w: x @ dequantize(w, x.dtype)
    assert largest_float(function, X, W) == 64 * 64


def test_vmap_grad_and_eval_shape_work_around_it():
    function = quantized(layer, activations="bf16")
    rows = jax.jit(jax.vmap(function, in_axes=(0, None)))(X, W)
    assert_same_bytes(rows, jax.jit(mx_layer)(X, W))
    loss = lambda function: lambda x, w: jnp.sum(function(x, w).astype(jnp.float32))
    grad = jax.jit(jax.grad(loss(function)))(X, W)
    assert_same_bytes(grad, jax.jit(jax.grad(loss(mx_layer)))(X, W))
    assert jax.eval_shape(function, X, W).shape == (5, 64)
    stacked = jax.vmap(function, in_axes=(None, 0))(X, LAYERS)
    assert stacked.shape == (3, 5, 64)


def test_shard_map_works_around_it():
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = P("d"), jax.tree.map(lambda a: P(), W)
    function = quantized(lambda x, w: x @ w, activations="bf16")
    sharded = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=P("d"))
    assert_same_bytes(jax.jit(sharded)(X, W), jax.jit(mx_matmul)(X, W))
    varying = jax.tree.map(lambda a: P("d"), LAYERS)
    scanned = jax.shard_map(
        quantized(lambda x, w: scan_layers(layer)(x, w)[0], activations="bf16"),
        mesh=mesh,
        in_specs=(P("d"), varying),
        out_specs=P("d"),
    )
    expected = jax.jit(lambda x, w: scan_layers(mx_layer)(x, w)[0])(X, LAYERS)
    assert_same_bytes(jax.jit(scanned)(X, LAYERS), expected)


def test_rows_picked_by_index_are_used_as_values():
    table = quantize(normal(4, (50, 96)))
    ids = jnp.array([[3, 7, 3], [49, 0, 1]])
    embed = lambda table, ids: jax.nn.relu(table[ids] * 2)
    out = jax.jit(quantized(embed))(table, ids)
    assert_same_bytes(out, embed(dequantize(table, jnp.bfloat16), ids))
    one = jax.jit(quantized(lambda table, i: table[i] + 1))(table, 7)
    assert_same_bytes(one, dequantize(table, jnp.bfloat16)[7] + 1)
    taken = jax.jit(quantized(lambda table, ids: jnp.take(table, ids, axis=0)))
    far = jnp.array([3, 50, -1])
    expected = jnp.take(dequantize(table, jnp.bfloat16), far, axis=0)
    as_float = lambda a: np.asarray(a, np.float32)  # whose NaNs numpy knows
    np.testing.assert_array_equal(as_float(taken(table, far)), as_float(expected))


def test_experts_picked_by_index_stay_mxfp8():
    ids = jnp.array([2, 0, 2, 1, 0])
    function = lambda x, w: jnp.einsum("td,tfd->tf", x, w[ids])
    out = jax.jit(quantized(function, activations="bf16"))(X, EXPERTS)
    picked = jax.tree.map(lambda a: a[ids], EXPERTS)
    expected = jax.jit(mx_matmul)(X[:, None], picked)[:, 0]
    assert_same_bytes(out, expected)
    assert largest_float(quantized(function), X, EXPERTS) < 96 * 64


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_picking_along_any_axis_but_that_of_the_blocks(order, axis):
    w, index = quantize(normal(5, (4, 6, 96))), jnp.array([[1, 3], [0, 2]])
    pick = lambda w: w.transpose(order).take(index, axis=axis)
    if order[axis] == 2:
        with pytest.raises(NotImplementedError, match=r"gather.*of the blocks"):
            quantized(pick)(w)
        return
    # Blocks last again, since only such an array can be returned.
    blocks = order.index(2) + (order.index(2) > axis)
    function = lambda w: jnp.moveaxis(pick(w), blocks, -1)
    out = jax.jit(quantized(function))(w)
    widened = function(dequantize(w, jnp.bfloat16))
    np.testing.assert_array_equal(dequantize(out, jnp.bfloat16), widened)


def test_mxarrays_are_returned():
    w, stack = quantized(lambda w, s: (w.T[8:16], s[1:].reshape(-1, 64)))(W, EXPERTS)
    assert_same_bytes(w, jax.tree.map(lambda a: a[8:16], W.T))
    assert_same_bytes(stack, jax.tree.map(lambda a: a[1:].reshape(192, -1), EXPERTS))
    with pytest.raises(NotImplementedError, match="last two axes"):
        quantized(lambda w: w.transpose(2, 0, 1))(EXPERTS)


def test_arguments_that_are_no_arrays_stay_what_they_are():
    def function(x, w, *, scale, name, options):
        assert name == "n" and options["flag"] is True and options["f"] is jnp.sin
        return options["f"](x @ w * scale), name, None

    options = {"flag": True, "f": jnp.sin}
    out = quantized(function)(X, W, scale=2.0, name="n", options=options)
    assert out[1:] == ("n", None) and out[0].shape == X.shape


class Block(eqx.Module):
    weight: jax.Array | jmx8.MXArray

    @quantized
    def __call__(self, x):
        """Multiplies."""
        return jnp.einsum("td,df->tf", x, self.weight)


def test_decorates_a_method():
    assert Block.__call__.__doc__ == "Multiplies."
    assert_same_bytes(Block(W)(X), mx_matmul(X, W))


def test_layers_of_jmx8_stay_what_they_are():
    linear = jmx8.nn.MXLinear(64, 32, dtype=jnp.bfloat16, key=jax.random.key(0))
    function = quantized(lambda linear, w, x: linear(x @ w), activations="bf16")
    by_hand = lambda linear, w, x: linear(mx_matmul(x, w))
    args = (linear, W, X)
    assert_same_bytes(jax.jit(function)(*args), jax.jit(by_hand)(*args))

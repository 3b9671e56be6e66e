"""Linen models on MXFP8 weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jmx8
from jmx8.flax import contract_of

from .flax_helpers import count_calls, is_mx, lowered, normal
from .helpers import assert_bits_equal, assert_within


KEY = jax.random.key(0)


def quantized(params, **options):
    return jmx8.quantize_params(params, donate=False, **options)


def apply(model, params, *args):
    return jax.jit(lambda params, *args: model.apply({"params": params}, *args))(
        params, *args
    )


LAYERS = {
    "Dense": (nn.Dense(48), (3, 5, 64), "btk,kn->btn"),
    "Dense, padded": (nn.Dense(48), (3, 40), "bk,kn->bn"),
    "DenseGeneral": (nn.DenseGeneral((4, 24)), (3, 5, 64), "btk,khd->bthd"),
    "DenseGeneral, two contracted": (
        nn.DenseGeneral(24, axis=(-2, -1)),
        (3, 5, 4, 10),
        "bthd,hdn->btn",
    ),
    "DenseGeneral, batch": (
        nn.DenseGeneral(24, batch_dims=(0,)),
        (3, 5, 32),
        "gtk,gkn->gtn",
    ),
    "Einsum": (nn.Einsum((64, 4, 24), "bte,ehd->bthd"), (3, 5, 64), "bte,ehd->bthd"),
    "Einsum, batch": (
        nn.Einsum((4, 32, 8), "nha,hab->nhb"),
        (3, 4, 32),
        "nha,hab->nhb",
    ),
    "Einsum, ellipsis": (
        nn.Einsum((24, 4, 16), "...hd,mhd->m..."),
        (3, 5, 4, 16),
        "bthd,mhd->mbt",
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_exact_products(name):
    layer, shape, spec = LAYERS[name]
    x = normal(1, shape)
    params = jax.jit(layer.init)(KEY, x)["params"]
    params["bias"] = normal(2, params["bias"].shape)
    q = quantized(params, contract=contract_of(layer, x))
    assert is_mx(q["kernel"])
    y, plain = apply(layer, q, x), apply(layer, params, x)
    assert y.shape == plain.shape and y.dtype == plain.dtype

    w, original = np.asarray(jmx8.dequantize(q["kernel"]), np.float64), params["kernel"]
    assert q["kernel"].shape == w.shape == original.shape
    # Half a unit of E4M3's three bits, for which no scale is too small.
    assert np.max(np.abs(w - original)) <= np.max(np.abs(original)) / 16

    names = spec.split(",")[1].split("->")[0], spec.split("->")[1]
    of_bias = "".join(c for c in names[1] if c in names[0])
    bias = np.einsum(
        f"{of_bias},{names[1]}->{names[1]}", params["bias"], np.ones(y.shape)
    )
    x = np.asarray(x, np.float64)
    exact = np.einsum(spec, x, w) + bias
    # The product is rounded before the bias is added, and the sum again.
    magnitude = np.einsum(spec, np.abs(x), np.abs(w)) + np.abs(bias)
    assert_within(y, exact, magnitude, acc_bits=20)


class Block(nn.Module):
    """What people write: nothing of it knows of jmx8."""

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=4)(y)
        y = nn.gelu(nn.Dense(96)(nn.LayerNorm()(x)))
        return x + nn.Dense(64)(y)


class Model(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(50, 64)(tokens)
        for _ in range(2):
            x = Block()(x)
        return nn.Dense(50, use_bias=False)(x)


TOKENS = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)


@functools.cache
def params():
    return jax.jit(Model().init)(KEY, TOKENS)["params"]


def test_model_apply_needs_nothing_else():
    before = apply(Model(), params(), TOKENS)
    q, report = quantized(params(), return_report=True)
    assert len(report.converted) == 2 * (4 + 2) + 1
    y = apply(Model(), q, TOKENS)
    error = jnp.linalg.norm(y - before) / jnp.linalg.norm(before)
    assert 0 < error < 0.1
    # Ordinary parameters go the way they went.
    assert_bits_equal(apply(Model(), params(), TOKENS), before)
    run = lambda q, tokens: Model().apply({"params": q}, tokens)
    assert count_calls(run, q, TOKENS) == len(report.converted)
    both = quantized({"params": params()})
    assert_bits_equal(jax.jit(Model().apply)(both, TOKENS), y)


def test_same_program_as_one_written_by_hand():
    layer, x = nn.Dense(96), normal(1, (2, 3, 64))
    q = quantized(layer.init(KEY, x)["params"])

    def by_hand(q, x):
        return jmx8.mx_matmul(x, q["kernel"]) + q["bias"].reshape(1, 1, -1)

    def by_layer(q, x):
        return layer.apply({"params": q}, x)

    assert lowered(by_layer, q, x) == lowered(by_hand, q, x)


def test_contract_of_agrees_with_what_names_say():
    contract = contract_of(Model(), TOKENS)
    by_name, by_model = quantized(params()), quantized(params(), contract=contract)
    assert jax.tree.structure(by_name) == jax.tree.structure(by_model)
    for a, b in zip(jax.tree.leaves(by_name), jax.tree.leaves(by_model), strict=True):
        assert_bits_equal(a, b)


class Stacked(nn.Module):
    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            lambda block, x, _: (block(x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        return scan(nn.remat(Block)(), x, None)[0]


def test_scan_and_remat():
    x = normal(1, (2, 5, 64))
    stacked = jax.jit(Stacked().init)(KEY, x)["params"]
    with pytest.raises(
        ValueError, match="says which axis a matmul contracts, for 6 of"
    ):
        quantized(stacked)
    q = quantized(stacked, contract=contract_of(Stacked(), x))
    (name,) = q
    assert q[name]["Dense_0"]["kernel"].elements.shape == (3, 96, 64)
    assert q[name]["MultiHeadDotProductAttention_0"]["out"]["kernel"].shape == (
        3,
        4,
        16,
        64,
    )
    expected = x
    for i in range(3):
        one = quantized(jax.tree.map(lambda leaf, i=i: leaf[i], stacked[name]))
        expected = apply(Block(), one, expected)
    np.testing.assert_allclose(apply(Stacked(), q, x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.cpu  # a kernel for groups may add in another order
def test_vmap_over_layers_is_a_group():
    many = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True})(
        48
    )
    x = normal(1, (3, 5, 64))
    stacked = many.init(KEY, x)["params"]
    q = quantized(stacked, contract=contract_of(many, x))
    for i in range(3):
        one = quantized(jax.tree.map(lambda leaf, i=i: leaf[i], stacked))
        assert_bits_equal(apply(many, q, x)[i], apply(nn.Dense(48), one, x[i]))


def test_convolutions_are_kept():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(32, (3, 3))(x)
            return nn.Dense(32)(nn.ConvTranspose(32, (3, 3), name="up_conv1")(x))

    x = normal(1, (1, 4, 4, 3))
    variables = jax.jit(Net().init)(KEY, x)["params"]
    for contract in (None, contract_of(Net(), x)):
        q, report = quantized(variables, contract=contract, return_report=True)
        assert [row.path for row in report.converted] == ["Dense_0/kernel"]
    assert apply(Net(), q, x).shape == (1, 4, 4, 32)


def test_interceptors_and_intermediates_see_one_call():
    x = normal(1, (3, 64))
    q = quantized(nn.Dense(48).init(KEY, x)["params"])
    seen = []

    def intercept(call, args, kwargs, context):
        seen.append(context.method_name)
        return call(*args, **kwargs)

    with nn.intercept_methods(intercept):
        y, state = nn.Dense(48).apply({"params": q}, x, capture_intermediates=True)
    assert seen.count("__call__") == 1
    assert_bits_equal(state["intermediates"]["__call__"][0], y)
    bound = nn.Dense(48).bind({"params": q})
    assert_bits_equal(bound(x), y)


def test_subclass_and_dtype():
    class Twice(nn.Dense):
        @nn.compact
        def __call__(self, inputs):
            return 2 * super().__call__(inputs)

    x = normal(1, (3, 64), jnp.bfloat16)
    plain, twice = nn.Dense(48, dtype=jnp.bfloat16), Twice(48, dtype=jnp.bfloat16)
    q = quantized(plain.init(KEY, x)["params"])
    y = apply(plain, q, x)
    assert y.dtype == jnp.bfloat16
    assert_bits_equal(apply(twice, q, x), 2 * y)


def test_gradient_with_respect_to_the_rest():
    q = quantized(params())
    kernels, rest = partition(q)

    def loss(rest):
        both = jax.tree.map(
            lambda k, r: r if k is None else k, kernels, rest, is_leaf=_is_none_or_mx
        )
        return jnp.sum(jnp.square(apply(Model(), both, TOKENS)))

    grads = jax.jit(jax.grad(loss))(rest)
    assert jnp.any(grads["Block_0"]["Dense_0"]["bias"] != 0)
    assert jnp.any(grads["Embed_0"]["embedding"] != 0)


def _is_none_or_mx(x):
    return x is None or is_mx(x)


def partition(tree):
    mx = jax.tree.map(lambda x: x if is_mx(x) else None, tree, is_leaf=is_mx)
    rest = jax.tree.map(lambda x: None if is_mx(x) else x, tree, is_leaf=is_mx)
    return mx, rest


def test_module_that_multiplies_itself_says_so():
    class Own(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x @ self.param("kernel", nn.initializers.normal(), (64, 64))

    x = normal(1, (3, 64))
    q = quantized(Own().init(KEY, x)["params"])
    with pytest.raises(
        TypeError, match="reads its parameter `kernel`, which is an MXA"
    ):
        Own().apply({"params": q}, x)
    y = jmx8.quantized(Own().apply)({"params": q}, x)
    assert_bits_equal(y, x @ q["kernel"])


def test_kernel_quantized_for_other_axes_is_refused():
    layer, x = nn.DenseGeneral(24, axis=(-2, -1)), normal(1, (3, 4, 16))
    variables = layer.init(KEY, x)["params"]
    wrong = quantized(variables, contract={"kernel": (0,)})
    with pytest.raises(ValueError, match=r"KernelAxes\(contracted=\(0, 1\)"):
        layer.apply({"params": wrong}, x)
    with pytest.raises(ValueError, match="for 1 of the leaves"):
        quantized(variables)


def test_product_of_the_users_own_is_refused():
    x = normal(1, (3, 64))
    q = quantized(nn.Dense(48).init(KEY, x)["params"])
    own = lambda *args, **kwargs: jax.lax.dot_general(*args, **kwargs)
    with pytest.raises(TypeError, match="dot_general of its own"):
        nn.Dense(48, dot_general=own).apply({"params": q}, x)

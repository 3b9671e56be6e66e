"""NNX models on MXFP8 weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jmx8

from .flax_helpers import count_calls, is_mx, lowered, normal
from .helpers import assert_bits_equal, assert_within


def quantized(model, **options):
    return jmx8.quantize_params(model, donate=False, **options)


def kernel(layer):
    return layer.kernel.get_value()


def rngs():
    return nnx.Rngs(0)


LAYERS = {
    "Linear": (lambda: nnx.Linear(64, 48, rngs=rngs()), (3, 5, 64), "btk,kn->btn"),
    "LinearGeneral": (
        lambda: nnx.LinearGeneral(64, (4, 24), rngs=rngs()),
        (3, 5, 64),
        "btk,khd->bthd",
    ),
    "LinearGeneral, two contracted, odd sizes": (
        lambda: nnx.LinearGeneral((4, 10), 24, axis=(-2, -1), rngs=rngs()),
        (3, 5, 4, 10),
        "bthd,hdn->btn",
    ),
    "LinearGeneral, axes apart": (
        lambda: nnx.LinearGeneral((4, 32), (6, 2), axis=(1, -1), rngs=rngs()),
        (3, 4, 5, 32),
        "bhtd,hdmn->btmn",
    ),
    "LinearGeneral, batch": (
        lambda: nnx.LinearGeneral(32, 24, batch_axis={0: 3}, rngs=rngs()),
        (3, 5, 32),
        "gtk,gkn->gtn",
    ),
    "Einsum": (
        lambda: nnx.Einsum("bte,ehd->bthd", (64, 4, 24), (4, 24), rngs=rngs()),
        (3, 5, 64),
        "bte,ehd->bthd",
    ),
    "Einsum, batch": (
        lambda: nnx.Einsum("nha,hab->nhb", (4, 32, 8), (4, 8), rngs=rngs()),
        (3, 4, 32),
        "nha,hab->nhb",
    ),
    "Einsum, free axis first": (
        lambda: nnx.Einsum("...hd,mhd->m...", (24, 4, 16), (24,), rngs=rngs()),
        (3, 5, 4, 16),
        "bthd,mhd->mbt",
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_exact_products(name):
    make, shape, spec = LAYERS[name]
    layer, x = make(), normal(1, shape)
    layer.bias.set_value(normal(2, layer.bias.shape))
    q = quantized(layer)
    assert is_mx(kernel(q))
    run = nnx.jit(lambda layer, x: layer(x))
    y, plain = run(q, x), run(layer, x)
    assert y.shape == plain.shape and y.dtype == plain.dtype

    w = np.asarray(jmx8.dequantize(kernel(q)), np.float64)
    # Models ask for shapes: Gemma's number of heads is one of a kernel's.
    assert q.kernel.shape == w.shape == layer.kernel.shape
    # Half a unit of E4M3's three bits, for which no scale is too small.
    assert np.max(np.abs(w - kernel(layer))) <= np.max(np.abs(kernel(layer))) / 16

    x64 = np.asarray(x, np.float64)
    bias = np.asarray(layer.bias.get_value(), np.float64)
    bias = _spread_bias(bias, y.shape, spec)
    exact = np.einsum(spec, x64, w) + bias
    # The product is rounded before the bias is added, and the sum again.
    magnitude = np.einsum(spec, np.abs(x64), np.abs(w)) + np.abs(bias)
    assert_within(y, exact, magnitude, acc_bits=20)


def _spread_bias(bias, shape, spec):
    out = spec.split("->")[1]
    w = spec.split("->")[0].split(",")[1]
    names = [c for c in out if c in w]
    return np.einsum(f"{''.join(names)},{out}->{out}", bias, np.ones(shape))


class Model(nnx.Module):
    """What people write: nothing of it knows of jmx8."""

    def __init__(self, *, rngs):
        self.embed = nnx.Embed(50, 64, rngs=rngs)
        self.norm = nnx.LayerNorm(64, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, 64, decode=False, rngs=rngs)
        self.layers = nnx.List(
            [nnx.Linear(64, 96, rngs=rngs), nnx.Linear(96, 64, rngs=rngs)]
        )
        self.head = nnx.Linear(64, 50, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        x = x + self.attention(self.norm(x))
        x = x + self.layers[1](nnx.gelu(self.layers[0](x)))
        return self.head(x)


TOKENS = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)


@pytest.fixture(scope="module")
def model():
    return quantized(Model(rngs=rngs()))


def test_a_module_gives_a_new_module(model):
    original = Model(rngs=rngs())
    before = original(TOKENS)
    q, report = quantized(original, return_report=True)
    assert type(q) is Model and not is_mx(kernel(original.head))
    assert [row.path for row in report.converted] == [
        "attention/key/kernel",
        "attention/out/kernel",
        "attention/query/kernel",
        "attention/value/kernel",
        "head/kernel",
        "layers/0/kernel",
        "layers/1/kernel",
    ]
    assert report.converted[0].reason == "nnx.LinearGeneral"
    assert count_calls(lambda q, t: q(t), q, TOKENS) == 7
    assert_bits_equal(original(TOKENS), before)
    assert_bits_equal(q(TOKENS), model(TOKENS))


def test_donation_frees_the_original():
    original = Model(rngs=rngs())
    arrays = [kernel(original.head), kernel(original.attention.out)]
    q = jmx8.quantize_params(original)
    assert all(array.is_deleted() for array in arrays)
    assert not kernel(q.head).elements.is_deleted()


def test_state_with_the_original_graph(model):
    graph, state = nnx.split(Model(rngs=rngs()))
    assert_bits_equal(nnx.merge(graph, quantized(state))(TOKENS), model(TOKENS))
    pure = nnx.to_pure_dict(quantized(state))
    assert pure["head"]["kernel"].shape == (64, 50)
    other = Model(rngs=nnx.Rngs(7))
    nnx.update(other, quantized(state))
    assert_bits_equal(other(TOKENS), model(TOKENS))


def test_same_program_as_one_written_by_hand():
    layer = quantized(nnx.Linear(64, 96, rngs=rngs()))
    x = normal(1, (2, 3, 64))

    def by_hand(layer, x):
        bias = layer.bias.get_value()
        return jmx8.mx_matmul(x, kernel(layer)) + bias.reshape(1, 1, -1)

    assert lowered(lambda m, x: m(x), layer, x) == lowered(by_hand, layer, x)


def test_dtypes_promote_as_for_arrays():
    x = normal(1, (3, 64), jnp.bfloat16)
    for dtype, expected in ((jnp.bfloat16, jnp.bfloat16), (jnp.float32, jnp.float32)):
        layer = nnx.Linear(64, 48, dtype=dtype, rngs=rngs())
        assert quantized(layer)(x).dtype == layer(x).dtype == expected
    options = {"dtype": jnp.bfloat16, "preferred_element_type": jnp.float32}
    layer = nnx.Linear(64, 48, use_bias=False, **options, rngs=rngs())
    assert quantized(layer)(x).dtype == layer(x).dtype == jnp.float32
    # Strict promotion refuses the mixture, with an MXArray as with an array.
    mixed = nnx.Linear(64, 48, rngs=rngs())
    for layer in (mixed, quantized(mixed)):
        with pytest.raises(jax.dtypes.TypePromotionError):
            layer(x)


def test_jit_grad_eval_shape(model):
    jitted = nnx.jit(lambda m, t: m(t))(model, TOKENS)
    np.testing.assert_allclose(jitted, model(TOKENS), rtol=1e-4, atol=1e-5)
    abstract = nnx.eval_shape(lambda: Model(rngs=rngs()))
    q = jmx8.quantize_params(abstract)
    assert isinstance(kernel(q.head).elements, jax.ShapeDtypeStruct)
    assert nnx.eval_shape(lambda m, t: m(t), q, TOKENS).shape == (2, 6, 50)
    same = lambda a, b: a.shape == b.shape and a.dtype == b.dtype
    assert jax.tree.all(jax.tree.map(same, nnx.state(q), nnx.state(model)))

    bias = nnx.All(nnx.Param, nnx.PathContains("bias"))
    loss = lambda m: jnp.sum(jnp.square(m(TOKENS)))
    grads = nnx.grad(loss, argnums=nnx.DiffState(0, bias))(model)
    assert all(jnp.any(g != 0) for g in jax.tree.leaves(grads["layers"]))


@pytest.mark.cpu  # counts XLA's products; a kernel for groups may add in another order
def test_vmap_over_input_is_one_call_and_over_layers_a_group():
    layer, x = quantized(nnx.Linear(64, 48, rngs=rngs())), normal(1, (5, 64))
    rows = nnx.vmap(lambda m, x: m(x), in_axes=(None, 0))
    assert_bits_equal(rows(layer, x), layer(x))
    assert str(jax.make_jaxpr(rows)(layer, x)).count(" dot_general[") == 1

    make = lambda key: nnx.Linear(64, 48, rngs=nnx.Rngs(key))
    stack = nnx.vmap(make)(jax.random.split(jax.random.key(0), 3))
    q = quantized(stack)
    assert kernel(q).shape == (3, 64, 48) and kernel(q).elements.shape == (3, 48, 64)
    xs = normal(1, (3, 5, 64))
    out = nnx.vmap(lambda m, x: m(x))(q, xs)
    for i in range(3):
        one = quantized(make(jax.random.split(jax.random.key(0), 3)[i]))
        assert_bits_equal(out[i], one(xs[i]))


def test_scan_over_stacked_attention():
    make = lambda key: nnx.MultiHeadAttention(4, 64, decode=False, rngs=nnx.Rngs(key))
    keys = jax.random.split(jax.random.key(0), 3)
    q = quantized(nnx.vmap(make)(keys))
    x = normal(1, (2, 5, 64))

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def scanned(x, layer):
        return layer(x)

    expected = x
    for key in keys:
        expected = nnx.jit(lambda m, x: m(x))(quantized(make(key)), expected)
    np.testing.assert_allclose(scanned(x, q), expected, rtol=1e-5, atol=1e-6)


def test_shared_weights_stay_shared():
    class Tied(nnx.Module):
        def __init__(self):
            self.a = nnx.Linear(64, 64, rngs=rngs())
            self.b = nnx.Linear(64, 64, rngs=nnx.Rngs(1))
            self.b.kernel = self.a.kernel

    q = quantized(Tied())
    assert is_mx(kernel(q.a)) and q.a.kernel is q.b.kernel


def test_what_is_not_a_kernel_is_kept():
    class Net(nnx.Module):
        def __init__(self):
            self.conv = nnx.Conv(32, 32, (3, 3), rngs=rngs())
            self.dense = nnx.Linear(32, 32, rngs=rngs())
            self.cache = nnx.Cache(normal(0, (4, 64)))

    q, report = quantized(Net(), return_report=True)
    reasons = {row.path: row.reason for row in report.kept}
    assert reasons["conv/kernel"] == "nnx.Conv, not a matmul"
    assert reasons["cache"] == "nnx.Cache, not a Param"
    assert [row.path for row in report.converted] == ["dense/kernel"]
    assert isinstance(q.cache, nnx.Cache)


def test_kernel_quantized_for_other_axes_is_refused():
    layer = nnx.LinearGeneral((4, 16), 64, axis=(-2, -1), rngs=rngs())
    graph, state = nnx.split(layer)
    wrong = nnx.merge(graph, quantized(state, contract={"kernel": (0,)}))
    with pytest.raises(ValueError, match=r"KernelAxes\(contracted=\(0, 1\)"):
        wrong(normal(1, (3, 4, 16)))
    with pytest.raises(ValueError, match=r"but nnx\.LinearGeneral"):
        quantized(layer, contract={"kernel": (0,)})


def test_product_of_the_users_own_is_refused():
    own = lambda *args, **kwargs: jax.lax.dot_general(*args, **kwargs)
    layer = quantized(nnx.Linear(64, 48, dot_general=own, rngs=rngs()))
    with pytest.raises(TypeError, match="dot_general of its own"):
        layer(normal(1, (3, 64)))


def test_out_sharding_is_refused():
    layer = quantized(nnx.Linear(64, 48, rngs=rngs()))
    with pytest.raises(NotImplementedError, match="out_sharding"):
        layer(normal(1, (3, 64)), out_sharding=jax.P(None, None))

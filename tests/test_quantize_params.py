import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jmx8
from jmx8.convert import (
    convert_leaf,
    quantize_params,
)
from jmx8.convert._walk import rebuild, walk

from .convert_helpers import (
    assert_same_bytes,
    converted_paths,
    is_mx,
    normal,
    quantized,
    small_tree,
)


@jax.tree_util.register_pytree_with_keys_class
class FrozenMapping:
    """A mapping that is registered as FrozenDict is."""

    def __init__(self, items):
        self.items = items

    def tree_flatten_with_keys(self):
        names = tuple(sorted(self.items))
        key = jax.tree_util.DictKey
        return tuple((key(name), self.items[name]) for name in names), names

    @classmethod
    def tree_unflatten(cls, names, values):
        return cls(dict(zip(names, values, strict=True)))


def test_dict_is_converted_as_quantize_does_and_keeps_its_structure():
    tree = small_tree()
    out = quantize_params(tree, donate=False)
    assert jax.tree.structure(out, is_leaf=is_mx) == jax.tree.structure(tree)
    assert converted_paths(out) == [
        "layers/0/gate_proj/weight",
        "layers/0/q_proj/weight",
        "layers/1/experts/w13",
        "layers/1/experts/w2",
    ]
    before, after = tree["layers"], out["layers"]
    for name in ("q_proj", "gate_proj"):
        expected = quantized(before[0][name]["weight"])
        assert_same_bytes(after[0][name]["weight"], expected)
    for name in ("w13", "w2"):
        expected = quantized(before[1]["experts"][name])
        assert_same_bytes(after[1]["experts"][name], expected)
        assert after[1]["experts"][name].shape == before[1]["experts"][name].shape
    assert after[0]["gate"]["weight"] is before[0]["gate"]["weight"]
    assert out["lm_head"]["weight"] is tree["lm_head"]["weight"]
    assert out["steps"] is tree["steps"] and out["name"] == "tree"


def test_flax_kernel_is_contracted_along_its_second_last_axis():
    kernel = normal(0, (40, 24), jnp.float32)
    out = quantize_params({"params": {"Dense_0": {"kernel": kernel}}}, donate=False)
    w = out["params"]["Dense_0"]["kernel"]
    assert_same_bytes(w, quantized(kernel, axis=-2))
    assert w.shape == (40, 24) and w.elements.shape == (24, 64)
    x = normal(1, (3, 40), jnp.float32)
    expected = x @ jmx8.dequantize(w)
    np.testing.assert_allclose(x @ w, expected, rtol=1e-5, atol=1e-5)


def test_registered_mappings_and_flat_checkpoint_names_work():
    weight = normal(0, (32, 64))
    tree = FrozenMapping({"model.layers.0.mlp.up_proj.weight": weight, "b": [weight]})
    out = quantize_params(tree, donate=False, skip="b")
    assert isinstance(out, FrozenMapping)
    assert_same_bytes(out.items["model.layers.0.mlp.up_proj.weight"], quantized(weight))
    assert out.items["b"][0] is weight
    flat = {"model.layers.0.mlp.gate.weight": weight, "lm_head.weight": weight}
    assert converted_paths(quantize_params(flat)) == []


def test_flax_variables_and_state_work():
    nn = pytest.importorskip("flax.linen")
    nnx = pytest.importorskip("flax.nnx")
    core = pytest.importorskip("flax.core")

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.LayerNorm()(nn.Dense(48)(x))

    variables = core.freeze(Net().init(jax.random.key(0), jnp.ones((1, 64))))
    out = quantize_params(variables, donate=False)
    assert isinstance(out, core.FrozenDict)
    assert converted_paths(out) == ["params/Dense_0/kernel"]
    kernel = variables["params"]["Dense_0"]["kernel"]
    expected = quantized(kernel, axis=-2)
    assert_same_bytes(out["params"]["Dense_0"]["kernel"], expected)

    linear = nnx.Linear(64, 48, rngs=nnx.Rngs(0))
    state = quantize_params(nnx.state(linear), donate=False)
    assert converted_paths(state) == ["kernel/value"]


def test_equinox_modules_are_recognised_by_type():
    keys = iter(jax.random.split(jax.random.key(0), 8))

    class Model(eqx.Module):
        first: eqx.nn.Linear
        table: eqx.nn.Embedding
        conv: eqx.nn.Conv1d
        cell: eqx.nn.GRUCell
        scale: eqx.nn.LayerNorm
        scalar: eqx.nn.Linear
        wrapped: eqx.nn.WeightNorm

    linear = functools.partial(eqx.nn.Linear, 64, 64)
    model = Model(
        linear(key=next(keys)),
        eqx.nn.Embedding(50, 64, key=next(keys)),
        eqx.nn.Conv1d(4, 4, 3, key=next(keys)),
        eqx.nn.GRUCell(32, 32, key=next(keys)),
        eqx.nn.LayerNorm((2, 32)),
        eqx.nn.Linear("scalar", 64, key=next(keys)),
        eqx.nn.WeightNorm(linear(key=next(keys))),
    )
    out, report = quantize_params(model, donate=False, return_report=True)
    assert converted_paths(out) == ["first/weight"]
    assert_same_bytes(out.first.weight, quantized(model.first.weight))
    reasons = {row.path: row.reason for row in report.rows}
    assert reasons == {
        "first/weight": "eqx.nn.Linear",
        "first/bias": "fewer than 2 axes",
        "table/weight": "eqx.nn.Embedding",
        "conv/weight": "eqx.nn.Conv1d",
        "conv/bias": "eqx.nn.Conv1d",
        "cell/weight_ih": "eqx.nn.GRUCell",
        "cell/weight_hh": "eqx.nn.GRUCell",
        "cell/bias": "fewer than 2 axes",
        "cell/bias_n": "fewer than 2 axes",
        "scale/weight": "eqx.nn.LayerNorm",
        "scale/bias": "eqx.nn.LayerNorm",
        "scalar/weight": "eqx.nn.Linear with a scalar feature",
        "scalar/bias": "fewer than 2 axes",
        "wrapped/layer/weight": "inside eqx.nn.WeightNorm",
        "wrapped/layer/bias": "fewer than 2 axes",
        "wrapped/g": "inside eqx.nn.WeightNorm",
    }


def test_subclass_of_an_equinox_layer_is_treated_like_it():
    table: Any = type("Table", (eqx.nn.Embedding,), {})
    dense: Any = type("Dense", (eqx.nn.Linear,), {})
    key = jax.random.key(0)
    tree = [table(50, 64, key=key), dense(64, 32, key=key)]
    assert converted_paths(quantize_params(tree)) == ["1/weight"]


def test_mlp_with_converted_weights_runs():
    mlp = eqx.nn.MLP(64, 10, 48, 2, key=jax.random.key(0))
    x = normal(1, (5, 64), jnp.float32)
    converted = quantize_params(mlp, donate=False)
    assert converted_paths(converted) == [f"layers/{i}/weight" for i in range(3)]
    plain = jax.tree.map(
        lambda w: jmx8.dequantize(w) if is_mx(w) else w, converted, is_leaf=is_mx
    )
    actual = eqx.filter_jit(lambda m, x: jax.vmap(m)(x))(converted, x)
    np.testing.assert_allclose(actual, jax.vmap(plain)(x), rtol=1e-4, atol=1e-5)
    assert not np.array_equal(jax.vmap(plain)(x), jax.vmap(mlp)(x))


def test_stacked_linear_layers_are_converted_along_their_last_axis():
    keys = jax.random.split(jax.random.key(0), 3)
    layers = eqx.filter_vmap(lambda key: eqx.nn.Linear(64, 32, key=key))(keys)
    out = quantize_params(layers, donate=False)
    assert out.weight.shape == (3, 32, 64)
    assert_same_bytes(out.weight, quantized(layers.weight))
    x = normal(1, (64,), jnp.float32)
    _, ys = jax.lax.scan(lambda x, layer: (x, layer(x)), x, out)
    expected = jax.vmap(lambda w, b: w @ x + b)(jmx8.dequantize(out.weight), out.bias)
    np.testing.assert_allclose(ys, expected, rtol=1e-4, atol=1e-5)


def test_walk_and_rebuild_are_inverse():
    tree = {"m": eqx.nn.MLP(4, 4, 4, 1, key=jax.random.key(0)), "a": (1, [None, "x"])}
    tree["mx"] = quantized(normal(0, (4, 32)))
    leaves = walk(tree)
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_mx)
    names = [jax.tree_util.keystr(key, simple=True, separator="/") for key, _ in flat]
    assert [leaf.path for leaf in leaves] == names
    assert all(a.value is b for a, (_, b) in zip(leaves, flat, strict=True))
    again = rebuild(tree, [leaf.value for leaf in leaves])
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    assert [leaf.path for leaf in walk(jnp.ones(3))] == [""]


def test_abstract_in_abstract_out():
    tree = {"a": {"weight": jax.ShapeDtypeStruct((32, 70), jnp.bfloat16)}, "b": None}
    tree["norm"] = jax.ShapeDtypeStruct((3,), jnp.float32)
    out, report = quantize_params(tree, return_report=True)
    w = out["a"]["weight"]
    assert is_mx(w) and w.shape == (32, 70) and w.dtype == jnp.bfloat16
    assert w.elements == jax.ShapeDtypeStruct((32, 96), jnp.float8_e4m3fn)
    assert w.scales == jax.ShapeDtypeStruct((32, 3), jnp.float8_e8m0fnu)
    assert out["norm"] is tree["norm"]
    assert report.bytes_before == 32 * 70 * 2 + 12
    assert report.bytes_after == 32 * 96 + 32 * 3 + 12
    assert report.rows[0].statistics is None


def test_eval_shape_and_jit_work():
    tree = {"a": {"kernel": normal(0, (40, 24))}, "b": {"weight": normal(1, (8, 32))}}
    eager = quantize_params(tree, donate=False)
    shapes = jax.eval_shape(quantize_params, tree)
    assert jax.tree.structure(shapes) == jax.tree.structure(eager)
    for a, b in zip(jax.tree.leaves(shapes), jax.tree.leaves(eager), strict=True):
        assert isinstance(a, jax.ShapeDtypeStruct)
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert_same_bytes(jax.jit(quantize_params)(tree), eager)


def test_numpy_arrays_become_jax_arrays():
    x = np.asarray(normal(0, (24, 40)))
    assert x.dtype == ml_dtypes.bfloat16
    out = quantize_params({"weight": x, "bias": x[0]})
    assert_same_bytes(out["weight"], quantized(jnp.asarray(x)))
    assert isinstance(out["weight"].elements, jax.Array)
    assert isinstance(out["bias"], np.ndarray)
    wide = np.asarray(x, np.float64)
    w, row = convert_leaf("wide", wide, with_stats=True)
    assert_same_bytes(w, quantized(jnp.asarray(wide)))
    assert (row.dtype, row.bytes_before) == ("float64", wide.nbytes)


def test_one_compilation_serves_equal_shapes():
    from jmx8.convert import _leaf

    tree = [{"weight": normal(i, (24, 72))} for i in range(5)]
    jitted: Any = _leaf._jitted_quantize
    before = jitted._cache_size()
    quantize_params(tree)
    assert jitted._cache_size() == before + 1

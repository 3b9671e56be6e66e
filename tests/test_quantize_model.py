from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmx8
from jmx8.convert import quantize_model, quantize_params
from jmx8.nn import Experts, MXExperts, MXLinear, SparseMoE

from .convert_helpers import (
    assert_same_bytes,
    converted_paths,
    is_mx,
    normal,
    quantized,
)


class Block(eqx.Module):
    q_proj: eqx.nn.Linear | MXLinear
    norm: eqx.nn.LayerNorm
    mlp: SparseMoE


class Model(eqx.Module):
    embed: eqx.nn.Embedding
    layers: list[Block]
    lm_head: eqx.nn.Linear
    table: jax.Array


def make_model(key=None):
    keys = jax.random.split(jax.random.key(0) if key is None else key, 9)

    def block(k1, k2, k3):
        experts = Experts.init(4, 32, 64, key=k2)
        gate = eqx.nn.Linear(32, 4, use_bias=False, key=k3)
        moe = SparseMoE(gate, experts, top_k=2)
        return Block(eqx.nn.Linear(32, 32, key=k1), eqx.nn.LayerNorm(32), moe)

    return Model(
        eqx.nn.Embedding(10, 32, key=keys[0]),
        [block(*keys[1:4]), block(*keys[4:7])],
        eqx.nn.Linear(32, 10, use_bias=False, key=keys[7]),
        jax.random.normal(keys[8], (8, 32)),
    )


def with_dequantized_weights(model):
    """Returns the model before conversion, with the weights that it has after."""

    def restore(node):
        if isinstance(node, MXLinear):
            n, k = node.weight.shape
            linear = eqx.nn.Linear(k, n, node.bias is not None, key=jax.random.key(0))
            where = lambda m: (m.weight, m.bias)
            return eqx.tree_at(
                where,
                linear,
                (jmx8.dequantize(jmx8.canonical(node.weight)), node.bias),
                is_leaf=lambda x: x is None,
            )
        return node

    return jax.tree.map(restore, model, is_leaf=lambda x: isinstance(x, MXLinear))


def types(model):
    layers = (eqx.nn.Linear, MXLinear, Experts, MXExperts)
    found = jax.tree.leaves(model, is_leaf=lambda x: isinstance(x, layers))
    return [type(x).__name__ for x in found if isinstance(x, layers)]


def test_layers_are_swapped_by_default_rules():
    model = make_model()
    out = quantize_model(model, donate=False, activations="bf16")
    assert isinstance(out, Model)
    assert types(out) == ["MXLinear", "Linear", "MXExperts"] * 2 + ["Linear"]
    for before, after in zip(model.layers, out.layers, strict=True):
        assert isinstance(after.q_proj, MXLinear)
        assert after.q_proj.activations == "bf16"
        assert_same_bytes(after.q_proj.weight, quantized(before.q_proj.weight))
        assert after.q_proj.bias is before.q_proj.bias
        experts = after.mlp.experts
        assert isinstance(experts, MXExperts) and experts.activations == "bf16"
        assert_same_bytes(experts.w13, quantized(before.mlp.experts.w13))
        assert_same_bytes(experts.w2, quantized(before.mlp.experts.w2))
        assert after.mlp.gate.weight is before.mlp.gate.weight
        assert after.norm.weight is before.norm.weight
        assert after.mlp.top_k == 2
    assert out.lm_head.weight is model.lm_head.weight
    assert out.embed.weight is model.embed.weight
    assert out.table is model.table


def test_only_and_skip_select_layers():
    model = make_model()
    out = quantize_model(model, only=["lm_head", "*/mlp/gate"], donate=False)
    assert converted_paths(out) == [
        "layers/0/mlp/gate/weight",
        "layers/1/mlp/gate/weight",
        "lm_head/weight",
    ]
    assert types(out) == ["Linear", "MXLinear", "Experts"] * 2 + ["MXLinear"]
    out = quantize_model(model, skip=["layers/0", "*/experts"], donate=False)
    assert converted_paths(out) == ["layers/1/q_proj/weight"]
    out = quantize_model(model, only=lambda path, x: x.shape == (32, 32), donate=False)
    assert converted_paths(out) == [f"layers/{i}/q_proj/weight" for i in range(2)]


def test_report_says_why_everything_else_is_kept():
    out, report = quantize_model(make_model(), return_report=True)
    assert report.bytes_after == sum(
        x.nbytes for x in jax.tree.leaves(out) if eqx.is_array(x)
    )
    reasons = {row.path: row.reason for row in report.rows}
    assert reasons["embed/weight"] == "eqx.nn.Embedding"
    assert reasons["table"] == "not the weight of an eqx.nn.Linear or Experts"
    assert reasons["layers/0/q_proj/weight"] == "eqx.nn.Linear"
    assert reasons["layers/0/q_proj/bias"] == "fewer than 2 axes"
    assert reasons["layers/0/mlp/gate/weight"] == "router, kept by default"
    assert reasons["layers/0/mlp/experts/w13"] == "Experts"
    assert reasons["lm_head/weight"] == "lm_head, kept by default"
    assert [row.statistics is not None for row in report.converted] == [True] * 6


def test_converted_mlp_runs_like_its_dequantized_twin():
    mlp = eqx.nn.MLP(48, 10, 64, 2, key=jax.random.key(0))
    out = quantize_model(mlp, donate=False, activations="bf16")
    assert types(out) == ["MXLinear"] * 3
    x = normal(1, (5, 48), jnp.float32)
    actual = eqx.filter_jit(lambda model, x: jax.vmap(model)(x))(out, x)
    expected = jax.vmap(with_dequantized_weights(out))(x)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
    original = jax.vmap(mlp)(x)
    assert 0 < jnp.max(jnp.abs(actual - original)) < 0.1 * jnp.max(jnp.abs(original))


def test_converted_attention_runs_like_its_dequantized_twin():
    attention = eqx.nn.MultiheadAttention(
        2, 32, use_query_bias=True, key=jax.random.key(0)
    )
    out = quantize_model(attention, donate=False, activations="bf16")
    assert types(out) == ["MXLinear"] * 4
    x = normal(1, (3, 6, 32), jnp.float32)
    run = eqx.filter_jit(lambda model, x: jax.vmap(lambda x: model(x, x, x))(x))
    expected = run(with_dequantized_weights(out), x)
    np.testing.assert_allclose(run(out, x), expected, rtol=1e-4, atol=1e-5)


def test_converted_moe_runs_like_its_dequantized_twin():
    moe = make_model().layers[0].mlp
    out = quantize_model(moe, donate=False, activations="bf16")
    assert types(out) == ["Linear", "MXExperts"]
    w13, w2 = jmx8.dequantize(out.experts.w13), jmx8.dequantize(out.experts.w2)
    where = lambda moe: (moe.experts.w13, moe.experts.w2)
    twin = eqx.tree_at(where, moe, (w13, w2))
    x = normal(1, (7, 32), jnp.float32)
    run = eqx.filter_jit(lambda model, x: model(x))
    np.testing.assert_allclose(run(out, x), run(twin, x), rtol=1e-4, atol=1e-5)


def test_abstract_model_has_the_structure_of_the_converted_one():
    abstract = eqx.filter_eval_shape(make_model)
    out, report = quantize_model(abstract, return_report=True)
    concrete, expected = quantize_model(make_model(), return_report=True)
    assert jax.tree.structure(out) == jax.tree.structure(concrete)
    for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(concrete), strict=True):
        assert isinstance(a, jax.ShapeDtypeStruct)
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert types(out) == types(concrete)
    plain = [row.to_dict() | {"sqnr_db": None} for row in report.rows]
    for row, other in zip(plain, expected.rows, strict=True):
        for name in (
            "path",
            "shape",
            "action",
            "reason",
            "bytes_before",
            "bytes_after",
        ):
            assert row[name] == other.to_dict()[name]


def test_traced_conversion_is_the_same():
    model = make_model()
    traced = eqx.filter_jit(quantize_model)(model)
    assert_same_bytes(
        eqx.filter(traced, eqx.is_array),
        eqx.filter(quantize_model(model), eqx.is_array),
    )


def test_biases_of_experts_are_kept_as_they_are():
    experts = Experts.init(2, 32, 32, use_bias=True, key=jax.random.key(0))
    out = quantize_model(experts, donate=False)
    assert isinstance(out, MXExperts)
    assert out.w13_bias is experts.w13_bias and out.w2_bias is experts.w2_bias
    assert out.activation == experts.activation


def test_bias_keeps_its_dtype():
    linear = eqx.nn.Linear(32, 64, key=jax.random.key(0))
    linear = eqx.tree_at(lambda m: m.weight, linear, linear.weight.astype(jnp.bfloat16))
    out = quantize_model(linear)
    assert out.weight.dtype == jnp.bfloat16 and out.bias.dtype == jnp.float32


def test_layers_that_an_mx_layer_would_not_replace_are_kept():
    class Scaled(eqx.nn.Linear):
        def __call__(self, x, *, key=None):
            return 2 * super().__call__(x)

    keys = jax.random.split(jax.random.key(0), 4)
    scaled: Any = Scaled
    model = [
        scaled(32, 32, key=keys[0]),
        eqx.nn.WeightNorm(eqx.nn.Linear(32, 32, key=keys[1])),
        eqx.nn.Linear(32, "scalar", key=keys[2]),
        eqx.nn.Linear(32, 32, key=keys[3]),
    ]
    out, report = quantize_model(model, donate=False, return_report=True)
    assert converted_paths(out) == ["3/weight"]
    reasons = {row.path: row.reason for row in report.rows}
    assert reasons["0/weight"] == "not the weight of an eqx.nn.Linear or Experts"
    assert reasons["1/layer/weight"] == "inside eqx.nn.WeightNorm"
    assert reasons["2/weight"] == "eqx.nn.Linear with a scalar feature"
    assert jax.vmap(out[2])(jnp.ones((5, 32))).shape == (5,)


def test_experts_are_converted_whole():
    text = "an Experts is converted whole or kept whole, but one weight of it, `.*w2`"
    with pytest.raises(ValueError, match=text):
        quantize_model(make_model(), skip="*/w2")
    with pytest.raises(ValueError, match=text):
        quantize_model(make_model(), only="*/w13")


def test_model_without_layers_is_an_error():
    with pytest.raises(ValueError, match="got Embedding with none"):
        quantize_model(eqx.nn.Embedding(4, 32, key=jax.random.key(0)))


def test_patterns_and_values_are_checked_like_those_of_params():
    with pytest.raises(ValueError, match="quantize_model: skip: `q_proj` matches no"):
        quantize_model(make_model(), skip="q_proj")
    with pytest.raises(ValueError, match="`embed` matches nothing that can be convert"):
        quantize_model(make_model(), only="embed")
    bad = make_model()
    where = lambda m: m.layers[1].mlp.experts.w2
    bad = eqx.tree_at(where, bad, where(bad).at[0, 0, 0].set(jnp.inf))
    with pytest.raises(ValueError, match="w2: 0 NaN, 1 infinite"):
        quantize_model(bad)
    assert not any(x.is_deleted() for x in jax.tree.leaves(bad))
    wrong: Any = "fp8"
    with pytest.raises((ValueError, TypeError)):  # with the type checker or without
        quantize_model(make_model(), activations=wrong)


def test_second_conversion_changes_nothing():
    once = quantize_model(make_model())
    twice = quantize_model(once)
    assert jax.tree.structure(once) == jax.tree.structure(twice)
    for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(twice), strict=True):
        assert a is b


def test_model_with_converted_weights_gets_mx_layers():
    model = make_model()
    params = quantize_params(model, skip="table", donate=False)
    assert types(params) == types(model) and is_mx(params.layers[0].q_proj.weight)
    assert_same_bytes(quantize_model(params), quantize_model(model))


def test_sources_are_freed():
    model: Any = make_model()
    quantize_model(model)
    assert model.layers[0].q_proj.weight.is_deleted()
    assert model.layers[1].mlp.experts.w13.is_deleted()
    assert not model.layers[0].q_proj.bias.is_deleted()
    assert not model.lm_head.weight.is_deleted()

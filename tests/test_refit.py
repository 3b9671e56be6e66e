"""New weights into a model that is compiled already."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmx8
from jmx8 import dequantize, quantize, update_weights
from jmx8.checkpoint import load
from jmx8.kernels._prepared import PreparedWeights
from jmx8.nn._parameters import value

from .helpers import assert_bits_equal, run_on_four_devices
from .mx_checkpoints import DENSE, MOE, random_weights, write_folder


MOE = MOE | {"num_hidden_layers": 1, "mlp_only_layers": []}
DENSE = DENSE | {"num_hidden_layers": 1}


@pytest.fixture
def emulated(request, monkeypatch):
    pytest.importorskip("jax_tvm_ffi")
    from . import emulated_flashinfer

    emulated_flashinfer.use(monkeypatch)


def same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (x.dtype, x.shape, x.weak_type) == (y.dtype, y.shape, y.weak_type)
        assert x.committed == y.committed
        assert_bits_equal(x, y)


def run(model, tokens):
    return model(tokens)[0]


@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
def test_a_compiled_model_sees_the_weights_of_another_checkpoint(tmp_path, config):
    first, second = random_weights(config, 0), random_weights(config, 1)
    model = load(write_folder(tmp_path / "first", config, first))
    expected = load(write_folder(tmp_path / "second", config, second))
    tokens = jnp.arange(8, dtype=jnp.int32)[None]
    traced = []
    forward: Any = jax.jit(lambda model, tokens: traced.append(1) or run(model, tokens))
    before = forward(model, tokens)
    model = update_weights(model, second)
    same_bits(model, expected)
    after = forward(model, tokens)
    assert traced == [1] and forward._cache_size() == 1
    np.testing.assert_array_equal(after, forward(expected, tokens))
    assert np.any(np.asarray(before) != np.asarray(after))


def test_only_what_comes_is_replaced(tmp_path):
    tensors = random_weights(MOE)
    model = load(write_folder(tmp_path / "a", MOE, tensors))
    new = random_weights(MOE, 1)
    experts = "model.layers.0.mlp.experts"
    names = [f"{experts}.{e}.{p}.weight" for e, p in ((2, "up_proj"), (0, "down_proj"))]
    names += [f"{experts}.3.gate_proj.weight", "model.layers.0.input_layernorm.weight"]
    changed = {name: new[name] for name in names}
    model = update_weights(model, changed)
    expected = load(write_folder(tmp_path / "b", MOE, tensors | changed))
    same_bits(model, expected)


def test_paths_and_whole_stacks_are_names_too(tmp_path):
    model = load(write_folder(tmp_path, MOE, random_weights(MOE)))
    w13 = jax.random.normal(jax.random.key(0), (4, 96, 64), jnp.bfloat16)
    new = update_weights(
        model,
        {
            "layers/0/mlp/experts/w13": w13,
            "model.layers.0.mlp.experts.down_proj": jnp.ones((4, 64, 48)),
        },
    )
    experts: Any = getattr(new.layers[0].mlp, "experts", None)
    same_bits(experts.w13, quantize(w13))
    np.testing.assert_array_equal(dequantize(experts.w2), np.ones((4, 64, 48)))
    assert experts.w2.dtype == jnp.bfloat16  # what it stands for stays


@pytest.mark.parametrize("framework", ["equinox", "nnx"])
def test_kernel_layouts_are_derived_anew(emulated, tmp_path, framework):
    if framework == "nnx":
        pytest.importorskip("flax")
    tensors, new = random_weights(MOE), random_weights(MOE, 1)
    write_folder(tmp_path / "a", MOE, tensors)
    write_folder(tmp_path / "b", MOE, new)
    model = load(tmp_path / "a", activations="mxfp8", framework=framework)
    expected = load(tmp_path / "b", activations="mxfp8", framework=framework)
    assert any(
        isinstance(node, PreparedWeights)
        for node in jax.tree.leaves(
            model, is_leaf=lambda node: isinstance(node, PreparedWeights)
        )
    )
    # All but one expert, so that the rest of its stack has to be taken from the old.
    name = "model.layers.0.mlp.experts.2.up_proj.weight"
    partly = {key: x for key, x in new.items() if key != name}
    model = update_weights(model, partly)
    assert jax.tree.structure(model) == jax.tree.structure(expected)
    same_bits(update_weights(model, {name: new[name]}), expected)
    same_bits(
        value(jmx8.canonical(expected.layers[0].mlp).experts.w13),
        quantize(jnp.asarray(_w13(new))),
    )


def _w13(tensors):
    experts = "model.layers.0.mlp.experts"
    return np.stack(
        [
            np.concatenate(
                [
                    tensors[f"{experts}.{e}.gate_proj.weight"],
                    tensors[f"{experts}.{e}.up_proj.weight"],
                ]
            )
            for e in range(4)
        ]
    )


def test_any_pytree_and_transposed_kernels():
    normal = lambda seed: jax.random.normal(jax.random.key(seed), (96, 40))
    params = {"dense": {"kernel": normal(0), "bias": jnp.zeros(40)}}
    params = jmx8.quantize_params(params)
    forward: Any = jax.jit(lambda params, x: x @ params["dense"]["kernel"])
    x = jnp.ones((2, 96))
    forward(params, x)
    new = update_weights(params, {"dense/kernel": np.asarray(normal(1))})
    same_bits(new["dense"]["kernel"], quantize(normal(1), axis=-2))
    assert new["dense"]["bias"] is params["dense"]["bias"]
    assert params["dense"]["kernel"].elements.is_deleted()
    forward(new, x)
    assert forward._cache_size() == 1


@pytest.mark.parametrize("donate", [True, False])
def test_the_old_memory_is_freed_unless_it_is_wanted(donate):
    weight = quantize(jnp.ones((64, 64)))
    tree = {"a": weight, "b": quantize(jnp.ones((64, 64))), "tied": weight}
    new = update_weights(
        tree, {"a": np.zeros((64, 64)), "b": np.zeros((64, 64))}, donate=donate
    )
    assert tree["b"].elements.is_deleted() == donate
    # The other holder of the same memory keeps it.
    np.testing.assert_array_equal(dequantize(new["tied"]), np.ones((64, 64)))
    np.testing.assert_array_equal(dequantize(new["a"]), np.zeros((64, 64)))


def test_committed_and_uncommitted_arrays_stay_so():
    device = jax.devices()[0]
    x = jnp.ones((32, 64))
    for old in (quantize(x), jax.device_put(quantize(x), device)):
        for new_x in (x * 2, jax.device_put(x * 2, device), np.asarray(x * 2)):
            forward: Any = jax.jit(lambda w, x: x @ w.T)
            forward(old, x)
            new = update_weights({"w": old}, {"w": new_x}, donate=False)["w"]
            np.testing.assert_array_equal(dequantize(new), x * 2)
            assert new.scales.committed == old.scales.committed
            forward(new, x)
            assert forward._cache_size() == 1


def test_a_tied_head_may_come_with_its_original(tmp_path):
    model = load(write_folder(tmp_path, DENSE, random_weights(DENSE)))
    embedding = np.ones((70, 64), np.float32)
    names = ("lm_head.weight", "model.embed_tokens.weight")
    new = update_weights(model, dict.fromkeys(names, embedding), donate=False)
    assert_bits_equal(new.embed_tokens.weight, jnp.ones((70, 64), jnp.bfloat16))
    with pytest.raises(ValueError, match=r"lm_head\.weight: no parameter"):
        update_weights(model, {"lm_head.weight": embedding})


def test_what_does_not_fit_changes_nothing(tmp_path):
    model = load(write_folder(tmp_path, MOE, random_weights(MOE)))
    before = jax.tree.map(np.asarray, eqx.filter(model, eqx.is_array))
    q_proj = "model.layers.0.self_attn.q_proj.weight"
    good = {q_proj: np.ones((80, 64), np.float32)}
    experts = "model.layers.0.mlp.experts"
    for bad, message in (
        ({"model.layers.0.q_proj": np.ones(3)}, "no parameter is called so"),
        ({f"{experts}.0.up_proj.weight": np.ones((48, 65))}, r"must have shape \(48"),
        ({"model.norm.weight": np.full(64, np.nan)}, "has 64 NaN, 0 infinite"),
        (
            {
                f"{experts}.0.up_proj.weight": np.ones((48, 64)),
                f"{experts}.gate_up_proj": np.ones((4, 96, 64)),
            },
            "given twice",
        ),
        ({"layers/0/self_attn/q_proj/weight": np.ones((80, 64))}, "given twice"),
    ):
        with pytest.raises(ValueError, match=message):
            update_weights(model, good | bad)
    with pytest.raises(TypeError, match="must be a float array, got int64"):
        update_weights(model, good | {"model.norm.weight": np.ones(64, np.int64)})
    after = jax.tree.map(np.asarray, eqx.filter(model, eqx.is_array))
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_infinite_weights_can_be_kept():
    x = jnp.ones((32, 64)).at[3, 40].set(jnp.inf)
    new = update_weights(
        {"w": quantize(jnp.ones((32, 64)))}, {"w": x}, on_nonfinite="keep"
    )
    same_bits(new["w"], quantize(x))


def test_sharded_weights_keep_their_sharding():
    run_on_four_devices("sharded_refit.py")

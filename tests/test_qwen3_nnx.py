"""The NNX port of Qwen3 is the Equinox port in other containers."""

import dataclasses
import functools
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jmx8
from jmx8.checkpoint import open_folder
from jmx8.checkpoint._load import _to_framework
from jmx8.data import TINY_QWEN3_MOE
from jmx8.models import Qwen3, qwen3_nnx
from jmx8.nn import SparseMoE
from jmx8.nn._parameters import with_fields


FOLDERS = {
    "dense": Path(__file__).parent / "data" / "tiny-qwen3",
    "moe": TINY_QWEN3_MOE,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": "bfloat16"},
    "w8a16": {"activations": "bf16"},
    "w8a8": {"activations": "mxfp8"},
    "head_and_router": {"only": "re:_proj|experts|lm_head|gate/"},
}
LENGTHS = (5, 11, 8)
KINDS = pytest.mark.parametrize("kind", FOLDERS)


@functools.cache
def _pair(kind: str, options: str) -> tuple[Any, Any]:
    load = functools.partial(jmx8.load, FOLDERS[kind], **OPTIONS[options])
    return load(), load(framework="nnx")


@functools.cache
def _shallow_pair(kind: str, options: str) -> tuple[Any, Any]:
    """Returns the models with their last layer only, which compile faster."""
    equinox_model, model = _pair(kind, options)
    config = dataclasses.replace(model.config, num_hidden_layers=1)
    model = nnx.clone(model)
    model.layers, model.config = nnx.List([model.layers[-1]]), config
    layers = equinox_model.layers[-1:]
    return with_fields(equinox_model, layers=layers, config=config), model


def _tokens() -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).integers(0, 2048, (3, 12)), jnp.int32)


def _forward(model):
    """Returns the logits of prompts of different lengths, and those of decoding."""
    tokens, lengths = _tokens(), jnp.array(LENGTHS)
    cache = model.init_cache(3, 16)
    first, cache = model(tokens, cache, lengths=lengths)
    second, cache = model(tokens[:, :1], cache, last_only=True)
    return first, second, cache


def _by_path(model) -> tuple[list[str], list[Any], Any]:
    """Returns paths and arrays, sorted by path, and what makes a model of arrays."""
    leaves, structure = jax.tree.flatten_with_path(model)
    join = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    # The variable itself is a part of the path in NNX.
    paths = [join(path).replace("/value", "") for path, _ in leaves]
    order = np.argsort(paths)
    rebuild = lambda arrays: structure.unflatten(arrays[i] for i in np.argsort(order))
    return [paths[i] for i in order], [leaves[i][1] for i in order], rebuild


def _assert_same_bits(actual, expected):
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    assert len(actual) == len(expected) > 0
    for a, e in zip(actual, expected, strict=True):
        assert (a.shape, a.dtype) == (e.shape, e.dtype)
        assert np.asarray(a).tobytes() == np.asarray(e).tobytes()


@KINDS
@pytest.mark.parametrize("options", OPTIONS)
def test_logits_and_caches_equal_those_of_equinox(kind, options):
    equinox_model, model = _shallow_pair(kind, options)
    expected = jax.jit(_forward)(equinox_model)
    assert np.ptp(expected[0]) > 1
    _assert_same_bits(nnx.jit(_forward)(model), expected)


@KINDS
@pytest.mark.parametrize("options", ["bfloat16", "w8a16"])
def test_program_is_that_of_equinox(kind, options):
    texts = []
    paths, *_ = _by_path(_pair(kind, options)[0])
    for model in _pair(kind, options):
        own_paths, arrays, rebuild = _by_path(model)
        assert own_paths == paths
        run = jax.jit(lambda arrays, rebuild=rebuild: _forward(rebuild(arrays)))
        texts.append(run.lower(arrays).as_text())
    assert "dot_general" in texts[0]
    assert texts[0] == texts[1]


@KINDS
def test_parameters_are_those_of_equinox_in_the_same_places(kind):
    equinox_model, model = _pair(kind, "w8a16")
    is_mx = lambda x: isinstance(x, jmx8.MXArray)
    expected = jax.tree.leaves_with_path(jmx8.canonical(equinox_model), is_leaf=is_mx)
    state = nnx.to_flat_state(nnx.state(jmx8.canonical(model), nnx.Param))
    params = {"/".join(map(str, path)): param for path, param in state}
    join = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    assert set(params) == {join(path) for path, _ in expected}
    for path, array in expected:
        content = params[join(path)].get_value()
        assert is_mx(content) == is_mx(array)
        _assert_same_bits(content, array)


@KINDS
def test_reports_are_equal(kind):
    load = functools.partial(jmx8.load, FOLDERS[kind], return_report=True)
    (_, expected), (model, report) = load(), load(framework="nnx")
    assert report == expected and report.converted
    assert isinstance(model, qwen3_nnx.Qwen3)


@KINDS
def test_split_and_merge_lose_nothing(kind):
    _, model = _shallow_pair(kind, "w8a16")
    expected = jax.jit(_forward)(model)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    assert not jax.tree.leaves(rest)
    # As a server does: the graph is closed over, the state is an argument.
    run = jax.jit(lambda params: _forward(nnx.merge(graph, params, rest)))
    _assert_same_bits(run(params), expected)


@KINDS
def test_generation_and_perplexity_equal_those_of_equinox(kind):
    equinox_model, model = _shallow_pair(kind, "w8a16")
    prompts = [[1, 2, 3], [400, 5], [77]]
    draw = lambda model: jmx8.generate(
        model, prompts, max_new_tokens=9, temperature=1.0
    )
    assert draw(model) == draw(equinox_model)
    text = np.random.default_rng(1).integers(0, 2048, 64).tolist()
    measure = functools.partial(jmx8.perplexity, tokens=text, window=32, batch_size=2)
    assert measure(model) == measure(equinox_model)


@KINDS
def test_quantizing_in_memory_equals_quantizing_while_loading(kind):
    _, expected = _pair(kind, "w8a16")
    model = jmx8.load(FOLDERS[kind], dtype="bfloat16", framework="nnx")
    model = jmx8.quantize_params(model)
    _assert_same_bits(
        jmx8.canonical(nnx.state(model)), jmx8.canonical(nnx.state(expected))
    )


@KINDS
def test_saved_files_are_those_of_equinox(kind, tmp_path):
    equinox_model, model = _pair(kind, "w8a16")
    models = {"equinox": equinox_model, "nnx": model, "state": nnx.state(model)}
    contents = []
    for name, tree in models.items():
        jmx8.save(tree, tmp_path / name, source=FOLDERS[kind])
        files = sorted((tmp_path / name).iterdir())
        contents.append({file.name: file.read_bytes() for file in files})
    assert "model.safetensors" in contents[0]
    assert contents[0] == contents[1] == contents[2]
    loaded = jmx8.load(tmp_path / "nnx", activations="bf16", framework="nnx")
    _assert_same_bits(nnx.state(loaded), nnx.state(model))


def _new_weights(kind) -> dict[str, np.ndarray]:
    """Returns other weights for a shallow model, by their names in checkpoints."""
    sources = open_folder(FOLDERS[kind]).sources
    last = max(re.findall(r"layers\.(\d+)\.", " ".join(sources)), key=int)
    return {
        name.replace(f"layers.{last}.", "layers.0."): -source.file.read(name)
        for name, source in sources.items()
        if f"layers.{last}." in name or "layers" not in name
    }


@KINDS
def test_compiled_functions_see_new_weights(kind):
    new = _new_weights(kind)
    equinox_model, model = _shallow_pair(kind, "w8a16")
    expected = jmx8.update_weights(equinox_model, new, donate=False)
    model = nnx.clone(model)  # of its own memory, which is given away below
    traces = []

    def run(model):
        traces.append(1)
        return model(_tokens())[0]

    with_module = nnx.jit(run)
    graph, params = nnx.split(model)
    with_state = jax.jit(lambda params: run(nnx.merge(graph, params)))
    before = with_module(model)
    _assert_same_bits(with_state(params), before)
    assert len(traces) == 2

    _, model_params = nnx.split(jmx8.update_weights(model, new, donate=False))
    new_params = jmx8.update_weights(params, new)
    expected_params = nnx.state(qwen3_nnx.Qwen3(expected))
    for actual in (model_params, new_params):
        assert jax.tree.structure(actual) == jax.tree.structure(params)
        _assert_same_bits(actual, expected_params)
    after = with_state(new_params)
    assert np.any(np.asarray(after) != np.asarray(before))
    nnx.update(model, new_params)  # in place: whoever has the module sees it
    for actual in (model, nnx.merge(graph, model_params)):
        _assert_same_bits(with_module(actual), after)
    assert len(traces) == 2
    _assert_same_bits(jax.jit(run)(expected), after)


@KINDS
def test_activations_can_be_changed(kind):
    equinox_model, model = _shallow_pair(kind, "w8a16")
    changed = jmx8.nn.with_activations(model, "mxfp8")
    expected = jmx8.nn.with_activations(equinox_model, "mxfp8")
    run = jax.jit(lambda model: model(_tokens())[0])
    _assert_same_bits(run(changed), run(expected))
    linear = lambda model: model.layers[0].self_attn.q_proj
    assert (linear(changed).activations, linear(model).activations) == ("mxfp8", "bf16")
    x = jax.random.normal(jax.random.key(0), model.config.hidden_size)
    assert jnp.any(linear(changed)(x) != linear(model)(x))


@KINDS
def test_random_model_is_that_of_equinox(kind):
    config = _pair(kind, "bfloat16")[1].config
    small = {"vocab_size": 64, "num_hidden_layers": 1, "mlp_only_layers": ()}
    config = dataclasses.replace(config, **small, bos_token_id=None, eos_token_id=())
    make = lambda: qwen3_nnx.Qwen3.init(config, rngs=nnx.Rngs(params=3))
    expected = Qwen3(config, key=nnx.Rngs(params=3).params())
    paths, arrays, _ = _by_path(expected)
    own_paths, own_arrays, _ = _by_path(make())
    assert own_paths == paths
    _assert_same_bits(own_arrays, arrays)
    _, abstract, _ = _by_path(nnx.eval_shape(make))
    shapes = lambda arrays: [(x.shape, x.dtype) for x in arrays]
    assert shapes(abstract) == shapes(arrays)


def test_layers_take_any_leading_axes():
    equinox_model, model = _pair("moe", "bfloat16")
    x = jax.random.normal(jax.random.key(0), (2, 3, model.config.hidden_size))
    x = x.astype(jnp.bfloat16)
    linear = equinox_model.layers[0].self_attn.q_proj
    actual = model.layers[0].self_attn.q_proj(x)
    _assert_same_bits(actual, jax.vmap(jax.vmap(linear))(x))
    biased = eqx.nn.Linear(8, 4, key=jax.random.key(0))
    x = jnp.ones((5, 8))
    _assert_same_bits(qwen3_nnx.Linear(biased)(x), jax.vmap(biased)(x))
    tokens = _tokens()
    actual = model.embed_tokens(tokens)
    _assert_same_bits(actual, equinox_model.embed_tokens.weight[tokens])


def test_a_layer_without_counterpart_is_refused():
    moe = _pair("moe", "bfloat16")[0].layers[-1].mlp
    assert isinstance(moe, SparseMoE)
    moe = eqx.tree_at(
        lambda moe: moe.shared_expert,
        moe,
        eqx.nn.LayerNorm(4),
        is_leaf=lambda x: x is None,
    )
    with pytest.raises(TypeError, match="got a LayerNorm; there are those of Attent"):
        qwen3_nnx.SparseMoE(moe)


def test_unknown_framework_is_refused():
    with pytest.raises(ValueError, match=r"framework must be one of .*, got 'linen'"):
        _to_framework("linen")


def test_missing_flax_is_named_before_anything_is_read():
    code = (
        "import sys; sys.modules['flax'] = None; import jmx8\n"
        "try: jmx8.load('no such folder', framework='nnx')\n"
        "except ModuleNotFoundError as error: print(error)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install jmx8[flax]" in out.stdout, out.stderr

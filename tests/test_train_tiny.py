import json
import math
import os
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from benchmarks import train_tiny
from benchmarks.stdlib_text import Corpus, HELD_OUT, stdlib_corpus
from benchmarks.train_tiny import CONFIGS, MODELS, Settings
from jmx8.checkpoint import load
from jmx8.models import Qwen3, Qwen3Config
from jmx8.nn import SparseMoE


SMALL = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
SMALL_MOE = {
    "num_hidden_layers": 2,  # of which the first is dense
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
SETTINGS = Settings(steps=20, batch=4, window=32, evaluations=2)


def _small_config(kind):
    return CONFIGS[kind] | SMALL | (SMALL_MOE if kind == "moe" else {})


def _small_corpus():
    with open(os.__file__, encoding="utf-8") as file:
        text = file.read()
    return Corpus("3.x", [text[:20_000], text[20_000:30_000]], text[30_000:34_000])


@pytest.fixture(scope="module", params=list(MODELS))
def trained(request, tmp_path_factory):
    """The folder of a small model, and the model."""
    folder = tmp_path_factory.mktemp("trained") / MODELS[request.param]
    config = _small_config(request.param)
    model = train_tiny.make_checkpoint(folder, config, _small_corpus(), SETTINGS)
    return folder, model


def _float32(model):
    return jax.tree.map(lambda x: x.astype(jnp.float32), model)


@eqx.filter_jit
def _logits(model, tokens):
    return model(tokens)[0]


@pytest.fixture
def tokens():
    return np.random.default_rng(0).integers(0, SMALL["vocab_size"], (2, 24), np.int32)


def test_hugging_face_reads_the_same_model(trained, tokens):
    folder, model = trained
    # Returns a pair, which its annotation does not know.
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype="float32", output_loading_info=True
    )
    hf, report = loaded
    assert not any(report.values()), report
    with torch.no_grad():
        expected = hf.eval()(torch.tensor(tokens, dtype=torch.int64)).logits.numpy()
    logits = _logits(_float32(model), jnp.asarray(tokens))
    error = np.max(np.abs(np.asarray(logits) - expected))
    assert error <= 1e-4 * np.ptp(expected)


def test_jmx8_reads_the_same_model(trained):
    folder, model = trained
    loaded = load(folder, dtype="bfloat16")
    assert eqx.tree_equal(loaded, model)


def test_hugging_face_reads_the_tokenizer(trained):
    folder, _ = trained
    text = (folder / "heldout.txt").read_text("utf-8")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(text)["input_ids"]
    assert len(tokens) < len(text) / 1.2
    assert max(tokens) < SMALL["vocab_size"]
    assert tokenizer.decode(tokens) == text
    assert tokenizer.eos_token_id == 0


def test_training_lowers_the_heldout_loss(trained):
    folder, model = trained
    account = json.loads((folder / "training.json").read_text())
    first, last = account["losses"]
    assert last["heldout"] < first["heldout"] < math.log(SMALL["vocab_size"]) + 0.5
    assert account["lowest_heldout_loss"] == last["heldout"]
    assert account["heldout_loss"] == pytest.approx(last["heldout"], rel=0.01)
    assert account["parameters"] == sum(x.size for x in jax.tree.leaves(model))
    assert account["settings"]["steps"] == last["step"] == 20


def test_watching_the_routers_does_not_change_the_model(trained, tokens):
    _, model = trained
    model, tokens = _float32(model), jnp.asarray(tokens)
    expected = _logits(model, tokens)
    logits, loads, balances = eqx.filter_jit(train_tiny.forward)(model, tokens)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    sparse = [layer for layer in model.layers if isinstance(layer.mlp, SparseMoE)]
    assert len(loads) == len(balances) == len(sparse)
    for load_of_experts in loads:
        assert load_of_experts.shape == (SMALL_MOE["num_experts"],)
        assert float(jnp.sum(load_of_experts)) == pytest.approx(1.0)


def test_balance_counts_the_tokens_of_each_expert(tokens):
    @jax.jit
    @jax.value_and_grad
    def balance(model):
        _, _, (value,) = train_tiny.forward(model, jnp.asarray(tokens))
        return value

    config = Qwen3Config.from_hf(_small_config("moe"))
    model = Qwen3(config, dtype=jnp.float32, key=jax.random.key(0))
    gate = lambda model: model.layers[1].mlp.gate.weight
    # A router without an opinion is as even as can be.
    even, _ = balance(eqx.tree_at(gate, model, replace_fn=jnp.zeros_like))
    assert float(even) == pytest.approx(1.0)
    # With a strong one, the experts that are chosen are the probable ones.
    sharp = eqx.tree_at(gate, model, replace_fn=lambda weight: 100 * weight)
    value, gradient = balance(sharp)
    assert float(value) > 1.05
    assert float(jnp.max(jnp.abs(gate(gradient)))) > 0


def test_diverging_is_an_error(monkeypatch):
    config = Qwen3Config.from_hf(_small_config("dense"))
    step = lambda state, *_: (state, jnp.float32(math.nan))
    monkeypatch.setattr(train_tiny, "_make_step", lambda *_: step)
    monkeypatch.setattr(train_tiny, "evaluate", lambda *_: (math.nan, []))
    tokens = np.arange(64, dtype=np.int32)
    with pytest.raises(FloatingPointError, match="never finite"):
        train_tiny.train(config, tokens, tokens, Settings(steps=1, batch=1, window=16))


@pytest.mark.parametrize("kind", list(MODELS))
def test_models_are_small_and_made_of_whole_blocks(kind):
    config = Qwen3Config.from_hf(CONFIGS[kind])
    model = eqx.filter_eval_shape(Qwen3, config, key=jax.random.key(0))
    sizes = [leaf.size for leaf in jax.tree.leaves(model)]
    assert 2e6 < sum(sizes) < 3.5e6
    matrices = [leaf for leaf in jax.tree.leaves(model) if leaf.ndim > 1]
    assert all(leaf.shape[-1] % 32 == 0 for leaf in matrices)
    assert transformers.AutoConfig.for_model(**CONFIGS[kind]).head_dim > 0


def test_standard_library_is_read_without_the_heldout_modules():
    corpus = stdlib_corpus()
    assert 5e6 < sum(map(len, corpus.train)) < 15e6
    assert 64e3 < len(corpus.heldout) < 128e3
    assert len(HELD_OUT) == 5
    for name in ("def heappush(", "class TopologicalSorter", "class NormalDist"):
        assert name in corpus.heldout
        assert not any(name in text for text in corpus.train)
    assert any("class ThreadPoolExecutor" in text for text in corpus.train)
    assert any('The "with" statement is used to wrap' in t for t in corpus.train)
    assert not any("class SuperTestCase" in text for text in corpus.train)


def test_command_line_passes_its_options_on(tmp_path, monkeypatch):
    corpus = {"python": "3.x", "train": ["a"], "heldout": "b"}
    file = tmp_path / "corpus.json"
    file.write_text(json.dumps(corpus))
    calls = []
    monkeypatch.setattr(train_tiny, "make_checkpoint", lambda *args: calls.append(args))
    options = "--steps 7 --learning-rate 0.5 --seed 3".split()
    train_tiny.main(["--corpus", str(file), "--out", str(tmp_path), *options])
    settings = Settings(steps=7, learning_rate=0.5, seed=3)
    assert calls == [
        (tmp_path / MODELS[kind], CONFIGS[kind], Corpus(**corpus), settings)
        for kind in ("dense", "moe")
    ]

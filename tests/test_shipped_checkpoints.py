"""The checkpoints in the repository are what `benchmarks/train_tiny.py` made."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import torch
import transformers

from benchmarks import stdlib_text, train_tiny
from jmx8.checkpoint import load
from jmx8.data import HELDOUT_TEXT, TINY_QWEN3_MOE


DENSE = Path(__file__).parent / "data" / "tiny-qwen3"
FOLDERS = {"dense": DENSE, "moe": TINY_QWEN3_MOE}


@pytest.fixture(scope="module", params=list(FOLDERS))
def kind(request):
    return request.param


def _heldout_windows(folder, window):
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = (folder / "heldout.txt").read_text("utf-8")
    tokens = stdlib_text.encode(tokenizer, [text])
    starts = np.arange(0, len(tokens) - window, window)
    return tokens[starts[:, None] + np.arange(window + 1)]


def test_package_data_is_small():
    files = [file for file in TINY_QWEN3_MOE.parent.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 8e6
    assert HELDOUT_TEXT.is_file()


def test_config_is_the_one_of_the_program(kind):
    folder = FOLDERS[kind]
    assert json.loads((folder / "config.json").read_text()) == train_tiny.CONFIGS[kind]
    account = json.loads((folder / "training.json").read_text())
    assert account["losses"][-1]["step"] == account["settings"]["steps"] >= 1000


def test_heldout_loss_is_the_one_measured_in_training(kind):
    folder = FOLDERS[kind]
    account = json.loads((folder / "training.json").read_text())
    windows = _heldout_windows(folder, account["settings"]["window"])
    model = load(folder, dtype="float32")
    # A few windows at a time: all logits at once would take a gigabyte.
    losses = [
        float(train_tiny.evaluate(model, jnp.asarray(part))[0]) * len(part)
        for part in np.split(windows, range(8, len(windows), 8))
    ]
    loss = sum(losses) / len(windows)
    # The GPU that trained it multiplied float32 in TF32 in part.
    assert loss == pytest.approx(account["heldout_loss"], abs=5e-3)
    assert loss < 3.2  # nats per token; ln(2048) = 7.6 without training


@pytest.mark.parametrize("framework", ["equinox", "nnx"])
def test_hugging_face_agrees_on_the_heldout_text(kind, framework):
    folder = FOLDERS[kind]
    tokens = _heldout_windows(folder, 128)[:2]
    hf: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    with torch.no_grad():
        expected = hf.eval()(torch.tensor(tokens, dtype=torch.int64)).logits.numpy()
    model = load(folder, dtype="float32", framework=framework)
    logits = jax.jit(lambda m, t: m(t)[0])(model, jnp.asarray(tokens))
    error = np.max(np.abs(np.asarray(logits) - expected))
    assert error <= 1e-4 * np.ptp(expected)


def test_every_expert_is_used():
    account = json.loads((TINY_QWEN3_MOE / "training.json").read_text())
    assert len(account["expert_loads"]) == 4
    loads = np.array(account["expert_loads"])
    assert loads.shape == (4, 16)
    assert loads.min() > 0.005
    assert loads.max() < 0.25

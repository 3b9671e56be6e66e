"""The trained checkpoints in MXFP8 against themselves in BF16."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer

import jmx8
from jmx8._types import Activations
from jmx8.data import TINY_QWEN3_MOE
from jmx8.nn import with_activations


FOLDERS = {
    "dense": Path(__file__).parent / "data" / "tiny-qwen3",
    "moe": TINY_QWEN3_MOE,
}
# Largest relative change of held-out perplexity. Measured: see README.md.
LIMITS: dict[Activations, float] = {"bf16": 0.005, "mxfp8": 0.01}


class Checkpoint:
    def __init__(self, folder):
        self.baseline = jmx8.load(folder, dtype="bfloat16")
        self.converted = jmx8.load(folder)
        text = (folder / "heldout.txt").read_text()
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokens = tokenizer.encode(text).ids
        # Places all over the text; the window leaves room for the continuation.
        starts = np.linspace(0, len(self.tokens) - 200, 16).astype(int)
        self.prompts = [self.tokens[s : s + 96] for s in starts]


@pytest.fixture(scope="module", params=FOLDERS)
def checkpoint(request):
    return Checkpoint(FOLDERS[request.param])


def test_perplexity_on_held_out_text(checkpoint):
    reference = jmx8.perplexity(checkpoint.baseline, checkpoint.tokens)
    for activations, limit in LIMITS.items():
        model = with_activations(checkpoint.converted, activations)
        change = jmx8.perplexity(model, checkpoint.tokens) / reference - 1
        print(f"{activations}: {reference:.4f} {change:+.3%}")
        assert abs(change) <= limit


@pytest.mark.parametrize("activations", LIMITS)
def test_greedy_continuations_agree_for_most_tokens(checkpoint, activations):
    """Each model is given the reference's text, so that one change counts once."""
    texts = jmx8.generate(checkpoint.baseline, checkpoint.prompts, max_new_tokens=32)
    whole = jnp.array([p + t for p, t in zip(checkpoint.prompts, texts, strict=True)])
    model = with_activations(checkpoint.converted, activations)
    logits, _ = jax.jit(lambda m, t: m(t))(model, whole)
    chosen = jnp.argmax(logits[:, 95:-1], axis=-1)
    assert jnp.mean(chosen == whole[:, 96:]) >= 0.9


@pytest.mark.parametrize("activations", LIMITS)
def test_at_the_first_difference_each_choice_is_likely_to_the_other(
    checkpoint, activations
):
    """vLLM's logprob test: where two continuations part, each model's token is among
    the other's 8 likeliest."""
    model = with_activations(checkpoint.converted, activations)
    models = (checkpoint.baseline, model)
    texts = [jmx8.generate(m, checkpoint.prompts, max_new_tokens=32) for m in models]
    forward = jax.jit(lambda m, t: m(t)[0])
    for row, prompt in enumerate(checkpoint.prompts):
        ours, theirs = texts[0][row], texts[1][row]
        step = next((i for i in range(32) if ours[i] != theirs[i]), None)
        if step is None:
            continue
        # Padded to one length, so that there is one compilation.
        context = prompt + ours[:step] + [0] * (32 - step)
        for m, token in ((models[0], theirs[step]), (models[1], ours[step])):
            logits = forward(m, jnp.array([context]))[0, len(prompt) + step - 1]
            assert token in jax.lax.top_k(logits, 8)[1]


def test_weights_keep_31_db(checkpoint, request):
    folder = FOLDERS[request.node.callspec.params["checkpoint"]]
    _, report = jmx8.load(folder, return_report=True)
    assert len(report.converted) >= 28
    for row in report.converted:
        assert row.statistics is not None and row.statistics.sqnr_db >= 31, row.path
    assert all(row.statistics is None for row in report.kept)
    assert {row.path.rpartition("/")[0] for row in report.kept} >= {"embed_tokens"}

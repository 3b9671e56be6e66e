import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jmx8.generation import generate, sample
from jmx8.generation._generate import _advance, _bucket, _row_keys
from jmx8.generation._sampling import filter_logits
from jmx8.models import Qwen3
from tests.hf import DENSE, from_hf, MOE, random_hf_model


PROMPTS = [[5, 17, 80, 2], [33], [9, 9, 1, 64, 20, 7, 11]]


@functools.cache
def _pair(kind: str):
    fields = {"dense": DENSE, "moe": MOE, "small": DENSE | {"num_hidden_layers": 1}}
    hf_model = random_hf_model(seed=1, **fields[kind])
    return hf_model, from_hf(hf_model)


def _hf_greedy(hf_model, prompt: list[int], count: int) -> list[int]:
    tokens = torch.tensor([prompt])
    out = hf_model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=count,
        do_sample=False,
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_greedy_equals_hugging_face(kind):
    hf_model, model = _pair(kind)
    expected = [_hf_greedy(hf_model, prompt, 24) for prompt in PROMPTS]
    assert generate(model, PROMPTS, max_new_tokens=24) == expected
    assert len({tuple(row) for row in expected}) == 3


def test_batch_equals_single_prompts():
    _, model = _pair("small")
    batch = generate(model, PROMPTS, max_new_tokens=20)
    for prompt, row in zip(PROMPTS, batch, strict=True):
        assert generate(model, [prompt], max_new_tokens=20) == [row]


def test_stop_tokens_end_a_row_and_are_not_returned():
    _, model = _pair("small")
    full = generate(model, PROMPTS, max_new_tokens=12)
    stop = full[0][4]
    cut = lambda row: row[: row.index(stop)] if stop in row else row
    expected = [cut(row) for row in full]
    seen = []
    rows = generate(
        model,
        PROMPTS,
        max_new_tokens=12,
        stop_tokens=[stop],
        callback=lambda row, token: seen.append((row, token)),
    )
    assert rows == expected
    assert len(expected[0]) <= 4 and max(map(len, expected)) == 12
    # Nothing arrives for a row after its end.
    assert [[t for r, t in seen if r == row] for row in range(3)] == expected


def test_generation_ends_when_all_rows_have_stopped(monkeypatch):
    _, model = _pair("small")
    first_tokens = [row[0] for row in generate(model, PROMPTS, max_new_tokens=12)]
    steps = []

    def counting(*args, **kwargs):
        steps.append(kwargs["step"])
        return _advance(*args, **kwargs)

    monkeypatch.setattr("jmx8.generation._generate._advance", counting)
    rows = generate(model, PROMPTS, max_new_tokens=12, stop_tokens=first_tokens)
    assert rows == [[], [], []]
    assert steps == [0, 1]


def test_callback_gets_tokens_step_by_step():
    _, model = _pair("small")
    seen = []
    rows = generate(
        model,
        PROMPTS,
        max_new_tokens=10,
        callback=lambda row, token: seen.append((row, token)),
    )
    assert seen == [(row, rows[row][step]) for step in range(10) for row in range(3)]


def test_exception_of_the_callback_ends_the_generation():
    _, model = _pair("small")

    def callback(row, token):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, PROMPTS, max_new_tokens=10, callback=callback)


def test_seeds():
    _, model = _pair("small")
    draw = functools.partial(generate, model, max_new_tokens=10, temperature=1.0)
    rows = draw(PROMPTS, seed=3)
    assert rows == draw(PROMPTS, seed=3)
    assert rows != draw(PROMPTS, seed=4)
    # A row does not depend on the others, and two equal prompts draw differently.
    assert draw([PROMPTS[0], [50], PROMPTS[2]], seed=3)[2] == rows[2]
    same = draw([PROMPTS[2]] * 3, seed=3)
    assert same[2] == rows[2] and same[1] != same[2]


@pytest.mark.parametrize("options", [{"temperature": 1e-30}, {"top_k": 1}])
def test_narrow_sampling_is_greedy(options):
    _, model = _pair("small")
    options = {"temperature": 2.0} | options
    expected = generate(model, PROMPTS, max_new_tokens=10)
    assert generate(model, PROMPTS, max_new_tokens=10, **options) == expected


def test_lengths_and_temperatures_do_not_compile_again(monkeypatch):
    shapes, call = [], Qwen3.__call__

    def tracing(self, tokens, *args, **kwargs):
        shapes.append(tokens.shape)
        return call(self, tokens, *args, **kwargs)

    monkeypatch.setattr(Qwen3, "__call__", tracing)
    fields = DENSE | {"num_hidden_layers": 1, "vocab_size": 31}
    model = from_hf(random_hf_model(**fields))
    for length in (1, 9, 16):
        prompts = [[1] * length, [2]]
        generate(model, prompts, max_new_tokens=32 - length, stop_tokens=[3])
    assert shapes == [(2, 16), (2, 1)]
    for temperature, top_p in ((0.5, 0.9), (1.5, 0.1)):
        generate(model, prompts, max_new_tokens=4, temperature=temperature, top_p=top_p)
    assert shapes == [(2, 16), (2, 1)] * 2


def test_cache_is_donated():
    _, model = _pair("small")
    cache = model.init_cache(1, 16)
    leaves, treedef = jax.tree.flatten(model)
    _, new = _advance(
        leaves,
        cache,
        jnp.array([[1]]),
        None,
        treedef=treedef,
        row_keys=_row_keys(0, 1),
        step=0,
        temperature=None,
        top_k=None,
        top_p=None,
    )
    assert all(x.is_deleted() for x in cache.keys + cache.values)
    assert not any(x.is_deleted() for x in new.keys + new.values)


def test_all_positions_can_be_used():
    hf_model, model = _pair("small")
    assert model.config.max_length == 128
    prompt = np.random.default_rng(0).integers(0, 97, 120).tolist()
    assert generate(model, [prompt], max_new_tokens=8) == [
        _hf_greedy(hf_model, prompt, 8)
    ]
    with pytest.raises(ValueError, match=r"128 positions, got 120 \+ 9"):
        generate(model, [prompt], max_new_tokens=9)


def test_buckets_are_few():
    buckets = [_bucket(length) for length in range(1, 2049)]
    assert all(b >= length for length, b in enumerate(buckets, start=1))
    assert buckets == sorted(buckets)
    assert set(buckets) == {16, 32, 64, 128, *range(256, 2049, 256)}


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        ([], {}, "at least one prompt"),
        ([[1], []], {}, r"prompts\[1\] without any"),
        ([[1, 97]], {}, r"tokens must be in \[0, 97\), got 97 in prompts\[0\]"),
        ([[1], [-1]], {}, r"got -1 in prompts\[1\]"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ([[1]], {"temperature": -0.1}, "temperature must be .* got -0.1"),
        ([[1]], {"temperature": float("nan")}, "temperature must be .* got nan"),
        ([[1]], {"temperature": float("inf")}, "temperature must be .* got inf"),
        ([[1]], {"top_k": 0}, "top_k must be at least 1, got 0"),
        ([[1]], {"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ([[1]], {"top_p": 1.01}, r"top_p must be in \(0, 1\], got 1.01"),
    ],
)
def test_bad_arguments_are_refused(prompts, options, message):
    _, model = _pair("small")
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, **({"max_new_tokens": 2} | options))


def _nucleus(logits: np.ndarray, top_k: int | None, top_p: float | None) -> dict:
    """Returns the probability of each token that may be drawn, one token at a time."""
    probability = np.exp(logits.astype(np.float64) - logits.max())
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    order = order[:top_k]
    total = sum(probability[token] for token in order)
    kept, reached = [], 0.0
    for token in order:
        if top_p is not None and reached >= top_p:
            break
        kept.append(token)
        reached += probability[token] / total
    total = sum(probability[token] for token in kept)
    return {token: probability[token] / total for token in kept}


CUTS = [(None, None), (5, None), (1000, None), (None, 0.7), (None, 0.05), (20, 0.52)]


@pytest.mark.parametrize("top_k, top_p", CUTS)
def test_filter_keeps_what_the_definition_says(top_k, top_p):
    logits = np.random.default_rng(0).normal(0, 2, (16, 50)).astype(np.float32)
    logits[0, :10] = 4.0  # equally likely
    logits[1] = 0.0
    logits[2, 7] = -np.inf
    kept, ids = filter_logits(jnp.asarray(logits), top_k=top_k, top_p=top_p)
    for row in range(16):
        expected = _nucleus(logits[row], top_k, top_p)
        possible = np.isfinite(np.asarray(kept[row]))
        expected = {t: p for t, p in expected.items() if p > 0}
        assert np.asarray(ids[row])[possible].tolist() == list(expected)
        probability = jax.nn.softmax(kept[row])[possible]
        np.testing.assert_allclose(probability, list(expected.values()), rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 3.0])
@pytest.mark.parametrize("top_k, top_p", [(None, None), (4, None), (None, 0.8)])
def test_frequencies_are_the_probabilities(temperature, top_k, top_p):
    count = 20_000
    logits = np.random.default_rng(1).normal(0, 1, 10).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), count)
    rows = jnp.broadcast_to(jnp.asarray(logits), (count, 10))
    tokens = sample(rows, keys, temperature=temperature, top_k=top_k, top_p=top_p)
    expected = np.zeros(10)
    for token, p in _nucleus(logits / np.float32(temperature), top_k, top_p).items():
        expected[token] = p
    frequency = np.bincount(np.asarray(tokens), minlength=10) / count
    assert np.all(frequency[expected == 0] == 0)
    deviation = np.sqrt(expected * (1 - expected) / count)
    assert np.all(np.abs(frequency - expected) <= 4.5 * deviation)


def test_no_temperature_takes_the_likeliest():
    logits = jnp.array([[0.0, 3.0, 3.0], [5.0, -1.0, 2.0]])
    keys = jax.random.split(jax.random.key(0), 2)
    assert sample(logits, keys).tolist() == [1, 0]


def test_extreme_temperatures_stay_finite():
    logits = jnp.array([[-1e4, 1e4, 9.9e3]] * 64)
    keys = jax.random.split(jax.random.key(0), 64)
    assert set(sample(logits, keys, temperature=1e-38).tolist()) == {1}
    assert set(sample(logits, keys, temperature=1e30).tolist()) == {0, 1, 2}

"""Generates texts token by token, for a batch of prompts at once."""

import functools
import math
import operator
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from ..models import LanguageModel
from ..nn._attention import KVCache
from ._sampling import sample


_MIN_BUCKET = 16
_MAX_DOUBLED_BUCKET = 256


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop_tokens: Collection[int] = (),
    callback: Callable[[int, int], Any] | None = None,
) -> list[list[int]]:
    """Continues each prompt by up to `max_new_tokens` tokens.

    One jitted computation reads the prompts, a second one, run once per token, extends
    all rows. Lengths are rounded up to a few sizes, so that other prompts rarely
    compile again; another batch size, `top_k`, or model does.

    Args:
        model: The model. Nothing is applied to the prompts: no chat template, and no
            token that begins a text.
        prompts: Token ids of each prompt; lengths may differ.
        max_new_tokens: Most tokens to add to a prompt, at least 1.
        temperature: 0 always takes the likeliest token. Otherwise tokens are drawn from
            `softmax(logits / temperature)`.
        top_k: Draws among this many likeliest tokens only. None for all.
        top_p: Draws among the fewest likeliest tokens that reach this probability
            together. None for all.
        seed: Seeds the draws. What a row draws depends on the seed and the row's
            index, not on the other rows.
        stop_tokens: A row ends when it produces one of these, `config.eos_token_id` for
            example. The token itself is not part of the result.
        callback: Called with `(row, token)` for each token of the result as soon as it
            is known: all rows' first tokens, then all second ones. An exception that it
            raises ends the generation.

    Returns:
        The new tokens of each row, without the prompt.

    Raises:
        ValueError: If there is no prompt, a prompt is empty or has a token outside the
            vocabulary, the longest prompt with its continuation would exceed
            `config.max_length`, or an option is out of range.
    """
    prompts = [[operator.index(token) for token in prompt] for prompt in prompts]
    _check_prompts(model, prompts, max_new_tokens)
    _check_sampling(temperature, top_k, top_p)
    longest = max(map(len, prompts))
    tokens, lengths = _pad(prompts, _bucket(longest))
    cache = model.init_cache(len(prompts), _bucket(longest + max_new_tokens))
    leaves, treedef = jax.tree.flatten(model)
    advance = functools.partial(
        _advance,
        leaves,
        treedef=treedef,
        row_keys=_row_keys(seed, len(prompts)),
        temperature=None if temperature == 0 else jnp.float32(temperature),
        top_k=top_k,
        top_p=None if top_p in (None, 1) else jnp.float32(top_p),
    )
    texts = _Texts(len(prompts), stop_tokens, callback)
    tokens, cache = advance(cache, tokens, lengths, step=0)
    for step in range(1, max_new_tokens):
        # Dispatched before the host waits for the previous tokens, so that the device
        # never waits for the host. Costs one step too many when all rows have stopped.
        following, cache = advance(cache, tokens, None, step=step)
        if not texts.add(tokens):
            return texts.rows
        tokens = following
    texts.add(tokens)
    return texts.rows


# Flat leaves, because flattening a model's modules on every step takes milliseconds.
@functools.partial(
    jax.jit, static_argnames=("treedef", "top_k"), donate_argnames=("cache",)
)
def _advance(
    leaves: list[Array],
    cache: KVCache,
    tokens: Int[Array, "b t"],
    lengths: Int[Array, "b"] | None,
    *,
    treedef: Any,
    row_keys: Key[Array, "b"],
    step: Int[Array, ""],
    temperature: Float[Array, ""] | None,
    top_k: int | None,
    top_p: Float[Array, ""] | None,
) -> tuple[Int[Array, "b 1"], KVCache]:
    """Reads `tokens`, and returns the token that follows in each row."""
    model = jax.tree.unflatten(treedef, leaves)
    logits, cache = model(tokens, cache, lengths=lengths, last_only=True)
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(row_keys, step)
    following = sample(logits, keys, temperature=temperature, top_k=top_k, top_p=top_p)
    return following[:, None], cache


class _Texts:
    """The rows of the result while they grow."""

    def __init__(self, num_rows, stop_tokens, callback):
        self.rows: list[list[int]] = [[] for _ in range(num_rows)]
        self._running = [True] * num_rows
        self._stop_tokens = frozenset(stop_tokens)
        self._callback = callback

    def add(self, tokens: Int[Array, "b 1"]) -> bool:
        """Adds a token to each row that still runs; returns whether any goes on."""
        for row, token in enumerate(np.asarray(tokens)[:, 0].tolist()):
            self._running[row] &= token not in self._stop_tokens
            if self._running[row]:
                self.rows[row].append(token)
                if self._callback is not None:
                    self._callback(row, token)
        return any(self._running)


def _bucket(length: int) -> int:
    """Returns a size of at least `length` out of 16, 32, ..., 256, 512, 768, ..."""
    if length > _MAX_DOUBLED_BUCKET:
        return -(-length // _MAX_DOUBLED_BUCKET) * _MAX_DOUBLED_BUCKET
    return max(_MIN_BUCKET, 1 << (length - 1).bit_length())


def _pad(
    prompts: list[list[int]], size: int
) -> tuple[Int[Array, "b t"], Int[Array, "b"]]:
    padded = np.zeros((len(prompts), size), np.int32)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = prompt
    return jnp.asarray(padded), jnp.asarray([len(p) for p in prompts], jnp.int32)


def _row_keys(seed: int, num_rows: int) -> Key[Array, "b"]:
    fold_in = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    return fold_in(jax.random.key(seed), jnp.arange(num_rows))


def _check_prompts(
    model: LanguageModel, prompts: list[list[int]], max_new_tokens: int
) -> None:
    if not prompts:
        raise ValueError("generate: there must be at least one prompt, got none.")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(
                f"generate: prompts must have at least one token, got prompts[{row}] "
                "without any. Begin it with `config.bos_token_id`, for example."
            )
        for token in prompt:
            if not 0 <= token < model.config.vocab_size:
                raise ValueError(
                    f"generate: tokens must be in [0, {model.config.vocab_size}), got "
                    f"{token} in prompts[{row}]. Does the tokenizer fit the model?"
                )
    if max_new_tokens < 1:
        raise ValueError(
            f"generate: max_new_tokens must be at least 1, got {max_new_tokens}."
        )
    longest, limit = max(map(len, prompts)), model.config.max_length
    if longest + max_new_tokens > limit:
        raise ValueError(
            f"generate: prompt and continuation must not exceed the model's {limit} "
            f"positions, got {longest} + {max_new_tokens}. Shorten the prompt or lower "
            "max_new_tokens."
        )


def _check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not 0 <= temperature < math.inf:
        raise ValueError(
            f"generate: temperature must be finite and at least 0, got {temperature}."
        )
    if top_k is not None and top_k < 1:
        raise ValueError(
            f"generate: top_k must be at least 1, got {top_k}. Pass None for all."
        )
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(
            f"generate: top_p must be in (0, 1], got {top_p}. Pass None for all."
        )

"""Two models of Flax's own examples, unmodified, trained a little and run in MXFP8.

The examples come with Flax's source distribution:

    pip download --no-deps --no-binary flax flax==0.12.12 && tar xzf flax-0.12.12.tar.gz
    python -m benchmarks.bench_flax_models flax-0.12.12/examples

trains the language model of `lm1b` (Linen) and Gemma of `gemma` (NNX), small ones, on
Python's standard library, and prints the held-out perplexity of each with bfloat16 and
with MXFP8 weights, and the report of what was converted.
"""

import argparse
import functools
import importlib
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
from flax import nnx

import jmx8
from benchmarks.stdlib_text import encode, stdlib_corpus


TOKENIZER = Path(__file__).parents[1] / "tests/data/tiny-qwen3/tokenizer.json"
VOCAB, WINDOW, BATCH = 2048, 128, 16


class Subject(NamedTuple):
    """A model as a function of its parameters.

    Attributes:
        name: Where it is from.
        params: Linen variables or an `nnx.State`, in float32.
        logits: Of the parameters and tokens `[b, t]`, in float32.
        logits_bf16: The same with bfloat16 activations.
        quantize: Converts bfloat16 parameters; returns them and the report.
    """

    name: str
    params: Any
    logits: Callable[[Any, jax.Array], jax.Array]
    logits_bf16: Callable[[Any, jax.Array], jax.Array]
    quantize: Callable[[Any], tuple[Any, jmx8.Report]]


def linen_lm1b(examples: Path) -> Subject:
    """Returns `TransformerLM` of `lm1b/models.py`."""
    models = _import(examples / "lm1b", "models")
    config = models.TransformerConfig(
        vocab_size=VOCAB,
        output_vocab_size=VOCAB,
        emb_dim=128,
        num_heads=4,
        num_layers=3,
        qkv_dim=128,
        mlp_dim=512,
        max_len=WINDOW,
        deterministic=True,
    )
    model = models.TransformerLM(config)
    half = models.TransformerLM(config.replace(dtype=jnp.bfloat16))
    tokens = jnp.ones((1, WINDOW), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    quantize = functools.partial(jmx8.quantize_params, return_report=True, donate=False)
    apply = lambda model, params, tokens: model.apply(
        {"params": params}, tokens
    ).astype(jnp.float32)
    # The model takes what is to be predicted, and shifts it itself.
    return Subject(
        "Flax examples/lm1b, TransformerLM (Linen)",
        params,
        functools.partial(apply, model),
        functools.partial(apply, half),
        quantize,
    )


def nnx_gemma(examples: Path) -> Subject:
    """Returns `Transformer` of `gemma/transformer.py`."""
    transformer = _import(examples / "gemma", "transformer")
    configs = _import(examples / "gemma", "transformer_cfg")
    make_config = functools.partial(
        configs.TransformerConfig,
        num_layers=3,
        num_embed=VOCAB,
        embed_dim=128,
        hidden_dim=384,
        num_heads=4,
        head_dim=32,
        num_kv_heads=2,
        final_logit_softcap=None,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        attention_types=(configs.AttentionType.GLOBAL,) * 3,
    )
    make = lambda dtype: transformer.Transformer(
        make_config(dtype=dtype, weight_dtype=dtype), rngs=nnx.Rngs(0)
    )
    graph, params = nnx.split(make(jnp.float32))
    half, _ = nnx.split(make(jnp.bfloat16))

    def logits(graph, params, tokens):
        mask = jnp.ones(tokens.shape, jnp.bool_)
        positions = transformer.build_positions_from_mask(mask)
        causal = transformer.make_causal_attn_mask(mask)
        model = nnx.merge(graph, params)
        # It predicts what comes next; the first token stands for what came before.
        shifted = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)))
        return model(shifted, positions, None, causal)[0].astype(jnp.float32)

    def quantize(params):
        model = nnx.merge(half, params)
        q, report = jmx8.quantize_params(model, return_report=True, donate=False)
        return nnx.state(q), report

    return Subject(
        "Flax examples/gemma, Transformer (NNX)",
        params,
        functools.partial(logits, graph),
        functools.partial(logits, half),
        quantize,
    )


def _import(folder: Path, name: str) -> Any:
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


def train(subject: Subject, stream: np.ndarray, steps: int) -> Any:
    """Returns parameters after a few steps of AdamW on random windows."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, steps // 10, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))
    tokens = jnp.asarray(stream)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, index):
        params, optimizer_state = state
        key = jax.random.fold_in(jax.random.key(1), index)
        starts = jax.random.randint(key, (BATCH, 1), 0, len(stream) - WINDOW)
        windows = tokens[starts + jnp.arange(WINDOW)]
        loss, gradient = jax.value_and_grad(_loss)(params, subject.logits, windows)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, params)
        return (optax.apply_updates(params, updates), optimizer_state), loss

    params = jax.tree.map(jnp.copy, subject.params)
    state, start = (params, optimizer.init(params)), time.monotonic()
    for index in range(steps):
        state, loss = step(state, index)
        if index % 50 == 49:
            seconds = time.monotonic() - start
            print(f"  step {index + 1}: loss {loss:.3f}, {seconds:.0f} s", flush=True)
    return state[0]


def _loss(params: Any, logits: Callable, windows: jax.Array) -> jax.Array:
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits(params, windows), windows
    )
    return jnp.mean(losses[:, 1:])  # the first token has nothing before it


def perplexity(params: Any, logits: Callable, heldout: np.ndarray) -> float:
    """Returns the perplexity over whole windows of the held-out tokens."""
    count = len(heldout) // WINDOW
    windows = jnp.asarray(heldout[: count * WINDOW].reshape(count, WINDOW))
    loss = jax.jit(lambda params, part: _loss(params, logits, part))
    losses = [float(loss(params, windows[i : i + 30])) for i in range(0, count, 30)]
    sizes = [len(windows[i : i + 30]) for i in range(0, count, 30)]
    return math.exp(np.average(losses, weights=sizes))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("examples", type=Path, help="Flax's folder of examples")
    parser.add_argument("--steps", type=int, default=600)
    args = parser.parse_args()
    tokenizer = tokenizers.Tokenizer.from_file(str(TOKENIZER))
    corpus = stdlib_corpus()
    stream, heldout = (
        encode(tokenizer, corpus.train),
        encode(tokenizer, [corpus.heldout]),
    )
    rows, reports = [], []
    for make in (linen_lm1b, nnx_gemma):
        subject = make(args.examples)
        print(subject.name, flush=True)
        params = train(subject, stream, args.steps)
        single = perplexity(params, subject.logits, heldout)
        params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
        before = perplexity(params, subject.logits_bf16, heldout)
        converted, report = subject.quantize(params)
        after = perplexity(converted, subject.logits_bf16, heldout)
        rows.append(
            f"| {subject.name} | {single:.3f} | {before:.3f} | {after:.3f} "
            f"| {100 * (after / before - 1):+.2f} % | {len(report.converted)} of "
            f"{len(report.rows)} |"
        )
        reports.append(f"{subject.name}\n\n```\n{report}\n```\n")
    print(
        "| model | float32 | bfloat16 | MXFP8 W8A16 | change | converted |\n"
        "| --- | --- | --- | --- | --- | --- |",
        *rows,
        sep="\n",
    )
    print("", *reports, sep="\n")


if __name__ == "__main__":
    main()

"""Trains the two small checkpoints that the demo and the tests use.

A dense Qwen3 and a Qwen3-MoE of about 3 million parameters each, on the sources and the
documentation of Python's standard library; a few modules are held out. Takes a few
minutes on one GPU:

    python -m benchmarks.train_tiny --out build/tiny

writes the folders `tiny-qwen3` and `tiny-qwen3-moe` in Hugging Face's format, each with
the held-out text in `heldout.txt` and an account of the training in `training.json`.
"""

import argparse
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy
import tokenizers

from benchmarks.stdlib_text import (
    Corpus,
    encode,
    END_OF_TEXT,
    HELD_OUT,
    stdlib_corpus,
    train_tokenizer,
)
from jmx8.checkpoint import names
from jmx8.models import Qwen3, Qwen3Config
from jmx8.nn import SparseMoE


MODELS = {"dense": "tiny-qwen3", "moe": "tiny-qwen3-moe"}

_SHARED = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "eos_token_id": 0,  # END_OF_TEXT, the first token
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 512,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 2048,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "dense": _SHARED
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 224,
        "intermediate_size": 576,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "head_dim": 64,  # unlike hidden_size / num_attention_heads
        "tie_word_embeddings": False,
    },
    "moe": _SHARED
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 192,
        "intermediate_size": 256,
        "num_hidden_layers": 5,
        "num_attention_heads": 6,
        "head_dim": 32,
        "tie_word_embeddings": True,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [0],
    },
}

# Of the loss that keeps the router from sending all tokens to a few experts.
_BALANCE_WEIGHT = 0.01


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes:
        steps: Optimizer steps.
        batch: Windows per step.
        window: Tokens per window.
        learning_rate: Its peak, reached after a twentieth of the steps.
        evaluations: How often the held-out loss is measured.
        seed: Seeds the parameters and the choice of windows.
    """

    steps: int = 3000
    batch: int = 32
    window: int = 512
    learning_rate: float = 3e-3
    evaluations: int = 12
    seed: int = 0


class _Tap(eqx.Module):
    """A layer that passes its input to `tap` too."""

    layer: SparseMoE
    tap: Callable[[jax.Array], None] = eqx.field(static=True)

    def __call__(self, x):
        self.tap(x)
        return self.layer(x)


def forward(
    model: Qwen3, tokens: jax.Array
) -> tuple[jax.Array, list[jax.Array], list[jax.Array]]:
    """Runs the model and looks at its routers.

    Args:
        model: The model.
        tokens: `[b, t]`.

    Returns:
        Logits `[b, t, v]`; for each sparse layer, the share of tokens that each expert
        gets, `[e]`, which sums to 1; and a scalar that is 1 if all experts are used
        evenly and larger if not, differentiable in the router.
    """
    inputs: list[jax.Array] = []
    tapped = eqx.tree_at(
        _sparse_mlps, model, replace_fn=lambda mlp: _Tap(mlp, inputs.append)
    )
    logits, _ = tapped(tokens)
    loads, balances = [], []
    for moe, x in zip(_sparse_mlps(model), inputs, strict=True):
        router_logits = jax.vmap(moe.gate)(x.reshape(-1, x.shape[-1]))
        probabilities = jax.nn.softmax(router_logits.astype(jnp.float32))
        num_experts = probabilities.shape[-1]
        topk_ids = jax.lax.top_k(probabilities, moe.top_k)[1].reshape(-1)
        load = jnp.mean(jax.nn.one_hot(topk_ids, num_experts), axis=0)
        loads.append(load)
        balances.append(num_experts * jnp.sum(load * jnp.mean(probabilities, axis=0)))
    return logits, loads, balances


def _sparse_mlps(model: Qwen3) -> list[SparseMoE]:
    return [layer.mlp for layer in model.layers if isinstance(layer.mlp, SparseMoE)]


def _losses(model: Qwen3, windows: jax.Array):
    """Returns the loss of `windows [b, t + 1]`, and what `forward` says of routers."""
    logits, loads, balances = forward(model, windows[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])
    return jnp.mean(losses), loads, balances


@jax.jit
def evaluate(model: Qwen3, windows: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
    """Returns the loss per token of `windows [b, t + 1]`, and the load of experts."""
    return _losses(model, windows)[:2]


class _State(NamedTuple):
    model: Any  # optax takes any pytree but has no type for it
    optimizer: optax.OptState


def _make_step(optimizer: optax.GradientTransformation, settings: Settings) -> Callable:
    def objective(model, windows):
        loss, _, balances = _losses(model, windows)
        return loss + _BALANCE_WEIGHT * sum(balances), loss

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: _State, stream: jax.Array, index: jax.Array):
        key = jax.random.fold_in(jax.random.key(settings.seed + 1), index)
        last = stream.shape[0] - settings.window
        starts = jax.random.randint(key, (settings.batch, 1), 0, last)
        windows = stream[starts + jnp.arange(settings.window + 1)[None, :]]
        gradient, loss = jax.grad(objective, has_aux=True)(state.model, windows)
        # optax promotes types, which fails where promotion is strict.
        with jax.numpy_dtype_promotion("standard"):
            updates, optimizer_state = optimizer.update(
                gradient, state.optimizer, state.model
            )
        model = optax.apply_updates(state.model, updates)
        return _State(model, optimizer_state), loss

    return step


def _make_optimizer(settings: Settings) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, settings.learning_rate, settings.steps // 20, settings.steps
    )
    is_matrix = lambda model: jax.tree.map(lambda p: p.ndim > 1, model)
    adamw = optax.adamw(schedule, b2=0.95, weight_decay=0.1, mask=is_matrix)
    return optax.chain(optax.clip_by_global_norm(1.0), adamw)


def train(
    config: Qwen3Config, stream: np.ndarray, heldout: np.ndarray, settings: Settings
) -> tuple[Qwen3, dict[str, Any]]:
    """Trains a model in float32, with the tokens of `stream` in random windows.

    Args:
        config: Of the model.
        stream: Tokens to train on.
        heldout: Tokens to measure the loss on.
        settings: How to train.

    Returns:
        The parameters with the lowest held-out loss, rounded to bfloat16, and a
        JSON-like account.
    """
    start = time.monotonic()
    model: Any = Qwen3(config, dtype=jnp.float32, key=jax.random.key(settings.seed))
    optimizer = _make_optimizer(settings)
    state = _State(model, optimizer.init(model))
    step, tokens = _make_step(optimizer, settings), jnp.asarray(stream)
    windows = _split(heldout, settings.window)
    every = max(1, settings.steps // settings.evaluations)
    history, losses = [], []
    best, lowest = None, math.inf
    for index in range(1, settings.steps + 1):
        state, loss = step(state, tokens, index)
        losses.append(loss)
        if index % every and index != settings.steps:
            continue
        heldout_loss = float(evaluate(state.model, windows)[0])
        if heldout_loss < lowest:
            # On the host, because the next step overwrites what is on the device.
            best, lowest = jax.device_get(state.model), heldout_loss
        train_loss = float(np.mean(jax.device_get(losses)))
        history.append({"step": index, "train": train_loss, "heldout": heldout_loss})
        losses = []
        seconds = time.monotonic() - start
        print(
            f"  step {index}/{settings.steps}: loss {train_loss:.4f}, held-out "
            f"{heldout_loss:.4f}, {seconds:.0f} s",
            flush=True,
        )
    if best is None:
        raise FloatingPointError("train: the held-out loss was never finite.")
    best = jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16), best)
    # In float32 arithmetic: what differs is the rounding of the parameters alone.
    widened = jax.tree.map(lambda p: p.astype(jnp.float32), best)
    loss, loads = evaluate(widened, windows)
    print(f"  rounded: held-out {float(loss):.4f}", *map(_describe_load, loads))
    return best, {
        "tokens": settings.steps * settings.batch * settings.window,
        "losses": history,
        "lowest_heldout_loss": lowest,
        "heldout_loss": float(loss),
        "expert_loads": [np.round(load, 4).tolist() for load in loads],
        "seconds": time.monotonic() - start,
    }


def _describe_load(load: jax.Array) -> str:
    least, most = float(jnp.min(load)), float(jnp.max(load))
    return f"\n  experts of a layer get {least:.1%} to {most:.1%} of the tokens"


def _split(tokens: np.ndarray, window: int) -> jax.Array:
    """Cuts tokens into windows `[b, window + 1]` that overlap by one token."""
    starts = np.arange(0, len(tokens) - window, window)
    return jnp.asarray(tokens[starts[:, None] + np.arange(window + 1)])


def hf_tensors(model: Qwen3) -> dict[str, np.ndarray]:
    """Returns the parameters under the names that Hugging Face's checkpoints use."""
    tensors = {}
    for path, leaf in jax.tree.leaves_with_path(model):
        rows = np.asarray(leaf).reshape(-1, leaf.shape[-1])
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        for slot in names.QWEN3.alternatives(path, leaf.shape)[0]:
            stop = slot.start + math.prod(slot.shape[:-1])
            tensors[slot.name] = rows[slot.start : stop].reshape(slot.shape)
    return tensors


def write_checkpoint(
    folder: Path,
    hf_config: dict[str, Any],
    model: Qwen3,
    tokenizer: tokenizers.Tokenizer,
) -> None:
    """Writes a model and its tokenizer in Hugging Face's format."""
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(
        hf_tensors(model), folder / "model.safetensors", metadata={"format": "pt"}
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "config.json", hf_config)
    _write_json(
        folder / "tokenizer_config.json",
        {
            "clean_up_tokenization_spaces": False,
            "eos_token": END_OF_TEXT,
            "model_max_length": hf_config["max_position_embeddings"],
            "pad_token": END_OF_TEXT,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


def make_checkpoint(
    folder: Path, hf_config: dict[str, Any], corpus: Corpus, settings: Settings
) -> Qwen3:
    """Trains a tokenizer and a model on a corpus, and writes a complete folder.

    Returns:
        The model as it was written, in bfloat16.
    """
    tokenizer = train_tokenizer(corpus.train, hf_config["vocab_size"])
    stream = encode(tokenizer, corpus.train)
    heldout = encode(tokenizer, [corpus.heldout])
    config = Qwen3Config.from_hf(hf_config)
    print(f"{folder.name}: {len(stream):,} tokens, {len(heldout):,} held out")
    model, account = train(config, stream, heldout, settings)
    write_checkpoint(folder, hf_config, model, tokenizer)
    (folder / "heldout.txt").write_text(corpus.heldout, "utf-8")
    packages = ("jax", "equinox", "optax", "numpy", "tokenizers", "safetensors")
    _write_json(
        folder / "training.json",
        {
            "program": "benchmarks/train_tiny.py",
            "settings": dataclasses.asdict(settings),
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(model)),
            "corpus": {
                "source": f"standard library of Python {corpus.python}",
                "bytes": sum(len(text.encode()) for text in corpus.train),
                "tokens": len(stream),
                "heldout_modules": list(HELD_OUT),
                "heldout_bytes": len(corpus.heldout.encode()),
                "heldout_tokens": len(heldout),
            },
            **account,
            "device": jax.devices()[0].device_kind,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "versions": {name: importlib.metadata.version(name) for name in packages},
        },
    )
    return model


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", choices=[*MODELS, "both"], default="both")
    parser.add_argument("--out", type=Path, default=Path("build/tiny"))
    parser.add_argument(
        "--corpus",
        type=Path,
        help="what benchmarks.stdlib_text wrote, in place of this Python's library",
    )
    for field in dataclasses.fields(Settings):
        name = f"--{field.name.replace('_', '-')}"
        parser.add_argument(name, type=type(field.default), default=field.default)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    if args.corpus is None:
        corpus = stdlib_corpus()
    else:
        corpus = Corpus(**json.loads(args.corpus.read_text("utf-8")))
    fields = dataclasses.fields(Settings)
    settings = Settings(**{field.name: getattr(args, field.name) for field in fields})
    for model in MODELS if args.model == "both" else [args.model]:
        make_checkpoint(args.out / MODELS[model], CONFIGS[model], corpus, settings)


if __name__ == "__main__":
    main()

"""Times a model's forward pass in MXFP8 against the same model in bfloat16.

Random weights, the shapes of a small Qwen3, dense and mixture of experts: what is
timed is reading a batch of prompts and writing one token, as `generate` does both.
"""

import argparse

import equinox as eqx
import jax
import jax.numpy as jnp
from _timing import describe_run, markdown_table, median_seconds

from jmx8 import quantize_model
from jmx8.models import Qwen3, Qwen3Config
from jmx8.nn import with_activations


_COMMON = {
    "vocab_size": 4096,
    "hidden_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 3072,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 4096,
    "hidden_act": "silu",
}
CONFIGS = {
    "dense": _COMMON | {"model_type": "qwen3"},
    "MoE": _COMMON
    | {
        "model_type": "qwen3_moe",
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=256)
    args = parser.parse_args()
    print(f"{describe_run()}\n")
    rows = []
    for name, config in CONFIGS.items():
        key = jax.random.key(0)
        baseline = Qwen3(Qwen3Config.from_hf(config), dtype=jnp.bfloat16, key=key)
        converted = quantize_model(baseline, donate=False)
        models = {
            "bf16": baseline,
            "W8A16": with_activations(converted, "bf16"),
            "W8A8": with_activations(converted, "mxfp8"),
        }
        shape = (args.batch, args.prompt)
        tokens = jax.random.randint(key, shape, 0, config["vocab_size"])
        cache = baseline.init_cache(args.batch, args.prompt + 1)
        forward = eqx.filter_jit(lambda m, t, c: m(t, c, last_only=True))
        _, filled = forward(baseline, tokens, cache)
        for work, inputs in (
            (f"read {args.batch} x {args.prompt} tokens", (tokens, cache)),
            (f"write {args.batch} token(s)", (tokens[:, :1], filled)),
        ):
            seconds = {
                label: median_seconds(forward, model, *inputs, calls=3)
                for label, model in models.items()
            }
            rows.append(
                [name, work]
                + [f"{s * 1e3:.2f}" for s in seconds.values()]
                + [f"{seconds['W8A16'] / seconds['bf16']:.2f}x"]
            )
    header = ["model", "work", "bf16, ms", "W8A16", "W8A8", "W8A16 against bf16"]
    print(markdown_table(header, rows))


if __name__ == "__main__":
    main()

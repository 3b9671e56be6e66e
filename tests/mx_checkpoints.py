"""Small checkpoint folders in MXFP8, written byte by byte, without torch."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import jmx8.checkpoint.plan
import jmx8.checkpoint.stream
from jmx8._mx_array import MXArray, quantize
from jmx8.checkpoint._load import _leaves
from jmx8.checkpoint.formats import Format
from jmx8.checkpoint.reader import DTYPES


Tensors = dict[str, np.ndarray]

NAMES = {dtype: name for name, dtype in DTYPES.items()}
BF16, E4M3, E8M0 = (
    np.dtype(x) for x in (jnp.bfloat16, jnp.float8_e4m3fn, jnp.float8_e8m0fnu)
)

DENSE: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 70,
    "hidden_size": 64,
    "intermediate_size": 80,  # not a multiple of 32
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 20,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
MOE: dict[str, Any] = DENSE | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "tie_word_embeddings": False,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "norm_topk_prob": True,
    "mlp_only_layers": [0],
}


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns every tensor that Hugging Face writes for a config, with its shape."""
    hidden, head = config["hidden_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    vocab = (config["vocab_size"], hidden)
    result = {"model.embed_tokens.weight": vocab, "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        result["lm_head.weight"] = vocab
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        attention = {
            "q_proj.weight": (heads * head, hidden),
            "k_proj.weight": (kv_heads * head, hidden),
            "v_proj.weight": (kv_heads * head, hidden),
            "o_proj.weight": (hidden, heads * head),
            "q_norm.weight": (head,),
            "k_norm.weight": (head,),
        }
        result |= {f"{prefix}self_attn.{k}": shape for k, shape in attention.items()}
        result[f"{prefix}input_layernorm.weight"] = (hidden,)
        result[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
        sparse = "num_experts" in config and layer not in config["mlp_only_layers"]
        inner = config["moe_intermediate_size" if sparse else "intermediate_size"]
        mlps = [f"{prefix}mlp."]
        if sparse:
            result[f"{prefix}mlp.gate.weight"] = (config["num_experts"], hidden)
            mlps = [f"{prefix}mlp.experts.{e}." for e in range(config["num_experts"])]
        for mlp in mlps:
            result[f"{mlp}gate_proj.weight"] = (inner, hidden)
            result[f"{mlp}up_proj.weight"] = (inner, hidden)
            result[f"{mlp}down_proj.weight"] = (hidden, inner)
    return result


def random_weights(config: dict[str, Any], seed: int = 0) -> Tensors:
    """Returns random bfloat16 tensors of the shapes that a config asks for."""
    generator = np.random.default_rng(seed)
    return {
        name: (0.1 * generator.standard_normal(shape)).astype(BF16)
        for name, shape in shapes(config).items()
    }


def is_linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def stored(tensors: Tensors, form: Format, scale_dtype: Any = np.uint8) -> Tensors:
    """Returns the tensors with linear layers as a format stores them."""
    result = {}
    for name, x in tensors.items():
        if not is_linear(name):
            result[name] = x
            continue
        elements, codes = mx_bytes(quantize(jnp.asarray(x)), x.shape[-1])
        result[name] = elements
        result[form.scale_name(name)] = codes.view(scale_dtype)
    return result


def mx_bytes(w: MXArray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns elements `[..., k]`, without padding, and codes of an `MXArray`."""
    return np.array(w.elements)[..., :k], np.array(w.scales).view(np.uint8)


def write_file(path: Path, tensors: Tensors, metadata: Any = None) -> None:
    """Writes a safetensors file."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    position = 0
    for name, x in tensors.items():
        end = position + x.nbytes
        header[name] = {
            "dtype": NAMES[x.dtype],
            "shape": list(x.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header).encode()
    data = b"".join(x.tobytes() for x in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def write_folder(
    path: Path,
    config: Mapping[str, Any],
    tensors: Tensors,
    *,
    num_shards: int = 1,
    index: bool = True,
) -> Path:
    """Writes a checkpoint folder; several shards get an index, unless told not to."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    if num_shards == 1:
        write_file(path / "model.safetensors", tensors)
        return path
    weight_map = {}
    for shard in range(num_shards):
        name = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        # Every n-th tensor: elements and their scales lie in different files.
        part = {name: tensors[name] for name in list(tensors)[shard::num_shards]}
        write_file(path / name, part)
        weight_map |= dict.fromkeys(part, name)
    if index:
        text = json.dumps({"metadata": {}, "weight_map": weight_map})
        (path / "model.safetensors.index.json").write_text(text)
    return path


def use_small_chunks(monkeypatch):
    """Makes every tensor of the small checkpoints take several chunks."""
    monkeypatch.setattr(jmx8.checkpoint.plan, "CHUNK_BYTES", 1600)
    monkeypatch.setattr(jmx8.checkpoint.stream, "CHUNK_BYTES", 1600)


def bits(x):
    return np.asarray(x).view(f"u{x.dtype.itemsize}")


def assert_same(actual, expected):
    """Compares the parameters of two models bit by bit."""
    actual, expected = _leaves(actual), _leaves(expected)
    assert actual.keys() == expected.keys()
    for path, leaf in expected.items():
        assert type(actual[path]) is type(leaf), path
        assert actual[path].shape == leaf.shape, path
        if isinstance(leaf, MXArray):
            assert actual[path].padding == leaf.padding
            pairs = [(actual[path].elements, leaf.elements)]
            pairs.append((actual[path].scales, leaf.scales))
        else:
            pairs = [(actual[path], leaf)]
        for one, other in pairs:
            np.testing.assert_array_equal(bits(one), bits(other), err_msg=path)

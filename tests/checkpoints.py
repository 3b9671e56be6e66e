"""Small checkpoint folders for tests, written with the `safetensors` package."""

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch


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


def random_tensors(
    config: dict[str, Any], dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Returns random tensors of the shapes that a config asks for."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (0.1 * torch.randn(shape, generator=generator)).to(dtype)
        for name, shape in shapes(config).items()
    }


def write_checkpoint(
    path: Path,
    config: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    *,
    num_shards: int = 1,
) -> Path:
    """Writes a checkpoint folder; several shards get an index."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    if num_shards == 1:
        safetensors.torch.save_file(tensors, path / "model.safetensors")
        return path
    weight_map = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        # Every n-th tensor: the experts of a layer are spread over all shards.
        part = {name: tensors[name] for name in list(tensors)[shard::num_shards]}
        safetensors.torch.save_file(part, path / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path

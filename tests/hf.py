"""Random Hugging Face models, and their parameters in a jmx8 model."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from jmx8.models import Qwen3, Qwen3Config


torch.set_num_threads(1)  # more only get in each other's way at these sizes

DENSE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
}
MOE = DENSE | {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


def random_hf_model(seed: int = 0, **fields) -> transformers.PreTrainedModel:
    """Returns a float32 model; `fields` go into its config, MoE if they say so.

    The parameters are larger than Hugging Face's own random ones, so that attention and
    routing are far from uniform and a mistake in them shows in the logits.
    """
    if "num_experts" in fields:
        config = transformers.Qwen3MoeConfig(**fields)
        model = transformers.Qwen3MoeForCausalLM(config)
    else:
        config = transformers.Qwen3Config(**fields)
        model = transformers.Qwen3ForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.3 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.5 * noise)
            elif "embed_tokens" in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(noise * 1.5 * parameter.shape[-1] ** -0.5)
    return model.eval()


def from_hf(model: transformers.PreTrainedModel, **overrides) -> Qwen3:
    """Returns the jmx8 model with the config and the parameters of `model`."""
    config = Qwen3Config.from_hf(model.config.to_dict() | overrides)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    abstract = eqx.filter_eval_shape(
        Qwen3, config, dtype=jnp.float32, key=jax.random.key(0)
    )

    def fill(path, leaf):
        tensor = state.pop(_hf_name(path))
        assert tensor.shape == leaf.shape, (_hf_name(path), tensor.shape, leaf.shape)
        return jnp.asarray(tensor)

    filled = jax.tree.map_with_path(fill, abstract)
    assert not state, f"not in the jmx8 model: {sorted(state)}"
    return filled


def _hf_name(path) -> str:
    names = [str(getattr(key, "name", getattr(key, "idx", None))) for key in path]
    name = ".".join(names)
    # transformers 5 holds the experts stacked, under the names of the projections.
    name = name.replace("experts.w13", "experts.gate_up_proj")
    name = name.replace("experts.w2", "experts.down_proj")
    return name if name.startswith("lm_head") else f"model.{name}"


def hf_logits(model: transformers.PreTrainedModel, tokens: list[int]) -> np.ndarray:
    """Returns the logits `[t, v]` of one unpadded text."""
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()

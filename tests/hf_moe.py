"""Random sparse MoE blocks of Hugging Face, and the same layer as a `SparseMoE`."""

import dataclasses
import functools
import importlib
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import torch

from jmx8 import SwiGLUOAI
from jmx8.nn import Experts, SparseMoE
from jmx8.ops.moe import Activation, apply_activation


# Waiting for its threads takes PyTorch longer than computing blocks as small as these.
torch.set_num_threads(1)

HIDDEN_SIZE = 32
INTERMEDIATE_SIZE = 24


@dataclasses.dataclass(frozen=True)
class Family:
    """One model family, with its released number of experts and experts per token.

    Attributes:
        block: Module, config class and block class in transformers.
        fields: The config, but for the hidden and the expert's intermediate size.
        routing: The arguments of `route`, and fields of `SparseMoE`, that its rule has.
        activation: Of the experts, and of the shared expert if there is one.
        weight_on_input: Whether the routing weight multiplies the expert's input.
    """

    block: tuple[str, str, str]
    fields: dict[str, Any]
    routing: dict[str, Any]
    activation: Activation = "silu"
    weight_on_input: bool = False


def _family(block, fields, routing, **rest):
    fields = {"hidden_size": HIDDEN_SIZE} | fields
    return Family(tuple(block.split()), fields, routing, **rest)


def _experts(name, number, top_k, width="moe_intermediate_size"):
    return {name: number, "num_experts_per_tok": top_k, width: INTERMEDIATE_SIZE}


_QWEN3 = "qwen3_moe Qwen3MoeConfig Qwen3MoeSparseMoeBlock"
_OLMOE = "olmoe OlmoeConfig OlmoeSparseMoeBlock"
_DEEPSEEK_V3 = "deepseek_v3 DeepseekV3Config DeepseekV3MoE"
_GPT_OSS = "gpt_oss GptOssConfig GptOssMLP"
_QWEN3_EXPERTS = _experts("num_experts", 128, 8)
_SOFTMAX = {"method": "softmax", "renormalize": True}
_SIGMOID = {"method": "sigmoid", "renormalize": True}

FAMILIES = {
    "mixtral": _family(
        "mixtral MixtralConfig MixtralSparseMoeBlock",
        _experts("num_local_experts", 8, 2, "intermediate_size"),
        {"top_k": 2} | _SOFTMAX,
    ),
    "qwen3_moe": _family(
        _QWEN3, _QWEN3_EXPERTS | {"norm_topk_prob": True}, {"top_k": 8} | _SOFTMAX
    ),
    "qwen3_moe_unnormalized_gelu": _family(
        _QWEN3,
        _QWEN3_EXPERTS | {"norm_topk_prob": False, "hidden_act": "gelu"},
        {"top_k": 8, "method": "softmax", "renormalize": False},
        activation="gelu",
    ),
    "qwen3_next": _family(
        "qwen3_next Qwen3NextConfig Qwen3NextSparseMoeBlock",
        _experts("num_experts", 512, 10)
        | {"shared_expert_intermediate_size": 40, "norm_topk_prob": True},
        {"top_k": 10} | _SOFTMAX,
    ),
    "olmoe": _family(
        _OLMOE,
        _experts("num_experts", 64, 8, "intermediate_size"),
        {"top_k": 8, "method": "softmax", "renormalize": False},
    ),
    "olmoe_normalized_gelu_tanh": _family(
        _OLMOE,
        _experts("num_experts", 64, 8, "intermediate_size")
        | {"norm_topk_prob": True, "hidden_act": "gelu_pytorch_tanh"},
        {"top_k": 8} | _SOFTMAX,
        activation="gelu_tanh",
    ),
    "deepseek_v3": _family(
        _DEEPSEEK_V3,
        _experts("n_routed_experts", 256, 8)
        | {"n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5},
        {"top_k": 8, "num_groups": 8, "topk_groups": 4, "scaling_factor": 2.5}
        | _SIGMOID,
    ),
    "deepseek_v3_unnormalized_two_shared": _family(
        _DEEPSEEK_V3,
        _experts("n_routed_experts", 24, 6)
        | {"n_group": 6, "topk_group": 2, "routed_scaling_factor": 16.0}
        | {"norm_topk_prob": False, "n_shared_experts": 2},
        {"top_k": 6, "num_groups": 6, "topk_groups": 2, "scaling_factor": 16.0}
        | {"method": "sigmoid", "renormalize": False},
    ),
    "deepseek_v4": _family(
        "deepseek_v4 DeepseekV4Config DeepseekV4SparseMoeBlock",
        _experts("n_routed_experts", 256, 6)
        | {"routed_scaling_factor": 1.5, "swiglu_limit": 4.0}
        | {"num_hidden_layers": 2, "mlp_layer_types": ["moe", "moe"]},
        {"top_k": 6, "method": "sqrtsoftplus", "renormalize": True}
        | {"scaling_factor": 1.5},
        activation=SwiGLUOAI(alpha=1.0, beta=0.0, limit=4.0),
    ),
    "glm4_moe": _family(
        "glm4_moe Glm4MoeConfig Glm4MoeMoE",
        _experts("n_routed_experts", 160, 8)
        | {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.5},
        {"top_k": 8, "scaling_factor": 2.5} | _SIGMOID,
    ),
    "minimax_m2": _family(
        "minimax_m2 MiniMaxM2Config MiniMaxM2SparseMoeBlock",
        _experts("num_local_experts", 256, 8, "intermediate_size"),
        {"top_k": 8} | _SIGMOID,
    ),
    "minimax_m3": _family(
        "minimax_m3_vl MiniMaxM3VLTextConfig MiniMaxM3VLSparseMoeBlock",
        _experts("num_local_experts", 128, 4, "intermediate_size")
        | {"shared_intermediate_size": 40, "routed_scaling_factor": 2.0}
        | {"swiglu_alpha": 1.3, "swiglu_limit": 3.0},
        {"top_k": 4, "scaling_factor": 2.0} | _SIGMOID,
        activation=SwiGLUOAI(alpha=1.3, beta=1.0, limit=3.0),
    ),
    "gpt_oss": _family(
        _GPT_OSS,
        _experts("num_local_experts", 128, 4, "intermediate_size"),
        {"top_k": 4, "method": "topk_softmax"},
        activation="swigluoai",
    ),
    "gpt_oss_other_parameters": _family(
        _GPT_OSS,
        _experts("num_local_experts", 32, 4, "intermediate_size")
        | {"swiglu_alpha": 1.1, "swiglu_limit": 2.0},
        {"top_k": 4, "method": "topk_softmax"},
        activation=SwiGLUOAI(alpha=1.1, limit=2.0),
    ),
    "llama4": _family(
        "llama4 Llama4TextConfig Llama4TextMoe",
        _experts("num_local_experts", 16, 1, "intermediate_size"),
        {"top_k": 1, "method": "sigmoid", "renormalize": False},
        weight_on_input=True,
    ),
    "nemotron_h": _family(
        "nemotron_h NemotronHConfig NemotronHMoE",
        _experts("n_routed_experts", 128, 6)
        | {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
        | {"moe_shared_expert_intermediate_size": 40},
        {"top_k": 6, "num_groups": 4, "topk_groups": 2, "scaling_factor": 2.5}
        | _SIGMOID,
        activation="relu2",
    ),
}


@functools.cache
def hf_block(name: str) -> torch.nn.Module:
    """Returns the float32 block of a family, with every parameter and buffer random.

    They are large enough that routing is far from uniform, correction biases change
    the choice, and clamps take effect.
    """
    module_name, config_name, block_name = FAMILIES[name].block
    module = importlib.import_module(
        f"transformers.models.{module_name}.modeling_{module_name}"
    )
    config = getattr(module, config_name)(**FAMILIES[name].fields)
    config._experts_implementation = "eager"
    layer_index = (0,) if module_name == "deepseek_v4" else ()
    block = getattr(module, block_name)(config, *layer_index)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, tensor in sorted(block.state_dict().items()):
            scale = 3 * HIDDEN_SIZE**-0.5 if key.endswith(("weight", "proj")) else 0.3
            tensor.copy_(scale * torch.randn(tensor.shape, generator=generator))
    return block.eval()


def hf_route(name: str, x: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns logits `[t, e]`, ids and weights `[t, top_k]` of the router for `x`."""
    block: Any = hf_block(name)
    with torch.no_grad():
        if name == "llama4":
            scores, logits = block.router(x)
            weights, ids = torch.topk(scores, 1)
        elif name == "minimax_m2":
            logits, weights, ids = block.gate(x, block.e_score_correction_bias)
        else:
            router = block.router if "gpt_oss" in name else block.gate
            logits, weights, ids = router(x)
        if name == "minimax_m3":  # its block scales the sum of the experts instead
            weights = weights * block.routed_scaling_factor
    return logits.numpy(), ids.numpy(), weights.numpy()


def hf_forward(name: str, x: torch.Tensor) -> torch.Tensor:
    """Returns the output of the block for tokens `[b, t, h]`."""
    out = hf_block(name)(x)
    # Some return router scores or logits too.
    return (out[0] if isinstance(out, tuple) else out).reshape(x.shape)


class SharedExpert(eqx.Module):
    """An MLP on vectors `[h]`, in the layout of `Experts`."""

    w13: eqx.nn.Linear
    w2: eqx.nn.Linear
    activation: Activation = eqx.field(static=True)

    def __call__(self, x):
        return self.w2(apply_activation(self.w13(x), self.activation))


def correction_bias(name: str) -> jax.Array | None:
    """Returns the `e_score_correction_bias` of the block, None if it has none."""
    state = hf_block(name).state_dict()
    biases = [state[k] for k in state if k.endswith("e_score_correction_bias")]
    return jnp.asarray(biases[0].numpy()) if biases else None


def sparse_moe(name: str) -> SparseMoE:
    """Returns the layer with the parameters of `hf_block(name)`."""
    family = FAMILIES[name]
    state = {key: value.numpy() for key, value in hf_block(name).state_dict().items()}
    router = "router" if "router.weight" in state else "gate"
    gate = _linear(state.pop(f"{router}.weight"), state.pop(f"{router}.bias", None))
    shared_gate = state.pop("shared_expert_gate.weight", None)
    for key in [key for key in state if key.endswith("e_score_correction_bias")]:
        del state[key]
    layer = SparseMoE(
        gate,
        _pop_experts(state, family),
        correction_bias(name),
        _pop_shared_expert(state, family.activation),
        None if shared_gate is None else _linear(shared_gate),
        **family.routing,
    )
    assert not state, f"not in the jmx8 layer: {sorted(state)}"
    return layer


def _linear(weight, bias=None):
    out_features, in_features = weight.shape
    make = functools.partial(eqx.nn.Linear, use_bias=bias is not None)
    abstract = eqx.filter_eval_shape(
        make, in_features, out_features, key=jax.random.key(0)
    )
    leaves = [jnp.asarray(a) for a in (weight, bias) if a is not None]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def _pop_experts(state, family):
    w13 = state.pop(
        "experts.up_proj" if family.activation == "relu2" else "experts.gate_up_proj"
    )
    w2 = state.pop("experts.down_proj")
    w13_bias = state.pop("experts.gate_up_proj_bias", None)
    w2_bias = state.pop("experts.down_proj_bias", None)
    if family.block[0] in ("gpt_oss", "llama4"):  # stored as [e, in, out]
        w13, w2 = w13.swapaxes(1, 2), w2.swapaxes(1, 2)
    if family.block[0] == "gpt_oss":  # rows of gate and up alternate
        w13 = np.concatenate([w13[:, ::2], w13[:, 1::2]], axis=1)
        w13_bias = np.concatenate([w13_bias[:, ::2], w13_bias[:, 1::2]], axis=1)
    array = lambda a: None if a is None else jnp.asarray(a)
    return Experts(
        jnp.asarray(w13),
        jnp.asarray(w2),
        array(w13_bias),
        array(w2_bias),
        family.activation,
        family.weight_on_input,
    )


def _pop_shared_expert(state, activation):
    shared = {key: state.pop(key) for key in list(state) if key.startswith("shared_")}
    if not shared:
        return None
    by_projection = {key.split(".")[1]: weight for key, weight in shared.items()}
    names = ("gate_up_proj", "gate_proj", "up_proj")
    first = [by_projection.pop(name) for name in names if name in by_projection]
    w2 = by_projection.pop("down_proj")
    assert not by_projection
    return SharedExpert(_linear(np.concatenate(first)), _linear(w2), activation)

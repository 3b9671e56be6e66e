import dataclasses
import json
import math
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from jmx8.models import ConfigError, Qwen3, Qwen3Config
from jmx8.nn._rope import RopeParameters


# As the released checkpoints have them.
RELEASED_0_6B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
RELEASED_8B = RELEASED_0_6B | {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_window_layers": 36,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "tie_word_embeddings": False,
}
RELEASED_30B_A3B = RELEASED_0_6B | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": False,
}

SMALL = {
    "model_type": "qwen3",
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
}
SMALL_MOE = SMALL | {
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "norm_topk_prob": False,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def test_released_dense_configs():
    config = Qwen3Config.from_hf(RELEASED_0_6B)
    assert config == Qwen3Config(
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        rms_norm_eps=1e-6,
        max_position_embeddings=40960,
        rope=RopeParameters(1e6),
        tie_word_embeddings=True,
        bos_token_id=151643,
        eos_token_id=(151645,),
    )
    assert _num_parameters(config) == 596_049_920
    assert _num_parameters(Qwen3Config.from_hf(RELEASED_8B)) == 8_190_735_360


def test_released_moe_config():
    config = Qwen3Config.from_hf(RELEASED_30B_A3B)
    assert all(map(config.is_sparse, range(48)))
    assert (config.num_experts, config.num_experts_per_tok) == (128, 8)
    assert config.norm_topk_prob
    assert _num_parameters(config) == 30_532_122_624


def _num_parameters(config: Qwen3Config) -> int:
    model = eqx.filter_eval_shape(Qwen3, config, key=jax.random.key(0))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model))


@pytest.mark.parametrize("fields", [SMALL, SMALL_MOE])
@pytest.mark.parametrize("rope", [None, {"type": "linear", "factor": 2.0}, YARN])
def test_both_spellings_of_transformers_mean_the_same(fields, rope, tmp_path):
    old = fields | {"rope_scaling": rope}
    kind = "Qwen3Config" if fields["model_type"] == "qwen3" else "Qwen3MoeConfig"
    # Saving writes rope_parameters, and num_local_experts.
    getattr(transformers, kind)(**old).save_pretrained(tmp_path)
    new = json.loads((tmp_path / "config.json").read_text())
    assert "rope_theta" not in new and "rope_scaling" not in new
    assert Qwen3Config.from_hf(new) == Qwen3Config.from_hf(old)


def test_missing_head_dim_is_what_hugging_face_takes():
    for fields, kind in (
        (SMALL, transformers.Qwen3Config),
        (SMALL_MOE, transformers.Qwen3MoeConfig),
    ):
        fields = {k: v for k, v in fields.items() if k != "head_dim"}
        theirs = kind(**fields)
        hidden_per_head = theirs.hidden_size // theirs.num_attention_heads
        expected = getattr(theirs, "head_dim", hidden_per_head)
        assert Qwen3Config.from_hf(fields).head_dim == expected


def _logits(config: Qwen3Config) -> np.ndarray:
    rng = np.random.default_rng(0)
    random = lambda x: jnp.asarray(rng.normal(0, 0.4, x.shape), jnp.float32)
    abstract = eqx.filter_eval_shape(Qwen3, config, key=jax.random.key(0))
    model = jax.tree.map(random, abstract)
    tokens = jnp.array([[3, 1, 4, 1, 5, 9, 2, 6]])
    return np.asarray(eqx.filter_jit(model)(tokens)[0])


def _shapes(config: Qwen3Config) -> str:
    """Returns the names and the shapes of all parameters, and the cache's."""
    key = jax.random.key(0)
    model, cache = eqx.filter_eval_shape(
        lambda: (model := Qwen3(config, key=key), model.init_cache(1, 8))
    )
    return str(jax.tree.leaves_with_path(model)) + str(jax.tree.leaves(cache))


def _max_length(config: Qwen3Config) -> int:
    return config.max_length


def _special_tokens(config: Qwen3Config) -> tuple:
    return config.bos_token_id, config.eos_token_id


# Field of Qwen3Config: the config.json to start from, the change, what it must change.
EFFECTS = [
    ("vocab_size", SMALL, {"vocab_size": 41}, _shapes),
    ("hidden_size", SMALL, {"hidden_size": 64}, _shapes),
    ("intermediate_size", SMALL, {"intermediate_size": 64}, _shapes),
    ("num_hidden_layers", SMALL, {"num_hidden_layers": 2}, _shapes),
    ("num_attention_heads", SMALL, {"num_attention_heads": 8}, _shapes),
    ("num_key_value_heads", SMALL, {"num_key_value_heads": 4}, _shapes),
    ("num_key_value_heads", SMALL, {"num_key_value_heads": None}, _shapes),
    ("head_dim", SMALL, {"head_dim": 10}, _shapes),
    ("rms_norm_eps", SMALL, {"rms_norm_eps": 0.5}, _logits),
    ("max_position_embeddings", SMALL, {"max_position_embeddings": 65}, _max_length),
    ("rope", SMALL, {"rope_theta": 100.0}, _logits),
    ("rope", SMALL, {"rope_scaling": {"type": "linear", "factor": 2}}, _logits),
    ("rope", SMALL, {"rope_scaling": YARN}, _logits),
    ("rope", SMALL, {"rope_scaling": YARN}, _max_length),
    ("hidden_act", SMALL, {"hidden_act": "gelu"}, _logits),
    ("hidden_act", SMALL_MOE, {"hidden_act": "gelu_pytorch_tanh"}, _logits),
    ("attention_bias", SMALL, {"attention_bias": True}, _shapes),
    ("tie_word_embeddings", SMALL, {"tie_word_embeddings": True}, _shapes),
    ("bos_token_id", SMALL, {"bos_token_id": 7}, _special_tokens),
    ("eos_token_id", SMALL, {"eos_token_id": 7}, _special_tokens),
    ("eos_token_id", SMALL, {"eos_token_id": [7, 8]}, _special_tokens),
    ("num_experts", SMALL_MOE, {"num_experts": 5}, _shapes),
    ("num_experts_per_tok", SMALL_MOE, {"num_experts_per_tok": 3}, _logits),
    ("moe_intermediate_size", SMALL_MOE, {"moe_intermediate_size": 24}, _shapes),
    ("norm_topk_prob", SMALL_MOE, {"norm_topk_prob": True}, _logits),
    ("decoder_sparse_step", SMALL_MOE, {"decoder_sparse_step": 2}, _shapes),
    ("mlp_only_layers", SMALL_MOE, {"mlp_only_layers": [0]}, _shapes),
]


@pytest.mark.parametrize("field, base, change, effect", EFFECTS)
def test_field_has_an_effect(field, base, change, effect):
    before, after = Qwen3Config.from_hf(base), Qwen3Config.from_hf(base | change)
    others = {f.name for f in dataclasses.fields(Qwen3Config)} - {field}
    assert all(getattr(before, name) == getattr(after, name) for name in others)
    assert not np.array_equal(effect(before), effect(after))


def test_every_field_is_in_the_list():
    names = {field.name for field in dataclasses.fields(Qwen3Config)}
    assert {field for field, *_ in EFFECTS} == names


def test_field_without_effect_is_accepted():
    harmless = {
        "use_cache": False,
        "sliding_window": 4096,
        "max_window_layers": 0,
        "layer_types": ["full_attention"],
        "torch_dtype": "bfloat16",
        "quantization_config": {"quant_method": "x"},
        "initializer_range": 7,
        "partial_rotary_factor": 1.0,
        "architectures": None,
    }
    assert Qwen3Config.from_hf(SMALL | harmless) == Qwen3Config.from_hf(SMALL)


def test_default_config_of_transformers_is_read_in_full():
    for kind in (transformers.Qwen3Config, transformers.Qwen3MoeConfig):
        assert Qwen3Config.from_hf(kind().to_dict()).vocab_size == 151936


REQUIRED = (
    "model_type vocab_size hidden_size intermediate_size num_hidden_layers "
    "num_attention_heads num_key_value_heads rms_norm_eps max_position_embeddings "
    "rope_theta num_experts num_experts_per_tok moe_intermediate_size norm_topk_prob"
).split()


@pytest.mark.parametrize("name", REQUIRED)
def test_missing_field_is_named(name):
    fields = {k: v for k, v in SMALL_MOE.items() if k != name}
    with pytest.raises(ConfigError, match=rf"^{name} is missing\.$"):
        Qwen3Config.from_hf(fields)


INVALID = [
    # Wrong types and values out of range.
    ({"hidden_size": "32"}, r"hidden_size must be an integer in \[1, .*\], got '32'"),
    ({"hidden_size": 32.0}, r"hidden_size must be an integer"),
    ({"hidden_size": True}, r"hidden_size must be an integer"),
    ({"hidden_size": None}, r"hidden_size must be an integer"),
    ({"head_dim": None}, r"head_dim must be an integer"),
    ({"vocab_size": 0}, r"vocab_size must be an integer in \[1, 2147483647\], got 0"),
    ({"vocab_size": 10**400}, r"vocab_size must be an integer .*, got 1000"),
    ({"num_hidden_layers": 10**6}, r"num_hidden_layers must be .* \[1, 4096\]"),
    ({"rms_norm_eps": 0.0}, r"rms_norm_eps must be a number > 0, got 0.0"),
    ({"rms_norm_eps": math.nan}, r"rms_norm_eps must be a number > 0, got nan"),
    ({"rms_norm_eps": 10**400}, r"rms_norm_eps must be a number > 0, got 1000"),
    ({"rms_norm_eps": "1e-6"}, r"rms_norm_eps must be a number > 0, got '1e-6'"),
    ({"rope_theta": 1.0}, r"rope_theta must be a number > 1, got 1.0"),
    ({"rope_theta": math.inf}, r"rope_theta must be a number"),
    ({"attention_bias": 1}, r"attention_bias must be true or false, got 1"),
    ({"tie_word_embeddings": None}, r"tie_word_embeddings must be true or false"),
    ({"norm_topk_prob": "yes"}, r"norm_topk_prob must be true or false, got 'yes'"),
    ({"hidden_act": "relu"}, r"hidden_act must be one of 'silu', .*, got 'relu'"),
    ({"hidden_act": ["silu"]}, r"hidden_act must be one of"),
    ({"mlp_only_layers": [-1]}, r"mlp_only_layers must be a list of integers that"),
    ({"mlp_only_layers": ["0"]}, r"mlp_only_layers must be a list of integers"),
    ({"mlp_only_layers": [1]}, r"mlp_only_layers .* below num_hidden_layers=1, got 1"),
    ({"decoder_sparse_step": 0}, r"decoder_sparse_step must be an integer in \[1,"),
    ({"eos_token_id": [1, "2"]}, r"eos_token_id must be a list of integers"),
    ({"eos_token_id": [1, 40]}, r"eos_token_id must be below vocab_size=40, got 40"),
    ({"bos_token_id": 40}, r"bos_token_id must be below vocab_size=40, got 40"),
    ({"bos_token_id": -1}, r"bos_token_id must be an integer in \[0,"),
    # Values that contradict each other.
    ({"num_key_value_heads": 3}, r"num_key_value_heads must divide .* got 3 and 4"),
    ({"num_experts_per_tok": 5}, r"num_experts_per_tok must not exceed .* 5 and 4"),
    ({"num_local_experts": 5}, r"num_experts and num_local_experts must agree"),
    ({"head_dim": 7}, r"head_dim must be even"),
    # What this implementation of Qwen3 does not have.
    ({"model_type": "llama"}, r"model_type must be one of 'qwen3', 'qwen3_moe', got"),
    ({"model_type": "qwen3\n_moe"}, r"model_type .* got 'qwen3\\n_moe'"),
    ({"architectures": ["Qwen3ForSequenceClassification"]}, r"architectures must be"),
    ({"architectures": "Qwen3MoeForCausalLM"}, r"architectures must be a list"),
    ({"use_sliding_window": True}, r"use_sliding_window must be False, the only supp"),
    ({"layer_types": ["sliding_attention"]}, r"layer_types .* got 'sliding_attention'"),
    ({"layer_types": ["full_attention"] * 2}, r"layer_types must have .*=1 entries"),
    ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor must be 1.0"),
    ({"is_encoder_decoder": True}, r"is_encoder_decoder must be False"),
    ({"shared_expert_intermediate_size": 8}, r"shared_expert_intermediate_size: unkn"),
    ({"auto_map": {}, "zzz": 1}, r"auto_map, zzz: unknown for model_type 'qwen3_moe'"),
    # Rotary embedding.
    ({"rope_scaling": "yarn"}, r"rope_scaling must be an object, got 'yarn'"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2}}, r"rope_scaling.type .*'dynam"),
    ({"rope_parameters": {"rope_type": "llama3"}}, r"rope_parameters.rope_type must"),
    ({"rope_scaling": {"type": "linear"}}, r"rope_scaling.factor is missing"),
    ({"rope_scaling": YARN | {"factor": 0.5}}, r"rope_scaling.factor .* >= 1, got 0.5"),
    ({"rope_scaling": YARN | {"beta_fast": 1}}, r"rope_scaling.beta_fast must exceed"),
    ({"rope_scaling": YARN | {"truncate": 1}}, r"rope_scaling.truncate must be true"),
    (
        {"rope_scaling": YARN | {"type": "linear"}},
        r"rope_scaling.rope_type .* contradi",
    ),
    ({"rope_scaling": {"factor": 2.0}}, r"rope_scaling.factor is not supported for ro"),
    ({"rope_scaling": YARN | {"new": 2.0}}, r"rope_scaling.new is not supported for"),
    (
        {"rope_scaling": YARN | {"rope_theta": 5.0}},
        r"rope_theta must agree with rope_",
    ),
    (
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        r"rope_parameters.full_attention is not supported",
    ),
    (
        {"rope_parameters": {"rope_type": "default"}, "rope_scaling": YARN},
        r"rope_parameters and rope_scaling contradict each other",
    ),
    (
        {"rope_parameters": YARN | {"partial_rotary_factor": 0.25}},
        r"rope_parameters.partial_rotary_factor must be 1.0",
    ),
]


@pytest.mark.parametrize("change, message", INVALID)
def test_invalid_value_is_refused_in_one_line_that_names_the_field(change, message):
    with pytest.raises(ConfigError) as error:
        Qwen3Config.from_hf(SMALL_MOE | change)
    assert re.match(message, str(error.value)), str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_experts_in_a_dense_config_are_refused():
    with pytest.raises(ConfigError, match=r"^num_experts: unknown for .*'qwen3'"):
        Qwen3Config.from_hf(SMALL | {"num_experts": 4})


def test_missing_head_dim_that_does_not_divide_is_refused():
    fields = SMALL_MOE | {"hidden_size": 33}
    del fields["head_dim"]
    with pytest.raises(ConfigError, match="head_dim is missing, and hidden_size is"):
        Qwen3Config.from_hf(fields)


@pytest.mark.parametrize(
    "change, expected",
    [
        ({}, [True, True, True, True]),
        ({"decoder_sparse_step": 2}, [False, True, False, True]),
        ({"mlp_only_layers": [1, 2]}, [True, False, False, True]),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1]}, [False] * 3 + [True]),
    ],
)
def test_sparse_layers(change, expected):
    config = Qwen3Config.from_hf(SMALL_MOE | {"num_hidden_layers": 4} | change)
    assert [config.is_sparse(layer) for layer in range(4)] == expected
    dense = Qwen3Config.from_hf(SMALL)
    assert not dense.is_sparse(0)

"""What `config.json` says about a Qwen3 model, dense or mixture of experts."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from ..nn._rope import RopeParameters
from ._fields import ConfigError, Fields


# Hugging Face's name of each activation function, and ours.
ACTIVATIONS: dict[str, Literal["silu", "gelu", "gelu_tanh"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
}

_ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}
# Far above any model, low enough to build without noticing.
_MAX_LAYERS = 4096
_MAX_EXPERTS = 65536
_DENSE_HEAD_DIM = 128  # what Hugging Face assumes for model_type qwen3

# Fields that have one supported value; null counts as absent.
_FIXED = {
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "partial_rotary_factor": 1.0,
    "pruned_heads": {},
    "use_sliding_window": False,
}

# Fields that do not change what the model computes: training, bookkeeping, defaults of
# generation. The sliding window is here because `use_sliding_window` must be false.
_WITHOUT_EFFECT = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _name_or_path attention_dropout
    bad_words_ids begin_suppress_tokens chunk_size_feed_forward
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype
    early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty
    finetuning_task forced_bos_token_id forced_eos_token_id id2label initializer_range
    is_decoder label2id length_penalty max_length max_window_layers min_length
    name_or_path no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_attentions output_hidden_states output_router_logits output_scores
    pad_token_id prefix problem_type quantization_config remove_invalid_values
    repetition_penalty return_dict return_dict_in_generate router_aux_loss_coef
    sep_token_id sliding_window suppress_tokens task_specific_params temperature
    tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype
    torchscript transformers_version typical_p unsloth_fixed unsloth_version
    use_bfloat16 use_cache
    """.split()
)

_ROPE_FIELDS = {
    "default": {"rope_type", "type", "rope_theta", "partial_rotary_factor"},
    "linear": {"factor"},
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    },
}


@dataclasses.dataclass(frozen=True)
class Qwen3Config:
    """Hyperparameters of a Qwen3 model, named as in Hugging Face's `config.json`.

    Attributes:
        vocab_size: Rows of the embedding, and logits per token.
        hidden_size: Channels of the residual stream.
        intermediate_size: Channels inside a dense MLP.
        num_hidden_layers: Decoder layers.
        num_attention_heads: Query heads.
        num_key_value_heads: Key and value heads; divides the query heads.
        head_dim: Channels of a head. Independent of `hidden_size`.
        rms_norm_eps: Added to the mean square in every norm.
        max_position_embeddings: Longest sequence without rope scaling.
        rope: Rotary embedding and its scaling.
        hidden_act: Activation function of the MLPs, by Hugging Face's name.
        attention_bias: Whether the four projections of attention have biases.
        tie_word_embeddings: Whether the embedding is also the output projection.
        bos_token_id: Token that begins a text, if the model has one.
        eos_token_id: Tokens that end a text. Empty if the config names none.
        num_experts: Experts per sparse layer; 0 for a dense model.
        num_experts_per_tok: Experts that each token is routed to.
        moe_intermediate_size: Channels inside an expert.
        norm_topk_prob: Whether the weights of a token's experts are scaled to sum to 1.
        decoder_sparse_step: Every how many layers one is sparse.
        mlp_only_layers: Indices of layers that are dense nevertheless.

    Raises:
        ConfigError: If the values contradict each other; the message names the field.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeParameters
    hidden_act: str = "silu"
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()

    def __post_init__(self):
        if self.num_attention_heads % self.num_key_value_heads != 0:
            raise ConfigError(
                "num_key_value_heads must divide num_attention_heads, got "
                f"{self.num_key_value_heads} and {self.num_attention_heads}."
            )
        if self.head_dim % 2 != 0:
            raise ConfigError(
                f"head_dim must be even to be rotated, got {self.head_dim}."
            )
        if self.hidden_act not in ACTIVATIONS:
            raise ConfigError(
                f"hidden_act must be one of {sorted(ACTIVATIONS)}, got "
                f"{self.hidden_act!r}."
            )
        if self.num_experts_per_tok > self.num_experts:
            raise ConfigError(
                "num_experts_per_tok must not exceed num_experts, got "
                f"{self.num_experts_per_tok} and {self.num_experts}."
            )
        for layer in self.mlp_only_layers:
            if layer >= self.num_hidden_layers:
                raise ConfigError(
                    "mlp_only_layers must hold indices below num_hidden_layers="
                    f"{self.num_hidden_layers}, got {layer}."
                )
        for name, tokens in (
            ("bos_token_id", () if self.bos_token_id is None else (self.bos_token_id,)),
            ("eos_token_id", self.eos_token_id),
        ):
            for token in tokens:
                if token >= self.vocab_size:
                    raise ConfigError(
                        f"{name} must be below vocab_size={self.vocab_size}, got "
                        f"{token}."
                    )

    @property
    def max_length(self) -> int:
        """Most tokens that a sequence may have.

        `max_position_embeddings`, which linear scaling has in it already; yarn
        stretches the original length by its factor.
        """
        if self.rope.rope_type != "yarn":
            return self.max_position_embeddings
        stretched = self.rope.original_max_position_embeddings * self.rope.factor
        return max(self.max_position_embeddings, int(stretched))

    def is_sparse(self, layer: int) -> bool:
        """Returns whether the layer of this index has experts."""
        return (
            self.num_experts > 0
            and layer not in self.mlp_only_layers
            and (layer + 1) % self.decoder_sparse_step == 0
        )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Qwen3Config":
        """Reads the contents of a `config.json`.

        Both the spelling of transformers 4 (`rope_theta`, `rope_scaling`,
        `num_experts`) and that of transformers 5 (`rope_parameters`,
        `num_local_experts`) are understood. Nothing is ignored that could change what
        the model computes.

        Args:
            config: The parsed JSON object, of `model_type` qwen3 or qwen3_moe.

        Raises:
            ConfigError: If a field is missing, has the wrong type, or a value that is
                not supported, or is not known at all. One line that names the field.
        """
        fields = Fields(config)
        model_type = fields.choice("model_type", tuple(_ARCHITECTURES))
        for name in fields.strings("architectures") or ():
            if name != _ARCHITECTURES[model_type]:
                raise ConfigError(
                    f"architectures must be {_ARCHITECTURES[model_type]!r} for "
                    f"model_type {model_type!r}, got {name!r}."
                )
        for name, value in _FIXED.items():
            fields.fixed(name, value)
        sizes = _read_sizes(fields, model_type)
        _check_layer_types(fields, sizes["num_hidden_layers"])
        moe = _read_moe(fields) if model_type == "qwen3_moe" else {}
        result = cls(
            **sizes,
            **moe,
            rms_norm_eps=fields.number("rms_norm_eps", above=0.0),
            rope=_read_rope(fields, sizes["max_position_embeddings"]),
            hidden_act=fields.choice("hidden_act", tuple(ACTIVATIONS), default="silu"),
            attention_bias=fields.boolean("attention_bias", default=False),
            tie_word_embeddings=fields.boolean("tie_word_embeddings", default=False),
            bos_token_id=fields.integer("bos_token_id", default=None, minimum=0),
            eos_token_id=fields.integers("eos_token_id"),
        )
        fields.refuse_unread(_WITHOUT_EFFECT, f"for model_type {model_type!r}")
        return result


def _read_sizes(fields: Fields, model_type: str) -> dict[str, int]:
    hidden_size = fields.integer("hidden_size")
    num_heads = fields.integer("num_attention_heads")
    # The two model types disagree about a missing head_dim in Hugging Face too.
    head_dim = _DENSE_HEAD_DIM
    if model_type == "qwen3_moe" and "head_dim" not in fields:
        head_dim = hidden_size // num_heads
        if hidden_size % num_heads != 0:
            raise ConfigError(
                "head_dim is missing, and hidden_size is not a multiple of "
                f"num_attention_heads, got {hidden_size} and {num_heads}."
            )
    kv_heads = "num_key_value_heads"
    return {
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": fields.integer("intermediate_size"),
        "num_hidden_layers": fields.integer("num_hidden_layers", maximum=_MAX_LAYERS),
        "num_attention_heads": num_heads,
        kv_heads: num_heads if fields.is_null(kv_heads) else fields.integer(kv_heads),
        "head_dim": fields.integer("head_dim", default=head_dim),
        "max_position_embeddings": fields.integer("max_position_embeddings"),
    }


def _read_moe(fields: Fields) -> dict[str, Any]:
    names = [name for name in ("num_experts", "num_local_experts") if name in fields]
    counts = [
        fields.integer(name, maximum=_MAX_EXPERTS) for name in names or ["num_experts"]
    ]
    if len(set(counts)) > 1:
        raise ConfigError(
            "num_experts and num_local_experts must agree, got "
            f"{counts[0]} and {counts[1]}."
        )
    return {
        "num_experts": counts[0],
        "num_experts_per_tok": fields.integer("num_experts_per_tok"),
        "moe_intermediate_size": fields.integer("moe_intermediate_size"),
        "norm_topk_prob": fields.boolean("norm_topk_prob"),
        "decoder_sparse_step": fields.integer("decoder_sparse_step", default=1),
        "mlp_only_layers": fields.integers("mlp_only_layers"),
    }


def _check_layer_types(fields: Fields, num_layers: int) -> None:
    layer_types = fields.strings("layer_types")
    if layer_types is None:
        return
    if len(layer_types) != num_layers:
        raise ConfigError(
            f"layer_types must have num_hidden_layers={num_layers} entries, got "
            f"{len(layer_types)}."
        )
    for name in layer_types:
        if name != "full_attention":
            raise ConfigError(
                f"layer_types must all be 'full_attention', got {name!r}, which is "
                "not supported."
            )


def _read_rope(fields: Fields, max_position_embeddings: int) -> RopeParameters:
    theta = fields.number("rope_theta", default=None, above=1.0)
    new, old = fields.nested("rope_parameters"), fields.nested("rope_scaling")
    if new and old and new.values != old.values:
        raise ConfigError("rope_parameters and rope_scaling contradict each other.")
    rope = new or old or fields.empty("rope_parameters")
    rope_type = _rope_type(rope)
    inner = rope.number("rope_theta", default=None, above=1.0)
    if inner is None and theta is None:
        raise ConfigError("rope_theta is missing.")
    if None not in (inner, theta) and inner != theta:
        raise ConfigError(
            f"rope_theta must agree with {rope.name('rope_theta')}, got {theta} and "
            f"{inner}."
        )
    rope.fixed("partial_rotary_factor", 1.0)
    known = _ROPE_FIELDS["default"] | _ROPE_FIELDS[rope_type]
    unknown = sorted(set(rope.values) - known)
    if unknown:
        raise ConfigError(
            f"{rope.name(unknown[0])} is not supported for rope_type {rope_type!r}."
        )
    result = {"rope_theta": theta if inner is None else inner, "rope_type": rope_type}
    if rope_type != "default":
        result["factor"] = rope.number("factor", minimum=1.0)
    if rope_type == "yarn":
        result |= _read_yarn(rope, max_position_embeddings)
    return RopeParameters(**result)


def _rope_type(rope: Fields) -> str:
    supported = tuple(_ROPE_FIELDS)
    default = rope.choice("type", supported, default="default")
    rope_type = rope.choice("rope_type", supported, default=default)
    if "type" in rope and rope_type != default:
        raise ConfigError(
            f"{rope.name('rope_type')} and {rope.name('type')} contradict each other, "
            f"got {rope_type!r} and {default!r}."
        )
    return rope_type


def _read_yarn(rope: Fields, max_position_embeddings: int) -> dict[str, Any]:
    fast = rope.number("beta_fast", default=32.0, above=0.0)
    slow = rope.number("beta_slow", default=1.0, above=0.0)
    if fast <= slow:
        raise ConfigError(
            f"{rope.name('beta_fast')} must exceed beta_slow, got {fast} and {slow}."
        )
    return {
        "original_max_position_embeddings": rope.integer(
            "original_max_position_embeddings", default=max_position_embeddings
        ),
        "attention_factor": rope.number("attention_factor", default=None, above=0.0),
        "beta_fast": fast,
        "beta_slow": slow,
        "mscale": rope.number("mscale", default=None, minimum=0.0),
        "mscale_all_dim": rope.number("mscale_all_dim", default=None, minimum=0.0),
        "truncate": rope.boolean("truncate", default=True),
    }

"""Qwen3 against Hugging Face's implementation, in float32 on random small models."""

import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmx8 import dequantize, MXArray
from jmx8.models import Qwen3, qwen3_nnx, Qwen3Config
from jmx8.nn import Experts, MXExperts, MXLinear
from tests.hf import DENSE, from_hf, hf_logits, MOE, random_hf_model


PROMPT_LENGTHS = (5, 11, 8)
PADDED_LENGTH = 12
NUM_DECODE_STEPS = 16
CAPACITY = 32

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
ONE_LAYER = {"num_hidden_layers": 1}
MODELS = {
    "dense": DENSE,
    "dense_tied_wide_heads": DENSE
    | ONE_LAYER
    | {"tie_word_embeddings": True, "head_dim": 24},
    "dense_bias_one_kv_head": DENSE
    | ONE_LAYER
    | {"attention_bias": True, "num_key_value_heads": 1, "rms_norm_eps": 0.1},
    "dense_linear_rope_all_kv_heads": DENSE
    | ONE_LAYER
    | {
        "num_key_value_heads": 4,
        "hidden_act": "gelu_pytorch_tanh",
        "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
    },
    "dense_yarn": DENSE | ONE_LAYER | {"rope_parameters": YARN},
    "moe": MOE,
    "moe_no_norm_tied": MOE
    | ONE_LAYER
    | {"norm_topk_prob": False, "tie_word_embeddings": True},
    "moe_mlp_only_layers_top_1": MOE
    | {"mlp_only_layers": [1], "num_experts_per_tok": 1, "norm_topk_prob": False},
    "moe_sparse_step_narrow_heads": MOE
    | {"decoder_sparse_step": 2, "head_dim": 8, "hidden_act": "gelu"},
    "moe_all_experts_yarn_bias": MOE
    | ONE_LAYER
    | {"num_experts_per_tok": 8, "rope_parameters": YARN, "attention_bias": True},
}

prefill = eqx.filter_jit(lambda model, *args, **kwargs: model(*args, **kwargs))


@functools.cache
def _pair(name: str):
    hf_model = random_hf_model(**MODELS[name])
    return hf_model, from_hf(hf_model)


def _texts() -> list[list[int]]:
    rng = np.random.default_rng(1)
    length = lambda prompt: prompt + NUM_DECODE_STEPS
    return [rng.integers(0, 97, length(n)).tolist() for n in PROMPT_LENGTHS]


def _padded_prompts(texts) -> jax.Array:
    """Returns the prompts, padded on the right with tokens that also occur in them."""
    tokens = np.full((len(texts), PADDED_LENGTH), 3, np.int32)
    for row, (text, length) in enumerate(zip(texts, PROMPT_LENGTHS, strict=True)):
        tokens[row, :length] = text[:length]
    return jnp.asarray(tokens)


def _assert_parity(actual, expected):
    assert actual.shape == expected.shape
    error = np.max(np.abs(np.asarray(actual) - expected)) / np.ptp(expected)
    assert error <= 1e-4, f"max |Δlogit| is {error:.1e} of the logit range"


@pytest.mark.parametrize(
    ("name", "framework"),
    [*((name, "equinox") for name in MODELS), ("dense", "nnx"), ("moe", "nnx")],
)
def test_ragged_prefill_and_cached_decode_match_hugging_face(name, framework):
    hf_model, model = _pair(name)
    if framework == "nnx":
        model = qwen3_nnx.Qwen3(model)
    texts = _texts()
    expected = [hf_logits(hf_model, text) for text in texts]
    lengths = jnp.array(PROMPT_LENGTHS)
    cache = model.init_cache(len(texts), CAPACITY)
    logits, cache = prefill(model, _padded_prompts(texts), cache, lengths=lengths)
    for row, length in enumerate(PROMPT_LENGTHS):
        _assert_parity(logits[row, :length], expected[row][:length])
    for step in range(NUM_DECODE_STEPS):
        at = [length + step for length in PROMPT_LENGTHS]
        tokens = jnp.array([[text[i]] for text, i in zip(texts, at, strict=True)])
        logits, cache = prefill(model, tokens, cache, last_only=True)
        for row, i in enumerate(at):
            _assert_parity(logits[row], expected[row][i])
    assert cache.lengths.tolist() == [n + NUM_DECODE_STEPS for n in PROMPT_LENGTHS]


def test_forward_without_cache_matches_hugging_face():
    hf_model, model = _pair("moe")
    text = _texts()[1]
    logits, cache = prefill(model, jnp.array([text]))
    assert cache is None
    assert logits.dtype == jnp.float32
    _assert_parity(logits[0], hf_logits(hf_model, text))


def test_prompts_in_pieces_match_hugging_face():
    hf_model, model = _pair("dense")
    texts = _texts()
    cache = model.init_cache(len(texts), CAPACITY)
    start = [0] * len(texts)
    for lengths in (PROMPT_LENGTHS, (10, 1, 12)):
        end = [i + n for i, n in zip(start, lengths, strict=True)]
        tokens = np.zeros((len(texts), PADDED_LENGTH), np.int32)
        for row, text in enumerate(texts):
            tokens[row, : lengths[row]] = text[start[row] : end[row]]
        logits, cache = prefill(
            model, jnp.asarray(tokens), cache, lengths=jnp.array(lengths)
        )
        for row, text in enumerate(texts):
            expected = hf_logits(hf_model, text[: end[row]])[start[row] :]
            _assert_parity(logits[row, : lengths[row]], expected)
        start = end


def test_what_the_padding_is_does_not_matter():
    _, model = _pair("moe")
    tokens, lengths = _padded_prompts(_texts()), jnp.array(PROMPT_LENGTHS)
    is_padding = jnp.arange(PADDED_LENGTH)[None, :] >= lengths[:, None]
    following = jnp.array([[1], [2], [3]])
    outputs = []
    for padding in (3, 96):
        padded = jnp.where(is_padding, padding, tokens)
        cache = model.init_cache(3, CAPACITY)
        _, cache = prefill(model, padded, cache, lengths=lengths)
        outputs.append(prefill(model, following, cache, last_only=True)[0])
    np.testing.assert_array_equal(*outputs)


def test_last_only_picks_the_last_real_token():
    _, model = _pair("dense")
    tokens, lengths = _padded_prompts(_texts()), jnp.array(PROMPT_LENGTHS)

    @eqx.filter_jit
    def forward(model):
        every, _ = model(tokens)
        last, _ = model(tokens, lengths=lengths, last_only=True)
        last_of_all, _ = model(tokens, last_only=True)
        return every, last, last_of_all

    every, last, last_of_all = forward(model)
    np.testing.assert_allclose(last, every[jnp.arange(3), lengths - 1], atol=1e-5)
    np.testing.assert_allclose(last_of_all, every[:, -1], atol=1e-5)


def test_full_row_is_not_overwritten():
    # Under jit the lengths are unknown, so a token too many cannot be refused. It must
    # not end up in the place of another.
    _, model = _pair("dense")
    cache = model.init_cache(3, CAPACITY)
    cache = dataclasses.replace(cache, lengths=jnp.array([CAPACITY, 3, CAPACITY + 1]))
    _, after = prefill(model, jnp.ones((3, 1), jnp.int32), cache, last_only=True)
    for keys in after.keys + after.values:
        occupied = np.any(np.asarray(keys) != 0, axis=(2, 3))
        assert np.argwhere(occupied).tolist() == [[1, 3]]


def test_cache_that_cannot_hold_the_tokens_is_refused():
    _, model = _pair("dense")
    tokens = jnp.ones((2, 5), jnp.int32)
    cache = model.init_cache(2, 4)
    message = r"room for 5 tokens in each row, got capacity 4"
    with pytest.raises(ValueError, match=message):
        model(tokens, cache)
    with pytest.raises(ValueError, match=message):
        prefill(model, tokens, cache)
    cache = dataclasses.replace(cache, lengths=jnp.array([0, 3]))
    with pytest.raises(ValueError, match=message):
        model(tokens[:, :2], cache)
    with pytest.raises(ValueError, match="got 1 rows and a cache for 2"):
        prefill(model, tokens[:1, :1], cache)


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_bfloat16_model_computes_in_bfloat16(name):
    hf_model, model = _pair(name)
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)
    text = _texts()[0]
    cache = narrow.init_cache(1, CAPACITY)
    logits, cache = prefill(narrow, jnp.array([text]), cache)
    assert logits.dtype == jnp.float32
    assert {x.dtype for x in cache.keys + cache.values} == {jnp.dtype(jnp.bfloat16)}
    expected = hf_logits(hf_model, text)
    assert np.corrcoef(np.ravel(logits), np.ravel(expected))[0, 1] > 0.99
    # Logits are not multiples of a bfloat16 step.
    assert np.any(np.asarray(logits) != np.asarray(logits.astype(jnp.bfloat16), "f4"))


@pytest.mark.parametrize("name", ["dense_tied_wide_heads", "moe_mlp_only_layers_top_1"])
def test_abstract_model_has_the_same_tree(name):
    _, model = _pair(name)
    build = functools.partial(Qwen3, model.config, key=jax.random.key(0))
    abstract = eqx.filter_eval_shape(build, dtype=jnp.float32)
    shape = lambda x: (x.shape, x.dtype)
    assert jax.tree.map(shape, abstract) == jax.tree.map(shape, model)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(abstract))
    default = eqx.filter_eval_shape(build)
    assert {x.dtype for x in jax.tree.leaves(default)} == {jnp.dtype(jnp.bfloat16)}


def test_random_model_is_nearly_indifferent():
    config = Qwen3Config.from_hf(
        DENSE | ONE_LAYER | {"model_type": "qwen3", "tie_word_embeddings": True}
    )
    model = Qwen3(config, dtype=jnp.float32, key=jax.random.key(0))
    logits, _ = prefill(model, jnp.array([[1, 2, 3]]))
    # As at the start of training: a loss close to that of a uniform distribution.
    entropy = -jnp.sum(jax.nn.softmax(logits) * jax.nn.log_softmax(logits), axis=-1)
    np.testing.assert_allclose(entropy, np.log(97), rtol=0.05)


def test_paths_are_those_of_a_checkpoint():
    _, model = _pair("moe_mlp_only_layers_top_1")
    leaves = jax.tree.leaves_with_path(model)
    paths = {jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in leaves}
    assert "embed_tokens/weight" in paths and "lm_head/weight" in paths
    assert "norm/weight" in paths
    layer = {path[len("layers/0/") :] for path in paths if path.startswith("layers/0/")}
    assert layer == {
        "input_layernorm/weight",
        "self_attn/q_proj/weight",
        "self_attn/k_proj/weight",
        "self_attn/v_proj/weight",
        "self_attn/o_proj/weight",
        "self_attn/q_norm/weight",
        "self_attn/k_norm/weight",
        "post_attention_layernorm/weight",
        "mlp/gate/weight",
        "mlp/experts/w13",
        "mlp/experts/w2",
    }
    assert {"layers/1/mlp/gate_proj/weight", "layers/1/mlp/down_proj/weight"} <= paths


@eqx.filter_jit
def _swap_modules(model: Qwen3, activations) -> Qwen3:
    """Returns the model with every linear layer and all experts in MXFP8."""
    convertible = lambda x: isinstance(x, eqx.nn.Linear | Experts)

    def convert(path, x):
        if isinstance(x, Experts):
            return MXExperts.from_experts(x, activations=activations)
        is_router = path[-1].name == "gate" if path else False
        if isinstance(x, eqx.nn.Linear) and not is_router:
            return MXLinear.from_linear(x, activations=activations)
        return x

    return jax.tree.map_with_path(convert, model, is_leaf=convertible)


SMALL = {
    "dense": DENSE | ONE_LAYER,
    "moe": MOE | ONE_LAYER | {"attention_bias": True},
}


@functools.cache
def _small(kind: str, activations) -> tuple[Qwen3, Qwen3]:
    """Returns a model, and the same in MXFP8."""
    model = from_hf(random_hf_model(**SMALL[kind]))
    return model, _swap_modules(model, activations)


@eqx.filter_jit
def _prefill_and_decode(model: Qwen3) -> jax.Array:
    tokens, lengths = _padded_prompts(_texts()), jnp.array(PROMPT_LENGTHS)
    cache = model.init_cache(3, CAPACITY)
    first, cache = model(tokens, cache, lengths=lengths, last_only=True)
    second, _ = model(tokens[:, :1], cache, last_only=True)
    return jnp.stack([first, second])


@pytest.mark.parametrize("kind", SMALL)
def test_mxfp8_layers_compute_what_their_widened_weights_do(kind):
    model, swapped = _small(kind, "bf16")
    is_mx = lambda x: isinstance(x, MXArray)
    leaves = jax.tree.leaves(swapped, is_leaf=is_mx)
    assert sum(map(is_mx, leaves)) == {"dense": 8, "moe": 7}[kind]
    widen = lambda x: dequantize(x) if is_mx(x) else x
    values = eqx.filter_jit(lambda xs: list(map(widen, xs)))(leaves)
    widened = jax.tree.unflatten(jax.tree.structure(model), values)
    expected = np.asarray(_prefill_and_decode(widened))
    _assert_parity(_prefill_and_decode(swapped), expected)


def test_mxfp8_activations_stay_close():
    w8a16, w8a8 = (
        np.ravel(_prefill_and_decode(_small("moe", activations)[1]))
        for activations in ("bf16", "mxfp8")
    )
    assert np.any(w8a16 != w8a8)
    assert np.corrcoef(w8a16, w8a8)[0, 1] > 0.98


def test_config_is_kept_out_of_the_leaves():
    _, model = _pair("dense")
    assert isinstance(model.config, Qwen3Config)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(model))

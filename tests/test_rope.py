import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.models.qwen3.modeling_qwen3 import (
    apply_rotary_pos_emb,
    Qwen3RotaryEmbedding,
)

from jmx8.models import Qwen3Config
from jmx8.nn._norm import RMSNorm
from jmx8.nn._rope import apply_rope, rope_frequencies, rope_tables, RopeParameters


ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
    },
    "yarn_short": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 40,
        "beta_fast": 4,
        "beta_slow": 0.5,
    },
    "yarn_attention_factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 4096,
        "attention_factor": 0.7,
    },
    "yarn_mscale": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
        "truncate": False,
    },
    "yarn_factor_1": {
        "rope_type": "yarn",
        "factor": 1.0,
        "original_max_position_embeddings": 4096,
    },
}


def _both(name: str, head_dim: int, theta: float):
    """Returns Hugging Face's embedding, and ours read from its config."""
    config = transformers.Qwen3Config(
        head_dim=head_dim, rope_parameters={"rope_theta": theta, **ROPES[name]}
    )
    ours = Qwen3Config.from_hf(config.to_dict())
    return Qwen3RotaryEmbedding(config), ours.rope


@pytest.mark.parametrize("head_dim", [2, 16, 80, 128])
@pytest.mark.parametrize("theta", [10000.0, 1000000.0])
@pytest.mark.parametrize("name", ROPES)
def test_frequencies_are_those_of_hugging_face(name, theta, head_dim):
    expected, rope = _both(name, head_dim, theta)
    frequencies, attention_factor = rope_frequencies(rope, head_dim)
    assert frequencies.dtype == np.float32
    # torch rounds to float32 at each step, and yarn's ramp subtracts from 1; we round
    # once. So the error is relative to the frequency before it is scaled.
    unscaled = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    error = np.abs(frequencies - expected.inv_freq.numpy().astype(np.float64))
    assert np.all(error <= 4 * np.finfo(np.float32).eps * unscaled)
    assert attention_factor == pytest.approx(expected.attention_scaling, rel=1e-12)


@pytest.mark.parametrize("name", ["default", "linear", "yarn_short"])
def test_rotation_is_that_of_hugging_face(name):
    embedding, rope = _both(name, 16, 10000.0)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 3, 16)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 4], [7, 8, 9, 10, 11]], np.int32)
    cos, sin = embedding(torch.tensor(x), torch.tensor(positions))
    expected, _ = apply_rotary_pos_emb(
        torch.tensor(x), torch.tensor(x), cos, sin, unsqueeze_dim=2
    )
    tables = rope_tables(rope, 16, jnp.asarray(positions))
    actual = apply_rope(jnp.asarray(x), *tables)
    np.testing.assert_allclose(actual, expected.numpy(), atol=2e-6)


def test_scores_depend_on_the_distance_only():
    key_q, key_k = jax.random.split(jax.random.key(0))
    q = jax.random.normal(key_q, (1, 1, 1, 32))
    k = jax.random.normal(key_k, (1, 1, 1, 32))
    rope = RopeParameters(10000.0)

    def score(position_q, position_k):
        at = lambda p: rope_tables(rope, 32, jnp.array([[p]]))
        return jnp.sum(apply_rope(q, *at(position_q)) * apply_rope(k, *at(position_k)))

    np.testing.assert_allclose(score(5, 2), score(45, 42), rtol=1e-4)
    assert abs(score(5, 2) - score(5, 4)) > 0.1


def test_bfloat16_is_rotated_in_float32():
    rope = RopeParameters(10000.0)
    tables = rope_tables(rope, 16, jnp.arange(900, 910)[None])
    x = jax.random.normal(jax.random.key(0), (1, 10, 2, 16), jnp.bfloat16)
    actual = apply_rope(x, *tables)
    assert actual.dtype == jnp.bfloat16
    expected = apply_rope(x.astype(jnp.float32), *tables).astype(jnp.bfloat16)
    np.testing.assert_array_equal(
        actual.astype(jnp.float32), expected.astype(jnp.float32)
    )


def test_parameters_are_hashable():
    rope = RopeParameters(10000.0)
    assert hash(rope) == hash(dataclasses.replace(rope))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rms_norm(dtype):
    x = jax.random.normal(jax.random.key(0), (3, 4, 32), dtype) * 5
    norm = RMSNorm(32, eps=0.1, dtype=dtype)
    scale = jnp.linspace(0.5, 2, 32).astype(dtype)
    norm = jax.tree.map(lambda _: scale, norm)
    x64 = np.asarray(x, np.float64)
    expected = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 0.1)
    expected *= np.asarray(scale, np.float64)
    out = norm(x)
    assert out.dtype == dtype
    # Rounded after the division and after the product.
    tolerance = 2.1 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=tolerance)
    np.testing.assert_array_equal(
        np.asarray(jax.vmap(jax.vmap(norm))(x), np.float32), np.asarray(out, np.float32)
    )

"""`trtllm_fp8_block_scale_moe` in numpy: routing and experts, in float64 but for what
it rounds. Written from the description of the kernel."""

import jax.numpy as jnp
import numpy as np

from .helpers import model_quantize


def to_bf16(a):
    return np.asarray(a, np.float32).astype(jnp.bfloat16).astype(np.float64)


def through_mxfp8(a):
    codes, scales = model_quantize(a)
    elements = codes.view(jnp.float8_e4m3fn).astype(np.float64)
    return elements * np.repeat(2.0 ** (scales.astype(np.float64) - 127), 32, axis=-1)


def softmax(a):
    powers = np.exp(a - np.max(a))
    return powers / np.sum(powers)


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def best(choice, k):
    return np.argsort(-choice, kind="stable")[:k]


def keep_best_groups(choice, groups, kept):
    grouped = choice.reshape(groups, -1)
    totals = np.sum(-np.sort(-grouped, axis=1)[:, :2], axis=1)
    out = np.full_like(grouped, -np.inf)
    chosen = best(totals, kept)
    out[chosen] = grouped[chosen]
    return out.reshape(-1)


def apply_experts(x, w13, w2, b13, b2, ids, weights, activate):
    """Returns the layer's float64 sums for one token `x` that was quantized."""
    out = np.zeros(w2.shape[1])
    for e, weight in zip(ids, weights, strict=True):
        if 0 <= e < w2.shape[0]:  # not of another shard
            h = through_mxfp8(activate(w13[e] @ x + b13[e])[None])[0]
            out += to_bf16(weight) * to_bf16(w2[e] @ h + b2[e])
    return out


def silu_gated(h):
    gate, up = np.split(h, 2)
    return gate * sigmoid(gate) * up


def assert_close(out, expected):
    """Sums in another order may round to the next value; nothing else may differ."""
    out, expected = (np.asarray(a, np.float64) for a in (out, expected))
    ulp = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(expected), 2.0**-9))) - 7)
    assert np.all(np.abs(out - expected) <= 2 * ulp)
    assert np.sum(out != to_bf16(expected)) <= 0.1 * out.size

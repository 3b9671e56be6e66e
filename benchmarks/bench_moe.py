"""Times the XLA MoE layer against `lax.ragged_dot`, the peer that JAX users have.

The default shape is a layer of Qwen3-30B-A3B. Both sides get the same routing result
and do the same work from it: gather, two grouped matmuls, activation, weighted sum.
Several layers with their own weights are computed per call, so that weights come from
memory. The floor is the larger of the bytes of the experts in use over the measured
copy bandwidth and the arithmetic over the measured rate of a bfloat16 matmul.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
from _timing import (
    copy_bandwidth,
    describe_run,
    markdown_table,
    matmul_rate,
    median_seconds,
)

from jmx8 import dequantize, mx_moe, mx_moe_w8a8, quantize, route


def ragged_moe(x, w13, w2, ids, weights):
    """The layer through `lax.ragged_dot`; weights `[e, k, n]`."""
    top_k, experts = ids.shape[1], ids.reshape(-1)
    order = jnp.argsort(experts)
    tokens = order // top_k
    sizes = jnp.bincount(experts, length=w13.shape[0]).astype(jnp.int32)
    h = jax.lax.ragged_dot(x[tokens], w13, sizes)
    gate, up = jnp.split(h, 2, axis=-1)
    out = jax.lax.ragged_dot(jax.nn.silu(gate) * up, w2, sizes)
    out = out * weights.reshape(-1)[order][:, None].astype(x.dtype)
    return jnp.zeros_like(x).at[tokens].add(out)


def time_layers(layer, x, layers, ids, weights, calls):
    """Returns seconds per layer of a call that computes all of `layers`."""
    run = jax.jit(lambda x, layers, i, w: [layer(x, *pair, i, w) for pair in layers])
    seconds = median_seconds(run, x, layers, ids, weights, calls=calls, rounds=5)
    return seconds / len(layers)


def check(x, layers, ids, weights):
    """Compares with the sum over tokens written out, in float64, for a few tokens."""
    w13, w2 = (np.asarray(dequantize(w), np.float64) for w in layers)
    out = jax.jit(mx_moe)(x, *layers, ids, weights)
    for t in range(min(4, x.shape[0])):
        row = np.asarray(x[t], np.float64)
        exact = np.zeros_like(row)
        for e, weight in zip(np.asarray(ids[t]), np.asarray(weights[t]), strict=True):
            gate, up = np.split(w13[e] @ row, 2)
            exact += weight * (w2[e] @ (gate / (1 + np.exp(-gate)) * up))
        error = np.linalg.norm(np.asarray(out[t], np.float64) - exact)
        assert error <= 1e-2 * np.linalg.norm(exact), f"wrong result: {error}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=768)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[1, 16, 128, 1024, 8192]
    )
    args = parser.parse_args()
    e, h, i = args.experts, args.hidden, args.intermediate
    on_gpu = jax.devices()[0].platform == "gpu"
    copy = copy_bandwidth(1 << (30 if on_gpu else 26))
    rate = matmul_rate(8192 if on_gpu else 1024)
    print(
        f"{describe_run()}\n\n{e} experts, top-{args.top_k}, hidden {h}, intermediate "
        f"{i}; copy {copy / 1e12:.3f} TB/s, bf16 matmul {rate / 1e12:.1f} TFLOP/s\n"
    )
    keys = jax.random.split(jax.random.key(0), 2 * args.layers + 1)
    normal = functools.partial(jax.random.normal, dtype=jnp.bfloat16)
    pairs = [
        (normal(k13, (e, 2 * i, h)) * 0.02, normal(k2, (e, h, i)) * 0.02)
        for k13, k2 in zip(keys[::2], keys[1::2], strict=False)
    ]
    mx_pairs = jax.tree.map(jax.jit(quantize), pairs)
    ragged_pairs = jax.tree.map(lambda w: jnp.swapaxes(w, 1, 2), pairs)
    rows = []
    for t in args.tokens:
        x = normal(keys[-1], (t, h))
        logits = jax.random.normal(keys[-1], (t, e))
        ids, weights = route(logits, "softmax", args.top_k)
        check(x, mx_pairs[0], ids, weights)
        calls = 2 if t > 1000 or not on_gpu else 10
        timed = lambda layer, layers: (
            time_layers(layer, x, layers, ids, weights, calls) * 1e6  # noqa: B023
        )
        ragged = timed(ragged_moe, ragged_pairs)
        w8a16, w8a8 = timed(mx_moe, mx_pairs), timed(mx_moe_w8a8, mx_pairs)
        bf16 = timed(mx_moe, pairs)
        active = np.unique(np.asarray(ids)).size
        floor = 1e6 * max(
            active * 3 * h * i * 33 / 32 / copy,
            2 * t * args.top_k * 3 * h * i / rate,
        )
        rows.append(
            [f"{t:,}"]
            + [f"{us:,.0f}" for us in (ragged, bf16, w8a16, w8a8, floor)]
            + [f"{ragged / w8a16:.1f}x", f"{w8a16 / floor:.1f}x"]
        )
    header = ["tokens", "`lax.ragged_dot` bf16, µs", "`mx_moe` with bf16 weights"]
    header += ["`mx_moe` W8A16", "`mx_moe_w8a8`", "floor MXFP8"]
    header += ["W8A16 against ragged_dot", "W8A16 over floor"]
    print(markdown_table(header, rows))


if __name__ == "__main__":
    main()

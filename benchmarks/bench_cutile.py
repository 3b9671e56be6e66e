"""Times FlashInfer's cuTile kernels from JAX against what else runs W8A16 or bfloat16.

MoE: the shape of a layer of Qwen3-30B-A3B by default. Every side gets the same routing
results, a different one for each layer, and computes layer after layer, so that each
waits for the one before; weights come from memory, since one set after another is used.
Dense: several weight matrices that together exceed the cache; what the profiler counts.
The floor is the larger of the bytes of the experts in use over the measured copy
bandwidth and the arithmetic over the measured rate of a bfloat16 matmul.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
from _timing import (
    copy_bandwidth,
    describe_run,
    kernel_times,
    markdown_table,
    matmul_rate,
    median_seconds,
)
from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu
from tune_cutile import quantized

from jmx8 import dequantize, route
from jmx8.kernels import xla_matmul, xla_moe
from jmx8.kernels.cutile import dense, moe


OPTIONS = {"activation": "silu", "apply_router_weight_on_input": False}
DENSE_SHAPES = ((4096, 12288), (2048, 5120), (4096, 4096))


def cutile_moe(x, w13, w2, ids, weights):
    return moe.run(x, w13, w2, ids, weights, None, None, **OPTIONS)


def xla_backend(x, w13, w2, ids, weights):
    return xla_moe.moe(
        x, w13, w2, ids, weights, None, None, quantize_activations=False, **OPTIONS
    )


def pallas_moe(block_m, x, w13, w2, ids, weights):
    """The layer through Pallas' grouped matmul; bfloat16 weights `[e, k, n]`."""
    multiply = functools.partial(
        ragged_dot_mgpu.ragged_dot,
        block_m=block_m,
        block_n=128,
        block_k=64,
        max_concurrent_steps=4,
        grid_block_n=1,
    )
    top_k, experts = ids.shape[1], ids.reshape(-1)
    order = jnp.argsort(experts)
    tokens = order // top_k
    sizes = jnp.bincount(experts, length=w13.shape[0]).astype(jnp.int32)
    h = multiply(x[tokens], w13, group_sizes=sizes)
    gate, up = jnp.split(h, 2, axis=-1)
    h = (jax.nn.silu(gate) * up).astype(x.dtype)
    out = multiply(h, w2, group_sizes=sizes)
    out = out * weights.reshape(-1)[order][:, None].astype(out.dtype)
    return jnp.zeros_like(x).at[tokens].add(out.astype(x.dtype))


def time_layers(layer, x, sets, routed):
    """Returns µs per layer, timed twice, of a chain of layers that is jitted whole."""

    def chain(x, sets, routed):
        for i, (ids, weights) in enumerate(routed):
            x = layer(x, *sets[i % len(sets)], ids, weights)
        return x

    run = jax.jit(chain)
    timed = lambda: median_seconds(run, x, sets, routed, calls=5) / len(routed) * 1e6
    return timed(), timed()


def time_peer(layer, x, sets, routed):
    """As `time_layers`, once, with layers jitted one by one, which compiles sooner."""
    layer = jax.jit(layer)

    def chain(x):
        for pair, (ids, weights) in zip(sets, routed, strict=False):
            x = layer(x, *pair, ids, weights)
        return x

    return median_seconds(chain, x, calls=3) / len(sets) * 1e6


def relative_error(out, x, w13, w2, ids, weights):
    """Compares a few tokens with the sum over experts written out in float64.

    Ids of no expert count nothing.
    """
    out = np.asarray(out, np.float64)
    tokens = np.unique(np.linspace(0, x.shape[0] - 1, 8).astype(int))
    exact = np.zeros((tokens.size, x.shape[1]))
    widen = lambda w, e: np.asarray(
        dequantize(jax.tree.map(lambda a: a[e], w)), np.float64
    )
    for row, t in zip(exact, tokens, strict=True):
        token = np.asarray(x[t], np.float64)
        for e, weight in zip(np.asarray(ids[t]), np.asarray(weights[t]), strict=True):
            if not 0 <= e < w13.shape[0]:
                continue
            gate, up = np.split(widen(w13, e) @ token, 2)
            row += float(weight) * (widen(w2, e) @ (gate / (1 + np.exp(-gate)) * up))
    return np.linalg.norm(out[tokens] - exact) / np.linalg.norm(exact)


def bench_moe(args, copy, rate):
    e, h, i = args.experts, args.hidden, args.intermediate
    keys = jax.random.split(jax.random.key(0), (args.sets, 2))
    make = jax.jit(quantized, static_argnums=(1, 2, 3))
    sets = [(make(a, e, 2 * i, h), make(b, e, h, i)) for a, b in keys]
    widen = jax.jit(lambda w: jnp.swapaxes(dequantize(w, jnp.bfloat16), 1, 2))
    bf16 = [(widen(w13), widen(w2)) for w13, w2 in sets]
    rows = []
    for t in args.tokens:
        key = jax.random.key(t)
        x = jax.random.normal(key, (t, h), jnp.bfloat16)
        routed = [
            route(jax.random.normal(k, (t, e)), "softmax", args.top_k)
            for k in jax.random.split(key, 12 if t <= 256 else args.sets)
        ]
        out = jax.jit(cutile_moe)(x, *sets[0], *routed[0])
        error = relative_error(out, x, *sets[0], *routed[0])
        times = time_layers(cutile_moe, x, sets, routed)
        pallas = xla = None
        if t >= 16:  # with fewer it has no whole block of rows
            peer = functools.partial(pallas_moe, 64 if t <= 256 else 128)
            pallas = time_peer(peer, x, bf16, routed)
        if t in args.xla_tokens:
            xla = time_peer(xla_backend, x, sets, routed)
        active = np.mean([np.unique(np.asarray(ids)).size for ids, _ in routed])
        floor = 1e6 * max(
            active * 3 * h * i * 33 / 32 / copy,
            2 * t * args.top_k * 3 * h * i / rate,
        )
        us = min(times)
        rows.append(
            [
                f"{t:,}",
                f"{us:,.1f}",
                f"{max(times):,.1f}",
                "-" if pallas is None else f"{pallas:,.0f}",
                "-" if xla is None else f"{xla:,.0f}",
                f"{floor:,.0f}",
                f"{us / floor:.1f}x",
                "-" if pallas is None else f"{pallas / us:.2f}x",
                f"{error:.1e}",
            ]
        )
        print("#", *rows[-1], flush=True)
    header = ["tokens", "cuTile from JAX, µs", "timed again", "Pallas bf16"]
    header += ["XLA W8A16", "floor", "over floor", "Pallas over cuTile"]
    return markdown_table([*header, "error against float64"], rows)


def device_time(product, x, weights):
    """Returns µs of kernels per product."""
    run = jax.jit(lambda x, weights: [product(x, w) for w in weights])
    jax.block_until_ready(run(x, weights))
    events = kernel_times(
        lambda: jax.block_until_ready([run(x, weights) for _ in range(5)])
    )
    return sum(kernel.us for kernel in events) / (5 * len(weights))


def bench_dense(args):
    rows = []
    for k, n in DENSE_SHAPES:
        count = max(4, 1_500_000_000 // (n * k))
        make = jax.jit(quantized, static_argnums=(1, 2))
        weights = [
            make(key, n, k) for key in jax.random.split(jax.random.key(1), count)
        ]
        bf16 = [dequantize(w, jnp.bfloat16) for w in weights]
        for m in args.rows:
            x = jax.random.normal(jax.random.key(m), (m, k), jnp.bfloat16)
            options = {"out_dtype": jnp.bfloat16}
            out = jax.jit(functools.partial(dense.run, **options))(x, weights[0])
            exact = np.asarray(x, np.float64) @ np.asarray(bf16[0], np.float64).T
            error = np.linalg.norm(np.asarray(out, np.float64) - exact)
            times = [
                device_time(functools.partial(run, **options), x, w)
                for run, w in (
                    (dense.run, weights),
                    (xla_matmul.matmul, weights),
                    (lambda x, w, out_dtype: x @ w.T, bf16),
                )
            ]
            rows.append(
                [
                    f"{k} to {n}",
                    str(m),
                    *(f"{us:,.1f}" for us in times),
                    f"{times[1] / times[0]:.1f}x",
                    f"{times[2] / times[0]:.2f}x",
                    f"{error / np.linalg.norm(exact):.1e}",
                ]
            )
            print("#", *rows[-1], flush=True)
    header = ["k to n", "rows", "cuTile W8A16, µs", "XLA W8A16", "XLA bf16"]
    header += ["XLA W8A16 over cuTile", "bf16 over cuTile", "error"]
    return markdown_table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=768)
    parser.add_argument("--sets", type=int, default=3, help="sets of weights")
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="*",
        default=[1, 16, 64, 128, 256, 1024, 4096, 8192],
    )
    parser.add_argument(
        "--xla-tokens", type=int, nargs="*", default=[1, 128, 1024, 8192]
    )
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 16, 64, 256, 1024])
    args = parser.parse_args()
    copy = copy_bandwidth(1 << 30)
    rate = matmul_rate(8192)
    print(
        f"{describe_run()}\n\ncopy {copy / 1e12:.2f} TB/s, bf16 matmul "
        f"{rate / 1e12:.0f} TFLOP/s\n",
        flush=True,
    )
    if args.tokens:
        print(
            f"{args.experts} experts, top-{args.top_k}, hidden {args.hidden}, "
            f"intermediate {args.intermediate}\n"
        )
        print(bench_moe(args, copy, rate), flush=True)
    if args.rows:
        print(f"\n{bench_dense(args)}", flush=True)


if __name__ == "__main__":
    main()

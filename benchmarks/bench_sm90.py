"""Times jmx8's Hopper kernels against bfloat16 and the other W8A16 kernels.

Every part that is named is run: `--dense`, `--moe`, `--convert`, `--chain`; without
names, all. A time is that of one call in a jitted program of many, which XLA captures
into a CUDA graph, over weights that together exceed the cache 25 times, for many rows
10 times; "alone" is what the profiler counts for the kernels themselves, and "on the
device" is the time from the first kernel's start to the last one's end, as those of a
layer overlap. Without `--rest`, long products run at the clock that the power allows,
with it at that of a GPU that does not work all the time. The floor is the larger of the
bytes over the measured read bandwidth and the arithmetic over the measured rate of a
bfloat16 matmul. Results are checked against float64; a wrong one is reported as wrong,
whatever its time.
"""

import argparse
import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from _timing import (
    describe_run,
    kernel_times,
    markdown_table,
    measure_roof,
    median_seconds,
    replay_seconds,
    time_calls,
)
from bench_convert import SHAPES as CONVERT_SHAPES
from bench_cutile import pallas_moe, relative_error
from bench_moe import ragged_moe
from tune_cutile import quantized

from jmx8 import dequantize, mx_matmul, mx_moe, MXArray, quantize, route


DENSE_SHAPES = ((4096, 12288), (2048, 5120), (4096, 4096))
DENSE_ROWS = (1, 8, 16, 32, 64, 128, 256, 1024, 4096, 8192)
WEIGHT_BYTES = 1_600_000_000
# Rounding to bfloat16 gives 1.7e-3, and twice in a row, with weights, 5e-3.
DENSE_ERROR, MOE_ERROR = 2.5e-3, 7e-3


@dataclasses.dataclass(frozen=True)
class Layer:
    """An MoE layer: `here` of its experts are local, the first of them `offset`."""

    experts: int
    here: int
    offset: int
    top_k: int
    hidden: int
    intermediate: int
    tokens: tuple[int, ...]


LAYERS = {
    "qwen": Layer(128, 128, 0, 8, 2048, 768, (1, 16, 64, 128, 256, 1024, 4096, 8192)),
    "deepseek": Layer(256, 32, 64, 8, 7168, 2048, (16, 128, 1024, 4096)),
}


def parts_of(w: MXArray):
    """Returns the two arrays: flattening them takes the host no time."""
    return w.elements, w.scales


def time_bf16(x, weights, rest):
    """Returns the times with whatever of XLA's matmuls is best."""
    product = lambda x, w: x @ w.T
    each = [(w,) for w in weights]
    return min(
        time_calls(product, (x,), each, rest),
        time_calls(product, (x,), each, rest, xla_gpu_enable_triton_gemm=False),
    )


def dense_error(out, x, exact_weight):
    rows = np.unique(np.linspace(0, x.shape[0] - 1, 16).astype(int))
    exact = np.asarray(x[rows], np.float64) @ exact_weight.T
    difference = np.asarray(out[rows], np.float64) - exact
    return float(np.linalg.norm(difference) / np.linalg.norm(exact))


def verdict(error, allowed):
    return f"{error:.1e}" if error <= allowed else f"WRONG: {error:.1e}"


def ratio(numerator, denominator):
    return "-" if numerator is None else f"{numerator / denominator:.2f}x"


def number(us, digits=1):
    return "-" if us is None else f"{us:,.{digits}f}"


def bench_dense(args, roof, peers):
    rows = []
    implementations = ["sm90"] + ["flashinfer_cutile"] * args.cutile
    for k, n in args.shapes:
        count = WEIGHT_BYTES // (n * k)
        make = jax.jit(quantized, static_argnums=(1, 2))
        keys = jax.random.split(jax.random.key(1), count)
        weights = [make(key, n, k) for key in keys]
        bf16 = [dequantize(w, jnp.bfloat16) for w in weights]
        exact_weight = np.asarray(bf16[0], np.float64)
        for m in args.rows:
            x = jax.random.normal(jax.random.key(m), (m, k), jnp.bfloat16)
            chosen = slice(count if m <= 256 else 12)
            each = [parts_of(w) for w in weights[chosen]]
            times, errors = [], []
            for name in implementations:
                call = lambda x, elements, scales, name=name: mx_matmul(
                    x, MXArray(elements, scales), implementation=name
                )
                times.append(time_calls(call, (x,), each, args.rest))
                out = jax.jit(call)(x, *each[0])
                errors.append(dense_error(out, x, exact_weight))
            (us, alone, _), *cutile = times
            bf16_us, bf16_alone, _ = time_bf16(x, bf16[chosen], args.rest)
            num_bytes = weights[0].nbytes + x.nbytes + 2 * m * n
            floor = roof.floor(num_bytes, 2 * m * n * k)
            found = [peer.get(f"{k}x{n}", {}).get(str(m)) for peer in peers.values()]
            rows.append(
                [
                    f"{k} to {n}",
                    f"{m:,}",
                    number(us),
                    number(alone),
                    number(bf16_us),
                    number(bf16_alone),
                    f"**{ratio(bf16_us, us)}**",
                    ratio(bf16_alone, alone),
                    number(floor),
                    ratio(us, floor),
                    *(number(time.program) for time in cutile),
                    *map(number, found),
                    verdict(errors[0], DENSE_ERROR),
                ]
            )
            print("#", *rows[-1], flush=True)
    header = ["k to n", "rows", "sm90, µs", "alone", "bf16", "alone"]
    header += ["bf16 over sm90", "alone", "floor", "sm90 over floor"]
    header += [*implementations[1:], *peers, "error against float64"]
    return markdown_table(header, rows)


def draw_logits(key, t, layer, exponent):
    """Returns router logits; with an exponent, experts drawn by Zipf's law.

    Top-k of log-probabilities with Gumbel noise is a draw without replacement.
    """
    if not exponent:
        return jax.random.normal(key, (t, layer.experts))
    rank = jax.random.permutation(jax.random.key(5), layer.experts) + 1
    noise = jax.random.gumbel(key, (t, layer.experts))
    return noise - exponent * jnp.log(rank.astype(jnp.float32))


def to_local(layer, ids):
    """Returns ids as a backend sees them: those of experts elsewhere are no expert."""
    local = ids - layer.offset
    return jnp.where((local >= 0) & (local < layer.here), local, layer.here)


class MoE:
    """One MoE shape: its weights, and how each side computes the layer."""

    def __init__(self, layer, rest):
        self.layer, self.rest = layer, rest
        e, h, i = layer.here, layer.hidden, layer.intermediate
        count = max(2, -(-WEIGHT_BYTES // (3 * e * h * i)))
        make = jax.jit(quantized, static_argnums=(1, 2, 3))
        keys = jax.random.split(jax.random.key(0), (count, 2))
        self.sets = [(make(a, e, 2 * i, h), make(b, e, h, i)) for a, b in keys]
        widen = jax.jit(lambda w: jnp.swapaxes(dequantize(w, jnp.bfloat16), 1, 2))
        self.bf16 = [(widen(w13), widen(w2)) for w13, w2 in self.sets]

    def run(self, x, e13, s13, e2, s2, ids, weights):
        return mx_moe(
            x,
            MXArray(e13, s13),
            MXArray(e2, s2),
            ids,
            weights,
            local_expert_offset=self.layer.offset,
            implementation="sm90",
        )

    def run_from_logits(self, x, e13, s13, e2, s2, logits, router):
        routed = route(logits, "softmax", self.layer.top_k, implementation=router)
        return self.run(x, e13, s13, e2, s2, *routed)

    def time(self, call, x, routed, *, bf16=False):
        """Returns the times of a layer, in a program of one for each routing."""
        sets = (
            self.bf16 if bf16 else [(*parts_of(a), *parts_of(b)) for a, b in self.sets]
        )
        each = [
            (*sets[i % len(sets)], *(r if isinstance(r, tuple) else (r,)))
            for i, r in enumerate(routed)
        ]
        return time_calls(call, (x,), each, self.rest)

    def floor(self, roof, routed):
        layer = self.layer
        ids = [np.asarray(to_local(layer, ids)) for ids, _ in routed]
        ids = [a[a < layer.here] for a in ids]
        per_expert = 3 * layer.hidden * layer.intermediate
        active = np.mean([np.unique(a).size for a in ids])
        local_rows = np.mean([a.size for a in ids])
        floor = roof.floor(active * per_expert * 33 / 32, 2 * local_rows * per_expert)
        return floor, active


def bench_moe(args, roof, peers):
    lines = []
    for name in args.layers:
        layer = LAYERS[name]
        moe = MoE(layer, args.rest)
        here = f", {layer.here} of them here" if layer.here < layer.experts else ""
        lines.append(
            f"\n{layer.experts} experts{here}, top-{layer.top_k}, hidden "
            f"{layer.hidden}, intermediate {layer.intermediate}\n"
        )
        rows = []
        for exponent in [0.0] * (not args.no_uniform) + [args.zipf] * bool(args.zipf):
            for t in args.tokens or layer.tokens:
                columns = (
                    {} if exponent else {k: v.get(name, {}) for k, v in peers.items()}
                )
                rows.append(moe_row(args, moe, roof, columns, t, exponent))
                rows[-1] += [""] * (len(peers) - len(columns))
                print("#", *rows[-1], flush=True)
        header = ["routing", "tokens", "sm90, µs", "on the device", "floor"]
        header += ["sm90 over floor", "Pallas bf16", "Pallas over sm90"]
        header += ["`lax.ragged_dot` bf16", "routing adds", "XLA's routing adds"]
        header += ["experts in use", "error against float64", *peers]
        lines.append(markdown_table(header, rows))
    return "\n".join(lines)


def moe_row(args, moe, roof, peers, t, exponent):
    layer = moe.layer
    key = jax.random.key(t)
    x = jax.random.normal(key, (t, layer.hidden), jnp.bfloat16)
    count = 4 * len(moe.sets) if t <= 256 else len(moe.sets)
    logits = [draw_logits(k, t, layer, exponent) for k in jax.random.split(key, count)]
    choose = jax.jit(lambda a: route(a, "softmax", layer.top_k, implementation="xla"))
    routed = [choose(a) for a in logits]
    us, _, device = moe.time(moe.run, x, routed)
    with_routing = [
        moe.time(functools.partial(moe.run_from_logits, router=name), x, logits).program
        for name in ("sm90", "xla")
    ]
    local = [(to_local(layer, ids), weights) for ids, weights in routed]
    w13, w2 = moe.sets[0]
    out = jax.jit(moe.run)(x, *parts_of(w13), *parts_of(w2), *routed[0])
    error = relative_error(out, x, w13, w2, *local[0])
    pallas = ragged = None
    if args.peer_tokens is None or t in args.peer_tokens:
        if t >= 16:  # with fewer it has no whole block of rows
            peer = functools.partial(pallas_moe, 64 if t <= 256 else 128)
            pallas = moe.time(peer, x, local[: len(moe.sets)], bf16=True).program
        if t in args.ragged_tokens and not exponent and layer.here == layer.experts:
            ragged = moe.time(ragged_moe, x, local[: len(moe.sets)], bf16=True).program
    floor, active = moe.floor(roof, routed)
    return [
        f"Zipf {exponent:g}" if exponent else "uniform",
        f"{t:,}",
        number(us),
        number(device),
        number(floor),
        ratio(us, floor),
        number(pallas, 0),
        ratio(pallas, us),
        number(ragged, 0),
        *(number(time - us) for time in with_routing),
        f"{active:.0f}",
        verdict(error, MOE_ERROR),
        *(number(peer.get(str(t))) for peer in peers.values()),
    ]


def bench_convert(args, roof, peers):
    rows = []
    for name, shape in CONVERT_SHAPES.items():
        x = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
        convert = jax.jit(quantize)
        w = convert(x)
        seconds = median_seconds(convert, x)
        kernels = kernel_times(lambda: jax.block_until_ready(convert(x)))  # noqa: B023
        us = max(kernel.us for kernel in kernels)
        num_bytes = x.nbytes + w.nbytes
        rows.append(
            [
                name,
                ",".join(map(str, shape)),
                number(seconds * 1e6),
                number(us),
                f"{num_bytes / seconds / 1e12:.2f}",
                f"{num_bytes / seconds / roof.copy:.0%}",
            ]
        )
    header = ["bf16 to MXFP8", "shape", "µs", "its kernel", "TB/s", "of copy"]
    return markdown_table(header, rows)


def bench_chain(args, roof, peers):
    """Calls that each wait for the one before, and of which each is small."""
    length = args.length
    w = quantized(jax.random.key(0), 128, 128)
    x = jax.random.normal(jax.random.key(1), (1, 128), jnp.bfloat16)

    def chain(step):
        def run(x):
            for _ in range(length):
                x = step(x)
            return x

        return jax.jit(run)

    rows = []
    for name, step in (
        ("mx_matmul, sm90", lambda x: mx_matmul(x, w, implementation="sm90")),
        ("an XLA fusion", lambda x: jax.lax.optimization_barrier(x + 1)),
    ):
        run = chain(step)
        us = replay_seconds(run, x) * 1e6 / length
        events = kernel_times(lambda: jax.block_until_ready(run(x)))  # noqa: B023
        alone = sum(kernel.us for kernel in events) / length
        rows.append([name, f"{us:.2f}", f"{alone:.2f}", f"{us - alone:.2f}"])
    header = [f"chain of {length} calls, 128 to 128, one row", "µs per call", "alone"]
    return markdown_table([*header, "between calls"], rows)


PARTS = {
    "dense": bench_dense,
    "moe": bench_moe,
    "convert": bench_convert,
    "chain": bench_chain,
}


def parse_shape(text: str) -> tuple[int, int]:
    k, n = text.split("x")
    return int(k), int(n)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for part in PARTS:
        parser.add_argument(f"--{part}", action="store_true")
    parser.add_argument("--shapes", type=parse_shape, nargs="*", default=DENSE_SHAPES)
    parser.add_argument("--rows", type=int, nargs="*", default=DENSE_ROWS)
    parser.add_argument("--cutile", action="store_true", help="time FlashInfer's too")
    parser.add_argument("--layers", nargs="*", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--tokens", type=int, nargs="*", help="None: those of a layer")
    parser.add_argument("--zipf", type=float, default=1.0, help="exponent; 0 for none")
    parser.add_argument("--no-uniform", action="store_true")
    parser.add_argument("--ragged-tokens", type=int, nargs="*", default=[1, 16])
    parser.add_argument("--peer-tokens", type=int, nargs="*", help="None: all")
    parser.add_argument(
        "--no-peers",
        dest="peer_tokens",
        action="store_const",
        const=[],
        help="only sm90",
    )
    parser.add_argument("--rest", type=float, default=0.0, help="s before each round")
    parser.add_argument("--length", type=int, default=400, help="of the chain")
    parser.add_argument("--peers", help="JSON with times of others, see results/")
    args = parser.parse_args()
    peers = json.loads(pathlib.Path(args.peers).read_text()) if args.peers else {}
    roof = measure_roof()
    print(f"{describe_run()}\n\n{roof}", flush=True)
    if peers:
        print(f"\nFrom elsewhere: {peers['from']}", flush=True)
    chosen = [part for part in PARTS if getattr(args, part)] or list(PARTS)
    for part in chosen:
        print(f"\n{PARTS[part](args, roof, peers.get(part, {}))}", flush=True)


if __name__ == "__main__":
    main()

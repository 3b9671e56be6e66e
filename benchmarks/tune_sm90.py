"""Measures the configurations of the Hopper kernels and writes `configs.json`.

For each shape the compiled configurations that could be the fastest are checked against
float32, and those that are right are timed: the matmul alone, captured into a CUDA
graph that goes through weights which together exceed the cache 10 times, or 256 of
them; first for a short time, and then, if not much slower than others, for a long one.
Of a layer of experts, the fastest matmuls of each number of tile rows are then timed as
a whole. The library is called on torch's tensors, since compiling each configuration
into an XLA program would take minutes. The fastest go to the table that
`jmx8/kernels/sm90/configs.py` reads; entries of other shapes and sizes stay.
"""

import argparse
import datetime
import json
import pathlib
import statistics
import sys
from functools import partial

import torch
import tvm_ffi


sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from jmx8.kernels.sm90 import configs
from tests import sm90_calls as calls


TABLE = pathlib.Path(configs.__file__).with_name("configs.json")
# k and n: of the table in `bench_sm90.py`, and of other models' projections.
DENSE_SHAPES = (
    *((4096, 12288), (2048, 5120), (4096, 4096), (128, 128), (1024, 3072)),
    *((3072, 1024), (2560, 9728), (9728, 2560), (4096, 1024), (4096, 6144)),
    *((4096, 14336), (14336, 4096), (4096, 28672), (8192, 8192)),
)
DENSE_ROWS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
# Experts here, of how many, hidden, intermediate, and tokens.
MOE_SHAPES = (
    (128, 128, 2048, 768, (1, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)),
    (32, 256, 7168, 2048, (16, 128, 1024, 4096)),
)
TOP_K = 8
WEIGHT_BYTES, MOST_WEIGHTS = 600_000_000, 256
# µs that one is timed for: to rule it out, and until the clock has sunk to what the
# power allows.
SHORT, LONG = 2_000, 50_000
# Rounding the result to bfloat16 alone gives 1.7e-3, and three times in a row 3e-3.
ALLOWED_ERROR, LAYER_ERROR = 3e-3, 5e-3


def make_weight(*shape) -> calls.Weight:
    values = (torch.randn(shape, device="cuda") * 100).clamp_(-448, 448)
    elements = values.to(torch.float8_e4m3fn).view(torch.uint8)
    scales = (*shape[:-1], shape[-1] // 32)
    codes = torch.randint(113, 116, scales, dtype=torch.uint8, device="cuda")
    return calls.Weight(elements, codes)


def widened(w: calls.Weight, index=...) -> torch.Tensor:
    """Returns the values of a weight, or of one expert's, as float32."""
    part = calls.Weight(w.elements[index], w.scales[index])
    scales = torch.exp2(part.scales.float() - 127).repeat_interleave(32, dim=-1)
    return part.elements.view(torch.float8_e4m3fn).float() * scales


def graph_us(launches, least=LONG) -> float:
    """Returns the µs of a launch, of several that one CUDA graph holds.

    Args:
        launches: What is called, each of them once.
        least: The µs that all of it takes at least.
    """
    graph = torch.cuda.CUDAGraph()
    with tvm_ffi.use_torch_stream(torch.cuda.graph(graph)):
        for launch in launches:
            launch()
    times = []
    while len(times) < 6 or sum(times) * len(launches) < least:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(launches))
    return statistics.median(times[1:])


def search(label, candidates, launch, weights, out, exact, allowed=ALLOWED_ERROR):
    """Returns pairs of µs and configuration, the fastest first.

    Args:
        label: What is printed.
        candidates: Configurations.
        launch: `launch(config, w)` computes `out` for one of the weights.
        weights: What one launch after the other takes.
        out: The result.
        exact: What its first rows must be for the first weight.
        allowed: The largest error, of the norm.
    """
    right, norm = [], exact.norm()
    launches_of = lambda config: [partial(launch, config, w) for w in weights]
    for config in candidates:
        out.fill_(torch.nan)
        launch(config, weights[0])
        error = float((out[: len(exact)].float() - exact).norm() / norm)
        if not error <= allowed:  # NaN is wrong, too
            print(f"  WRONG: {label} {tuple(config)}: error {error:.1e}", flush=True)
            continue
        right.append((graph_us(launches_of(config), SHORT), config))
    if not right:
        raise RuntimeError(f"{label}: no configuration is right.")
    most = 1.25 * min(right)[0]
    found = sorted((graph_us(launches_of(c)), c) for us, c in right if us <= most)
    best = "  ".join(f"{tuple(c)} {us:.1f}" for us, c in found[:4])
    print(f"{label}: {best}", flush=True)
    return found


def tune_dense(k, n, rows):
    count = min(MOST_WEIGHTS, max(4, WEIGHT_BYTES // (n * k)))
    weights = [make_weight(n, k) for _ in range(count)]
    first = widened(weights[0])
    for m in rows:
        x = torch.randn(m, k, device="cuda").bfloat16()
        out = calls.empty((m, n))
        candidates = [
            c
            for c in configs.CONFIGS
            if c.tile_rows in configs.tile_sizes(m) and (m <= 256 or c.split_k == 1)
        ]
        found = search(
            f"{k} to {n}, {m} rows",
            candidates,
            partial(launch_gemm, x=x, out=out),
            weights if m <= 256 else weights[:6],
            out,
            x.float() @ first.T,
        )
        us, config = found[0]
        yield {"m": m, "n": n, "k": k, "config": list(config), "us": round(us, 1)}


def launch_gemm(config, w, *, x, out, places=None, gather=False, activation=0):
    """Launches the matmul, or an expert matmul that `places` sorts rows for."""
    grouped = (
        (places.slot_rows if gather else None, places.tiles, places.num_tiles)
        if places
        else (None, None, None)
    )
    parameters = (activation, 0.0, 0.0, float("inf"))
    operands = (x, w.elements, w.scales, None, out)
    calls.call("gemm", *operands, *grouped, *parameters, *config)


def expert_rows(ids, here):
    """Returns (expert, flat indices of its routed rows), in the order of slots."""
    flat = ids.reshape(-1)
    return [(e, torch.nonzero(flat == e)[:, 0]) for e in range(here)]


def exact_layer(x, w13, w2, routed):
    """Returns what both matmuls give for the slots in use, as float32."""
    hidden, out = [], []
    for e, rows in routed:
        if len(rows):
            h = x[rows // TOP_K].float() @ widened(w13, e).T
            gate, up = h.chunk(2, dim=-1)
            hidden.append((torch.nn.functional.silu(gate) * up).bfloat16())
            out.append(hidden[-1].float() @ widened(w2, e).T)
    return torch.cat(hidden), torch.cat(out)


def launch_layer(pair, weights, *, x, ids, router_weights, out, scratch):
    """Launches a whole layer, with the scratch of the pair's number of tile rows."""
    operands = (x, *weights, ids, router_weights)
    calls.moe(operands, pair, out=out, scratch=scratch[pair[0].tile_rows])


def fastest_matmuls(label, sets, x, ids, size, exact_hidden, exact_out):
    """Returns the configurations of both matmuls that are the fastest by themselves."""
    here, h, i = sets[0][1].elements.shape
    w13, w2 = ([pair[n] for pair in sets] for n in range(2))
    hidden, out = (calls.empty((ids.numel(), size)) for size in (i, h))
    rounded = torch.zeros_like(hidden)
    rounded[: len(exact_hidden)] = exact_hidden
    places = calls.permute(ids, here, size, TOP_K)
    first = partial(
        launch_gemm,
        x=x,
        out=hidden,
        places=places,
        gather=True,
        activation=calls.ACTIVATIONS["silu"],
    )
    second = partial(launch_gemm, x=rounded, out=out, places=places)
    # Splits are for few blocks.
    fit = lambda c: c.tile_rows == size and (c.split_k == 1 or size <= 32)
    firsts = filter(fit, configs.FIRST_CONFIGS)
    seconds = filter(fit, configs.CONFIGS)
    exact = exact_hidden.float()
    found1 = search(f"{label}, first", firsts, first, w13, hidden, exact)
    found2 = search(f"{label}, second", seconds, second, w2, out, exact_out)
    return found1[0][1], found2[0][1]


def tune_layer(label, sets, x, ids, sizes):
    """Returns µs of a layer and configurations of both matmuls, for one routing."""
    w13, w2 = sets[0]
    here = len(w2.elements)
    exact = exact_layer(x, w13, w2, expert_rows(ids, here))
    pairs = [fastest_matmuls(label, sets, x, ids, size, *exact) for size in sizes]
    pairs += [pair for pair in configs.MIXED_PAIRS if pair[0].tile_rows in sizes]
    router_weights = torch.rand(ids.shape, device="cuda")
    slots = calls.permute(ids, here, 8, TOP_K).slot_of_row
    # Slots of -1 find the row of zeros behind all others.
    rows = torch.nn.functional.pad(exact[1], (0, 0, 0, 1))[slots.long()]
    out = calls.empty(x.shape)
    launch = partial(
        launch_layer,
        x=x,
        ids=ids,
        router_weights=router_weights,
        out=out,
        scratch={size: calls.moe_scratch(w2, ids, size) for size in sizes},
    )
    total = (rows * router_weights[..., None]).sum(dim=1)
    found = search(f"{label}, layer", pairs, launch, sets, out, total, LAYER_ERROR)
    us, (first, second) = found[0]
    return us, first, second


def tune_moe(here, experts, h, i, tokens):
    # A graph of one launch would take as long to start as a small layer takes.
    count = max(4, WEIGHT_BYTES // (3 * here * h * i))
    sets = [
        (make_weight(here, 2 * i, h), make_weight(here, h, i)) for _ in range(count)
    ]
    can_be_first = {config.tile_rows for config in configs.FIRST_CONFIGS}
    for t in tokens:
        # The local experts are the first ones; the others are no experts here.
        ids = torch.rand(t, experts, device="cuda").topk(TOP_K).indices.int()
        sizes = sorted(configs.tile_sizes(t * TOP_K / experts) & can_be_first)
        label = f"{here} of {experts} experts, {h} and {i}, {t} tokens"
        x = torch.randn(t, h, device="cuda").bfloat16()
        us, first, second = tune_layer(label, sets, x, ids, sizes)
        yield {
            "rows_per_expert": t * TOP_K / here,
            "h": h,
            "i": i,
            "first": list(first),
            "second": list(second),
            "us": round(us, 1),
        }


def write(table, kind, key, entries):
    """Replaces the entries of the same key, and writes one to a line."""
    table[kind] = list({key(entry): entry for entry in table[kind] + entries}.values())
    lines = []
    for name, value in table.items():
        if isinstance(value, list):
            rows = ",\n".join(f"  {json.dumps(row)}" for row in value)
            lines.append(f" {json.dumps(name)}: [\n{rows}\n ]")
        else:
            lines.append(f" {json.dumps(name)}: {json.dumps(value)}")
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dense", action="store_true", help="only these")
    parser.add_argument("--moe", action="store_true", help="only these")
    parser.add_argument("--rows", type=int, nargs="*", default=DENSE_ROWS)
    parser.add_argument("--tokens", type=int, nargs="*", help="None: those of a layer")
    args = parser.parse_args()
    both = args.dense == args.moe
    measured = f"{torch.cuda.get_device_name()}, {datetime.date.today()}"
    table = {"measured": measured} | json.loads(TABLE.read_text())
    table["measured"] = measured
    torch.manual_seed(0)
    print(f"{table['measured']}, torch {torch.__version__}", flush=True)
    if args.dense or both:
        for k, n in DENSE_SHAPES:
            entries = list(tune_dense(k, n, args.rows))
            write(table, "dense", lambda e: (e["n"], e["k"], e["m"]), entries)
    if args.moe or both:
        size = lambda e: (e["h"], e["i"], e["rows_per_expert"])
        for here, experts, h, i, tokens in MOE_SHAPES:
            chosen = [t for t in tokens if args.tokens is None or t in args.tokens]
            entries = list(tune_moe(here, experts, h, i, chosen))
            write(table, "moe", size, entries)
    print(TABLE.read_text())


if __name__ == "__main__":
    main()

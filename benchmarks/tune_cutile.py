"""Searches tiles for the cuTile MoE: `--compile` first, anywhere; then on the GPU.

Compiling the candidates takes minutes, FlashInfer and tileiras, and no GPU. Timing them
takes a GPU and what was compiled. Each grouped matmul runs on its own, over several
sets of weights that together exceed the cache, and the profiler says how long its
kernels took. What is best goes, by hand, to
`jmx8/kernels/cutile/tiles.json`.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import pathlib
import statistics

import jax
import jax.numpy as jnp
from _timing import describe_run, kernel_times

from jmx8 import quantize, route
from jmx8.kernels.cutile import _backend, _cubins, _launch, _pipeline, dense
from jmx8.kernels.cutile._permute import num_places, permute
from jmx8.kernels.cutile._tiles import Gemm, Tiles


REPEATS = 2
OUR_KERNELS = ("_sorted_grouped", "_gated_activation")

# Block sizes that could pay, by tokens.
BLOCKS = {
    1: (16,),
    16: (16,),
    64: (16,),
    128: (16, 32),
    256: (32,),
    1024: (64,),
    4096: (128, 64),
    8192: (128, 256),
}

DENSE_BLOCKS = {
    1: (16,),
    16: (16,),
    64: (64, 32),
    256: (128, 64),
    1024: (128, 256),
}

# For each block size the (n, k), the occupancies and the numbers of warps (0: as the
# compiler likes) of the first matmul fused, of the first unfused, and of the second.
_CANDIDATES = {
    16: (
        "32x128 32x256 32x512 64x64 64x128 64x256 64x512 128x64 128x128 128x256 "
        "256x64 256x128 @ 1 2 4 @ 0",
        "64x128 64x256 128x64 128x128 128x256 256x64 256x128 @ 1 2 4 @ 0",
        "32x128 32x256 64x64 64x128 64x256 128x64 128x128 128x256 256x64 256x128 "
        "@ 1 2 4 @ 0",
    ),
    32: (
        "64x128 128x64 128x128 256x64 @ 1 2 @ 0",
        "64x128 128x64 128x128 128x256 256x64 256x128 @ 1 2 4 @ 0",
        "64x64 64x128 128x64 128x128 256x64 256x128 @ 2 4 @ 0",
    ),
    64: (
        "64x64 64x128 128x64 128x128 @ 1 2 @ 0",
        "64x128 128x64 128x128 128x256 256x64 256x128 @ 1 2 @ 0",
        "64x64 64x128 128x64 128x128 256x64 256x128 @ 1 2 4 @ 0",
    ),
    128: (
        "64x64 64x128 128x64 128x128 @ 1 2 @ 0 8",
        "64x64 64x128 128x64 128x128 256x64 256x128 @ 1 2 @ 0 8",
        "64x64 64x128 128x64 128x128 256x64 256x128 @ 1 2 @ 0 8",
    ),
    256: (
        "64x64 64x128 @ 1 @ 8",
        "64x64 64x128 128x64 128x128 @ 1 2 @ 0 8",
        "64x64 64x128 128x64 128x128 @ 1 2 @ 0 8",
    ),
}


@dataclasses.dataclass(frozen=True)
class Stage:
    """One of the two matmuls with its tiles."""

    first: bool
    rows: int
    gemm: Gemm
    fused: bool = False


def parse_candidates(text: str) -> list[Gemm]:
    """Returns the tiles that an entry of `_CANDIDATES` stands for."""
    shapes, occupancies, warps = text.split("@")
    return [
        Gemm(int(n), int(k), int(occupancy), int(count))
        for (n, _, k), occupancy, count in itertools.product(
            (shape.partition("x") for shape in shapes.split()),
            occupancies.split(),
            warps.split(),
        )
    ]


def candidates(rows: int, first: bool) -> list[Stage]:
    """Returns the candidates for one matmul at a block size."""
    fused, unfused, second = map(parse_candidates, _CANDIDATES[rows])
    if not first:
        return [Stage(False, rows, gemm) for gemm in second]
    return [Stage(True, rows, gemm, fused=True) for gemm in fused] + [
        Stage(True, rows, gemm) for gemm in unfused
    ]


def dense_candidates(rows: int) -> list[Stage]:
    """Returns the candidates for a matmul with one weight matrix."""
    stages = candidates(rows, True) + candidates(rows, False)
    gemms = dict.fromkeys(stage.gemm for stage in stages if not stage.fused)
    return [Stage(True, rows, gemm) for gemm in gemms]


class Layer:
    """One MoE layer with the tiles left open."""

    def __init__(self, args, arch):
        self.experts, self.top_k = args.experts, args.top_k
        self.hidden, self.intermediate = args.hidden, args.intermediate
        self.target = _backend.target_of(arch)

    def stage(self, x, w, ids, *, stage):
        """One grouped matmul, and its activation, on rows that are in place."""
        places = permute(ids.reshape(-1), self.experts, stage.rows, self.target)
        return self.multiply(places, x, w, ids.size, stage)

    def multiply(self, places, x, w, num_rows, stage):
        multiply = functools.partial(
            _pipeline.grouped_matmul,
            places=places,
            num_rows=num_rows,
            block_rows=stage.rows,
            target=self.target,
        )
        if not stage.first:
            scatter = places.place_of is None
            return multiply(x, w, stage.gemm, num_columns=self.hidden, scatter=scatter)
        tiles = Tiles(stage.rows, stage.gemm, stage.gemm, stage.fused)
        return _pipeline.first_matmul(
            x, w, self.intermediate, "silu", tiles, multiply, self.target
        )

    def operands(self, tokens, stage):
        """Shapes of the operands of `stage`."""
        h, i = self.hidden, self.intermediate
        rows, columns = (2 * i, h) if stage.first else (h, i)
        places = num_places(tokens * self.top_k, self.experts, stage.rows)
        return (
            jax.ShapeDtypeStruct((places, columns), jnp.bfloat16),
            self.weights(rows, columns),
            jax.ShapeDtypeStruct((tokens, self.top_k), jnp.int32),
        )

    def cubins(self, tokens, stage):
        """The kernels that `stage` launches for `tokens` tokens."""
        with _launch.record() as launches:
            jax.eval_shape(
                functools.partial(self.stage, stage=stage),
                *self.operands(tokens, stage),
            )
        return [launch.cubin for launch in launches]

    def weights(self, rows, columns):
        """Shapes of one set of weights."""
        dtype = jax.ShapeDtypeStruct((self.experts, rows, columns), jnp.bfloat16)
        return jax.eval_shape(quantize, dtype)


def compile_candidates(
    layer: Layer, tokens: list[int], dense_shape: tuple[int, int]
) -> None:
    """Compiles every candidate, one by one, so that one failure costs one tile."""
    cubins = {}
    for count in tokens:
        for rows, first in itertools.product(BLOCKS[count], (True, False)):
            for stage in candidates(rows, first):
                cubins.update(dict.fromkeys(layer.cubins(count, stage), stage))
    for rows in {rows for blocks in DENSE_BLOCKS.values() for rows in blocks}:
        for stage in dense_candidates(rows):
            cubins.update(
                dict.fromkeys(dense_cubins(layer.target, stage, *dense_shape), stage)
            )
    wanted = _cubins.missing(cubins)
    print(f"{len(cubins)} kernels, {len(wanted)} to compile", flush=True)
    for start in range(0, len(wanted), 40):
        some = wanted[start : start + 40]
        try:
            _cubins.compile_missing(some)
        except RuntimeError:
            for cubin in _cubins.missing(some):
                try:
                    _cubins.compile_missing([cubin])
                except RuntimeError as error:
                    print(cubins[cubin], str(error)[-200:], flush=True)
        print(f"{start + len(some)} of {len(wanted)}", flush=True)


def quantized(key, *shape):
    return quantize(jax.random.normal(key, shape, jnp.bfloat16) * jnp.bfloat16(0.02))


def time_stages(stages, run, operands, kernels_per_call):
    """Returns pairs of µs and stage, fastest first.

    Args:
        stages: What to time.
        run: `run(stage, *operands, w)` for one of several weights.
        operands: Its operands, the list of weights last.
        kernels_per_call: How many of our kernels it launches for a stage.
    """
    *others, weights = operands

    def compiled(stage):
        jitted = jax.jit(lambda *a: [run(stage, *a[:-1], w) for w in a[-1]])
        return jitted.lower(*others, weights).compile()

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        functions = list(pool.map(compiled, stages))

    def run_all():
        for function in functions:
            for _ in range(REPEATS):
                jax.block_until_ready(function(*others, weights))

    kernels = kernel_times(run_all)
    events = [k.us for k in kernels if k.name.startswith(OUR_KERNELS)]
    found = []
    for stage in stages:
        each = kernels_per_call(stage)
        count = REPEATS * len(weights) * each
        mine, events = events[:count], events[count:]
        calls = [sum(mine[i : i + each]) for i in range(0, count, each)]
        found.append((statistics.median(calls), stage))
    if events:
        raise RuntimeError(f"{len(events)} kernels more than expected were run.")
    return sorted(found, key=lambda pair: pair[0])


def time_moe(layer, sets, tokens, rows, first):
    """Times the candidates for one matmul of an MoE layer that were compiled."""
    stages = [
        stage
        for stage in candidates(rows, first)
        if not _cubins.missing(layer.cubins(tokens, stage))
    ]
    key = jax.random.key(tokens)
    logits = jax.random.normal(key, (tokens, layer.experts))
    ids, _ = route(logits, "softmax", layer.top_k)
    places = jax.jit(
        lambda ids: permute(ids.reshape(-1), layer.experts, rows, layer.target)
    )(ids)
    (shape, *_) = layer.operands(tokens, stages[0])
    x = jax.random.normal(key, shape.shape, shape.dtype)
    return time_stages(
        stages,
        lambda stage, places, x, w: layer.multiply(places, x, w, ids.size, stage),
        (places, x, [pair[0 if first else 1] for pair in sets]),
        lambda stage: 2 if first and not stage.fused else 1,
    )


def dense_cubins(target, stage, n, k):
    """The kernels for a matmul with one weight matrix `[n, k]`."""
    x = jax.ShapeDtypeStruct((stage.rows, k), jnp.bfloat16)
    w = jax.eval_shape(quantize, jax.ShapeDtypeStruct((n, k), jnp.bfloat16))
    with _launch.record() as launches:
        jax.eval_shape(functools.partial(run_dense, target, stage), x, w)
    return [launch.cubin for launch in launches]


def run_dense(target, stage, x, w):
    return dense.matmul(
        x,
        w,
        out_dtype=jnp.bfloat16,
        block_rows=stage.rows,
        gemm=stage.gemm,
        target=target,
    )


def time_dense(target, m, n, k, rows):
    """Times the candidates for a matmul with one weight matrix."""
    stages = [
        stage
        for stage in dense_candidates(rows)
        if not _cubins.missing(dense_cubins(target, stage, n, k))
    ]
    x = jax.random.normal(jax.random.key(m), (m, k), jnp.bfloat16)
    # More weights than the cache holds.
    keys = jax.random.split(jax.random.key(0), max(3, (1 << 28) // (n * k)))
    weights = [jax.jit(quantized, static_argnums=(1, 2))(key, n, k) for key in keys]
    run = functools.partial(run_dense, target)
    return time_stages(stages, run, (x, weights), lambda stage: 1)


def search(layer, args):
    """Prints the fastest tiles for each number of tokens, and of rows."""
    print(describe_run(), flush=True)
    log = []

    def note(label, found):
        log.extend({**label, "us": us, **dataclasses.asdict(s)} for us, s in found)
        print(label, flush=True)
        for us, stage in found[:4]:
            print(f"  {us:8.1f}  {stage}", flush=True)
        if args.json:
            pathlib.Path(args.json).write_text(json.dumps(log, indent=0))

    make = jax.jit(quantized, static_argnums=(1, 2, 3))
    e, h, i = layer.experts, layer.hidden, layer.intermediate
    keys = jax.random.split(jax.random.key(0), (args.sets, 2))
    sets = [(make(a, e, 2 * i, h), make(b, e, h, i)) for a, b in keys]
    for tokens in args.tokens:
        for rows, first in itertools.product(BLOCKS[tokens], (True, False)):
            note({"tokens": tokens}, time_moe(layer, sets, tokens, rows, first))
    del sets
    for m in args.dense_rows:
        n, k = args.dense
        for rows in DENSE_BLOCKS[m]:
            note({"m": m}, time_dense(layer.target, m, n, k, rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=768)
    parser.add_argument("--sets", type=int, default=3, help="sets of weights")
    parser.add_argument("--tokens", type=int, nargs="*", default=list(BLOCKS))
    parser.add_argument("--dense", type=int, nargs=2, default=(12288, 4096))
    parser.add_argument("--dense-rows", type=int, nargs="*", default=list(DENSE_BLOCKS))
    parser.add_argument("--json", help="where to write every time that was taken")
    args = parser.parse_args()
    layer = Layer(args, args.arch)
    if args.compile:
        compile_candidates(layer, args.tokens, args.dense)
    else:
        search(layer, args)


if __name__ == "__main__":
    main()

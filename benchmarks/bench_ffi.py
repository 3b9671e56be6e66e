"""Times calls of FlashInfer's kernels through the FFI seam, and looks for leaks.

A chain of calls in one program is captured into a command buffer, whose replay does
not call the host at all; without command buffers every call goes through the bridge.
Both are timed next to as many fusions of XLA's own, and a million calls of either kind
must leave the memory of host and device as they were.
"""

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import psutil
import tvm_ffi
from _timing import describe_run, markdown_table


sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.flashinfer_hopper import ROPE, rope


def make_chain(step, length):
    def chain(x):
        for _ in range(length):
            x = step(x)
        return x

    return jax.jit(chain)


def measure(length, calls):
    """Returns a row: µs per call, per fusion, calls of the host, and what stays."""
    q, k = (jnp.ones((1, 1, 128), jnp.bfloat16) for _ in range(2))
    position = jnp.zeros(1, jnp.int32)
    count = 0

    def counted(*args):
        nonlocal count
        count += 1
        function(*args)

    function = ROPE.load()
    counting = dataclasses.replace(ROPE, load=lambda: tvm_ffi.convert(counted))
    step = lambda q, kernel=ROPE: rope(q, k, position, kernel=kernel)[0]
    call = make_chain(step, length)
    fusion = make_chain(lambda x: jax.lax.optimization_barrier(x + 1), length)
    us = [microseconds_per_step(f, q, length) for f in (call, fusion)]
    process, device = psutil.Process(), jax.devices()[0]

    def memory():
        jax.block_until_ready(call(q))
        return process.memory_info().rss, device.memory_stats()["bytes_in_use"]

    before = memory()
    for i in range(calls // length):
        out = call(q)
        if i % 50 == 0:
            out.block_until_ready()
    grown = [b - a for a, b in zip(before, memory(), strict=True)]
    host_calls = make_chain(lambda q: step(q, counting), length)
    for _ in range(20):
        jax.block_until_ready(host_calls(q))
    return [
        *(f"{t:.2f}" for t in us),
        f"{count / (20 * length):.0%}",
        *(f"{n / 1024:.0f}" for n in grown),
    ]


def microseconds_per_step(chain, x, length):
    """Returns the median of 9 rounds of 20 runs; no result is kept, as in a loop.

    A captured graph is updated when a buffer has moved since the last run.
    """
    rounds = []
    for _ in range(10):
        start = time.perf_counter()
        for _ in range(19):
            chain(x)
        chain(x).block_until_ready()
        rounds.append((time.perf_counter() - start) / 20 / length * 1e6)
    return statistics.median(rounds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=400, help="calls in a program")
    parser.add_argument("--calls", type=int, default=1_000_000, help="calls in all")
    parser.add_argument("--row", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        print(" ".join(measure(args.length, args.calls)))
        return
    rows = []
    for title, flag in (("on", ""), ("off", "--xla_gpu_enable_command_buffer=")):
        # XLA reads its flags once in a process.
        environment = os.environ | {
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
        }
        command = [sys.executable, __file__, "--row"]
        command += ["--length", str(args.length), "--calls", str(args.calls)]
        run = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        rows.append([title, *run.stdout.split()])
    print(f"{describe_run()}\n")
    print(
        f"`apply_rope_pos_ids` of one head through the seam, {args.length} in a row; "
        f"growth over {args.calls:,} calls\n"
    )
    header = ["command buffers", "µs per call", "µs per XLA fusion"]
    header += ["calls that reach the host", "host memory, KiB", "device memory, KiB"]
    print(markdown_table(header, rows))


if __name__ == "__main__":
    main()

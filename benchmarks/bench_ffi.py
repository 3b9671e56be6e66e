"""Times calls of FlashInfer's kernels through the FFI seam, and looks for leaks.

A chain of calls in one program is captured into a command buffer, whose replay does
not call the host at all; without command buffers every call goes through the bridge.
Both are timed next to as many fusions of XLA's own, and a million calls of either kind
must leave the memory of host and device as they were.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import psutil
from _timing import describe_run, markdown_table, median_seconds


sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.flashinfer_hopper import rmsnorm


def make_chain(step, length):
    def chain(x):
        for _ in range(length):
            x = step(x)
        return x

    return jax.jit(chain)


def measure(length, calls):
    """Returns a row: µs per call, per fusion, and what `calls` calls leave behind."""
    x = jax.random.normal(jax.random.key(0), (16, 512), jnp.bfloat16)
    weight = jnp.ones(512, jnp.bfloat16)
    call = make_chain(lambda x: rmsnorm(x, weight), length)
    fusion = make_chain(lambda x: jax.lax.optimization_barrier(x + 1), length)
    us = [median_seconds(f, x) / length * 1e6 for f in (call, fusion)]
    process, device = psutil.Process(), jax.devices()[0]

    def memory():
        jax.block_until_ready(call(x))
        return process.memory_info().rss, device.memory_stats()["bytes_in_use"]

    before = memory()
    for i in range(calls // length):
        out = call(x)
        if i % 50 == 0:
            out.block_until_ready()
    grown = [b - a for a, b in zip(before, memory(), strict=True)]
    return [*(f"{t:.2f}" for t in us), *(f"{n / 1024:.0f}" for n in grown)]


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
        f"`rmsnorm` of 16 x 512 through the seam, {args.length} in a row; growth over "
        f"{args.calls:,} calls\n"
    )
    header = ["command buffers", "µs per call", "µs per XLA fusion"]
    header += ["host memory, KiB", "device memory, KiB"]
    print(markdown_table(header, rows))


if __name__ == "__main__":
    main()

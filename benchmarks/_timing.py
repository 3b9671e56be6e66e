"""Timing, and saying what was timed on what."""

import datetime
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp


def median_seconds(
    function: Callable[..., Any], *args: Any, calls: int = 10, rounds: int = 7
) -> float:
    """Returns the median over rounds of the mean time of a call, compiled before.

    A round makes `calls` calls and waits once, so that dispatch overlaps with work.
    """
    for _ in range(2):
        jax.block_until_ready(function(*args))
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        results = [function(*args) for _ in range(calls)]
        jax.block_until_ready(results[-1])
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def copy_bandwidth(num_bytes: int = 1 << 30) -> float:
    """Returns bytes per second, read plus written, of an XLA copy on this device."""
    x = jnp.ones(num_bytes // 2, jnp.bfloat16)
    seconds = median_seconds(jax.jit(lambda x: x + jnp.bfloat16(1)), x)
    return 2 * x.nbytes / seconds


def matmul_rate(size: int) -> float:
    """Returns operations per second of a square bfloat16 matmul of random data."""
    x = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    return 2 * size**3 / median_seconds(jax.jit(lambda a: a @ a), x, calls=5)


def describe_run() -> str:
    """Returns date, device, versions and command, as a line of markdown."""
    device = jax.devices()[0]
    name = device.device_kind if device.platform == "gpu" else _cpu_name()
    command = f"python {Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}".strip()
    return (
        f"{datetime.date.today()}, {name}, jax {jax.__version__}, Python "
        f"{platform.python_version()}; `{command}`"
    )


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                cores = len(os.sched_getaffinity(0))
                return f"{line.partition(':')[2].strip()} ({cores} cores)"
    return platform.processor() or platform.machine()


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """Returns a table in markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

"""Timing, and saying what was timed on what."""

import dataclasses
import datetime
import os
import pathlib
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

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


def replay_seconds(
    function: Callable[..., Any], *args: Any, rounds: int = 7, rest: float = 0.0
) -> float:
    """Returns the median over rounds of the mean time of a call, compiled before.

    No result is kept, as in a loop: a captured graph is updated when a buffer has moved
    since the last run. A round takes 20 ms or more, after `rest` seconds of nothing.
    """

    def timed(calls):
        time.sleep(rest)
        start = time.perf_counter()
        for _ in range(calls - 1):
            function(*args)
        jax.block_until_ready(function(*args))
        return (time.perf_counter() - start) / calls

    timed(2)  # compile and capture
    calls = max(1, min(100, int(0.02 / timed(1))))
    timed(calls)
    return statistics.median(timed(calls) for _ in range(rounds))


class Kernel(NamedTuple):
    """A kernel that ran: µs from some moment on, and how many."""

    name: str
    start: float
    us: float


def kernel_times(run: Callable[[], Any]) -> list[Kernel]:
    """Returns the kernels that `run()` launches, in order."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (trace,) = pathlib.Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(trace))
    kernels = [
        Kernel(event.name, event.start_ns / 1e3, event.duration_ns / 1e3)
        for plane in data.planes
        if "GPU" in plane.name
        for line in plane.lines
        if "Stream" in line.name
        for event in line.events
    ]
    return sorted(kernels, key=lambda kernel: kernel.start)


def read_bandwidth(num_bytes: int = 1 << 31) -> float:
    """Returns bytes per second of an XLA sum on this device."""
    x = jnp.ones(num_bytes // 2, jnp.bfloat16)
    total = jax.jit(lambda x: jnp.sum(x, dtype=jnp.float32))
    return x.nbytes / median_seconds(total, x)


def copy_bandwidth(num_bytes: int = 1 << 30) -> float:
    """Returns bytes per second, read plus written, of an XLA copy on this device."""
    x = jnp.ones(num_bytes // 2, jnp.bfloat16)
    seconds = median_seconds(jax.jit(lambda x: x + jnp.bfloat16(1)), x)
    return 2 * x.nbytes / seconds


def matmul_rate(size: int) -> float:
    """Returns operations per second of a square bfloat16 matmul of random data."""
    x = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    return 2 * size**3 / median_seconds(jax.jit(lambda a: a @ a), x, calls=5)


@dataclasses.dataclass(frozen=True)
class Roof:
    """What this device reached in this run."""

    read: float
    copy: float
    rate: float

    def floor(self, num_bytes: float, operations: float) -> float:
        """Returns the least µs that the bytes and the operations take."""
        return 1e6 * max(num_bytes / self.read, operations / self.rate)

    def __str__(self) -> str:
        return (
            f"read {self.read / 1e12:.2f} TB/s, copy {self.copy / 1e12:.2f} TB/s, bf16 "
            f"matmul {self.rate / 1e12:.0f} TFLOP/s"
        )


def measure_roof() -> Roof:
    x = jnp.ones(1 << 29, jnp.bfloat16)
    memcpy = 2 * x.nbytes / median_seconds(jax.jit(jnp.copy), x)
    return Roof(read_bandwidth(), max(copy_bandwidth(), memcpy), matmul_rate(8192))


class CallTimes(NamedTuple):
    """µs of one call of those in a program.

    Attributes:
        program: As the host sees it, of many runs of the program.
        alone: What the profiler counts for kernels, without what lies between them.
        device: From the first kernel's start to the last one's end, of one run.
    """

    program: float
    alone: float
    device: float


def time_calls(
    call: Callable[..., Any],
    shared: tuple[Any, ...],
    each: list[tuple[Any, ...]],
    rest: float = 0.0,
    **compiler_options: Any,
) -> CallTimes:
    """Returns the times of `call(*shared, *one)` in a program of one after the other.

    No two of `each` may be equal, or XLA would compute them once. Of each result one
    element leaves the program: results that do have a new buffer in every run, for
    which the captured graph is updated, as no model makes XLA do for each matmul.
    `rest`: as `replay_seconds` takes it.
    """

    def program(shared, each):
        results = [call(*shared, *one) for one in each]
        # Without it, only the one element would be computed.
        results = jax.lax.optimization_barrier(results)
        return jnp.stack([result.ravel()[0] for result in results])

    run = jax.jit(program, compiler_options=compiler_options or None)
    seconds = replay_seconds(run, shared, each, rest=rest)
    kernels = kernel_times(lambda: jax.block_until_ready(run(shared, each)))
    alone = sum(kernel.us for kernel in kernels)
    device = kernels[-1].start + kernels[-1].us - kernels[0].start
    return CallTimes(*(us / len(each) for us in (seconds * 1e6, alone, device)))


def describe_run() -> str:
    """Returns date, device, versions and command, as a line of markdown."""
    device = jax.devices()[0]
    name = device.device_kind if device.platform == "gpu" else _cpu_name()
    script = pathlib.Path(sys.argv[0]).name
    command = f"python {script} {' '.join(sys.argv[1:])}".strip()
    return (
        f"{datetime.date.today()}, {name}, jax {jax.__version__}, Python "
        f"{platform.python_version()}; `{command}`"
    )


def _cpu_name() -> str:
    info = pathlib.Path("/proc/cpuinfo")
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

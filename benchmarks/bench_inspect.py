"""Times `jmx8 inspect` on the headers of a large checkpoint.

The folder has an index and 400 shards whose data are holes, 48,000 tensors in all. The
command runs in a process of its own each time, so what is timed is all that a person
waits for; the files are in the page cache.

    python benchmarks/bench_inspect.py --out benchmarks/results/inspect_cpu.md
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from _timing import describe_run, markdown_table


sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.test_describe import many_shards


IMPORT = "import jmx8.cli"
LOAD = "import jmx8; jmx8.load"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=11)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        num_weights = many_shards(Path(folder))
        commands = {
            "`jmx8 inspect FOLDER`": ["-m", "jmx8", "inspect", folder],
            f"`{IMPORT}`": ["-c", IMPORT],
            f"`{LOAD}`, which imports JAX": ["-c", LOAD],
        }
        rows = [
            [name, *measure(command, arguments.runs)]
            for name, command in commands.items()
        ]
    report = f"""# Describing a large checkpoint

{describe_run()}

{num_weights:,} MXFP8 weights of 2048 x 4096 in 400 shards with an index. Seconds of
processes, from the start of Python to its end, {arguments.runs} of each; the CPU
seconds are the smallest. Before it, {load:.1f} processes wanted the cores.

{markdown_table(["process", "smallest", "median", "largest", "CPU"], rows)}
"""
    print(report)
    if arguments.out:
        arguments.out.write_text(report)


def measure(command: list[str], runs: int) -> list[str]:
    """Returns the smallest, median and largest seconds, and the least CPU seconds."""
    seconds, busy = zip(*(run(command) for _ in range(runs)), strict=True)
    figures = (min(seconds), median(seconds), max(seconds), min(busy))
    return [f"{figure:.2f}" for figure in figures]


def run(command: list[str]) -> tuple[float, float]:
    """Runs Python once; returns seconds and CPU seconds."""
    before, start = os.times(), time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    seconds, after = time.perf_counter() - start, os.times()
    user = after.children_user - before.children_user
    return seconds, user + after.children_system - before.children_system


if __name__ == "__main__":
    main()

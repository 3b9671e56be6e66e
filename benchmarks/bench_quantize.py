"""Memory, speed and crash safety of `jmx8 quantize`, on a checkpoint made for it.

Writes a synthetic Qwen3 checkpoint of random bfloat16 weights and measures, on the same
disk in the same run, with the files not in the page cache before each:

- `dd`: reading the checkpoint, and writing 33/64 of it (what MXFP8 takes), flushed;
- `jmx8 quantize` in a process of its own: seconds until everything is flushed, and the
  peak of its resident set;
- kills: on a smaller checkpoint, runs that are killed (SIGKILL) at random moments, each
  then run to its end; the bytes must be those of a run that was not killed, and the
  source's bytes and times unchanged.

Exits with 1 if the peak is above 1.5 GB, the speed below 60 % of `dd`, or a killed run
leaves another result.

    python benchmarks/bench_quantize.py --out benchmarks/results/quantize_cpu.md
"""

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _timing import describe_run, markdown_table
from bench_load import DENSE, MOE, num_bytes, resident_bytes, write_checkpoint

from jmx8.checkpoint import quantize_checkpoint


FORMATS = ("modelopt", "compressed-tensors", "mxfp8")
MAX_PEAK = 1.5e9
MIN_SPEED = 0.6
# As many shards as seconds, about, so that kills fall on all parts of a run.
KILL_SHARD_BYTES = 16 * 2**20

COLUMNS = [
    *("format", "read", "written", "dd read", "dd write", "seconds", "GB/s read"),
    *("dd / seconds", "peak RSS"),
]


def main() -> int:
    arguments = parse_arguments()
    if arguments.child:
        print(json.dumps(run_child(*arguments.child)))
        return 0
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        speed, is_fast = measure_speed(folder, arguments.gb)
        kills, is_safe = measure_kills(folder, arguments)
    report = f"""# Quantizing a checkpoint

{describe_run()}

{describe_load()}

{speed}

{kills}"""
    print(report)
    if arguments.out:
        Path(arguments.out).write_text(report)
    return 0 if is_fast and is_safe else 1


def describe_load() -> str:
    """Says what else the machine did, and how much this program was preferred."""
    wanting = os.getloadavg()[1]
    priority = os.getpriority(os.PRIO_PROCESS, 0)
    return f"""Over the last five minutes {wanting:.0f} processes wanted the cores. This
program, and so `dd`, ran at priority {priority}."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--gb", type=float, default=8.0, help="size on disk, 10^9 bytes"
    )
    parser.add_argument("--kills", type=int, default=20, help="runs to kill")
    parser.add_argument("--kill-gb", type=float, default=0.4, help="size for the kills")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", help="where to put the files for the while")
    parser.add_argument("--out", help="file to write the table to")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


# --- Speed and memory -----------------------------------------------------------------


def run_child(source: str, folder: str, form: str) -> dict[str, float]:
    start = time.perf_counter()
    quantize_checkpoint(source, folder, format=form)  # pyright: ignore
    return {
        "seconds": time.perf_counter() - start,
        "peak": resident_bytes("VmHWM"),
    }


def measure_speed(folder: Path, gb: float) -> tuple[str, bool]:
    source = folder / "source"
    size = num_bytes(write_checkpoint(source, DENSE, gb * 1e9))
    rows, is_fast = [], True
    for form in FORMATS:
        # Beside each run, for what else the machine does changes.
        read, written = dd_seconds(source, folder / "dd", size * 33 // 64)
        forget(source)
        target = folder / form
        command = [sys.executable, __file__, "--child", str(source), str(target), form]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        child = json.loads(done.stdout.splitlines()[-1])
        output = sum(path.stat().st_size for path in target.iterdir())
        remove(target)
        ratio = (read + written) / child["seconds"]
        is_fast &= ratio >= MIN_SPEED and child["peak"] <= MAX_PEAK
        rows.append(
            [
                form,
                f"{size / 1e9:.2f} GB",
                f"{output / 1e9:.2f} GB",
                f"{read:.1f} s",
                f"{written:.1f} s",
                f"{child['seconds']:.1f}",
                f"{size / child['seconds'] / 1e9:.2f}",
                f"{ratio:.0%}",
                f"{child['peak'] / 1e9:.2f} GB",
            ]
        )
    remove(source)
    text = f"""`dd` reads the checkpoint, then writes and flushes 33/64 of its size.
Seconds of the conversion: from the first line of `quantize_checkpoint` to the last byte
on the disk, compilation included. None of the files is in the page cache before.

{markdown_table(COLUMNS, rows)}"""
    return text, is_fast


def dd_seconds(source: Path, target: Path, size: int) -> tuple[float, float]:
    """Returns the seconds to read a folder's files, and to write `size` bytes."""
    forget(source)
    start = time.perf_counter()
    for path in sorted(source.glob("*.safetensors")):
        dd(f"if={path}", "of=/dev/null")
    middle = time.perf_counter()
    # Zeros: what is read plays no role for this disk, and making it costs least.
    dd(
        "if=/dev/zero",
        f"of={target}",
        f"count={size}",
        "iflag=count_bytes",
        "conv=fsync",
    )
    end = time.perf_counter()
    target.unlink()
    return middle - start, end - middle


def dd(*operands: str) -> None:
    subprocess.run(["dd", *operands, "bs=4M", "status=none"], check=True)


def forget(folder: Path) -> None:
    """Drops a folder's files from the page cache."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def remove(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


# --- Kills ----------------------------------------------------------------------------


def measure_kills(folder: Path, arguments: argparse.Namespace) -> tuple[str, bool]:
    source, whole = folder / "small", folder / "whole"
    write_checkpoint(source, MOE | {"num_experts": 16}, arguments.kill_gb * 1e9)
    before = fingerprint(source, with_times=True)
    start = time.perf_counter()
    subprocess.run(quantize_command(source, whole), check=True)
    seconds = time.perf_counter() - start
    expected = fingerprint(whole)
    moments = random.Random(arguments.seed)
    found, failures = [], 0
    for index in range(arguments.kills):
        target = folder / f"killed-{index}"
        moment = moments.uniform(0, seconds)
        process = subprocess.Popen(quantize_command(source, target))
        time.sleep(moment)
        process.kill()
        was_killed = process.wait() != 0
        left = count_shards(target)
        subprocess.run(quantize_command(source, target), check=True)
        failures += fingerprint(target) != expected
        found.append((moment, was_killed, left))
        remove(target)
    is_unchanged = fingerprint(source, with_times=True) == before
    during = [left for _, was_killed, left in found if was_killed]
    total = sum(".safetensors" in name and "json" not in name for name, _ in expected)
    kept = "unchanged" if is_unchanged else "CHANGED"
    text = f"""{arguments.kills} runs of `jmx8 quantize` on {arguments.kill_gb} GB into
{total} shards ({seconds:.1f} s each, with the start of Python) were killed by SIGKILL
at random moments. {len(during)} of them were still running, and had finished
{", ".join(map(str, sorted(during)))} shards. When they were run again,
{arguments.kills - failures} of {arguments.kills} ended byte-identical to the run that
was not killed; the source, with its times, was {kept}."""
    return text, is_unchanged and not failures


def quantize_command(source: Path, target: Path) -> list[str]:
    options = ["--shard-bytes", str(KILL_SHARD_BYTES), "--quiet"]
    code = "import sys; from jmx8.cli import main; sys.exit(main())"
    return [sys.executable, "-c", code, "quantize", str(source), str(target), *options]


def count_shards(folder: Path) -> int:
    return len(list(folder.glob("*.safetensors"))) if folder.is_dir() else 0


def fingerprint(folder: Path, *, with_times: bool = False) -> set[tuple[str, str]]:
    result = set()
    for path in folder.iterdir():
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        times = path.stat().st_mtime_ns if with_times else ""
        result.add((path.name, f"{digest} {times}"))
    return result


if __name__ == "__main__":
    sys.exit(main())

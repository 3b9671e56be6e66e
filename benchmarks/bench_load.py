"""Peak memory and time of loading a checkpoint, against loading all, then converting.

Writes a synthetic Qwen3 or Qwen3-MoE checkpoint of random bfloat16 weights, then loads
it in three ways, each in a new process. Peak memory is the allocator's on a GPU and the
resident set on the CPU, less what the process had after importing jax and jmx8 and
compiling a function; the bound is 1.10 times the final size plus the largest tensor on
disk. The checksums of the three results must agree. Exits with 1 if `jmx8.load` breaks
the bound.

    python benchmarks/bench_load.py --gib 1 --out benchmarks/results/load_cpu.md
"""

import argparse
import dataclasses
import functools
import json
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from _timing import describe_run, markdown_table

import jmx8


GIB = 2**30
SHARD_BYTES = GIB // 4
PIECE = 2**22  # elements that are made at once

# A layer of Qwen3-1.7B and of Qwen3-30B-A3B. The vocabulary is small: a large embedding
# would make the bound easy to keep.
DENSE = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 8192,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
}
MOE = DENSE | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
}
CONFIGS: dict[str, dict[str, Any]] = {"qwen3": DENSE, "qwen3_moe": MOE}

COLUMNS = [
    *("model", "method", "on disk", "largest tensor", "final", "peak", "host peak"),
    *("peak / final", "peak / bound", "seconds", "GB/s"),
]

Shapes = dict[str, tuple[int, ...]]


def main() -> int:
    arguments = parse_arguments()
    if arguments.child:
        print(json.dumps(run_child(arguments.child, Path(arguments.folder))))
        return 0
    names = list(CONFIGS) if arguments.model == "all" else [arguments.model]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        results = [
            result
            for name in names
            for result in compare(name, Path(folder) / name, arguments)
        ]
    report = format_report(results)
    print(report)
    if arguments.out:
        Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.out).write_text(report)
    broken = [r for r in results if r.method == "jmx8.load" and r.ratio > 1]
    return 1 if broken else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gib", type=float, default=1.0, help="size on disk, GiB")
    parser.add_argument("--model", choices=[*CONFIGS, "all"], default="all")
    parser.add_argument("--experts", type=int, default=32, help="of a layer")
    parser.add_argument("--folder", help="where to put the checkpoint for the while")
    parser.add_argument("--out", help="file to write the table to")
    parser.add_argument("--child", choices=list(METHODS), help=argparse.SUPPRESS)
    return parser.parse_args()


# --- The checkpoint -------------------------------------------------------------------


def layer_shapes(config: dict[str, Any], layer: int) -> Shapes:
    hidden, head = config["hidden_size"], config["head_dim"]
    queries = config["num_attention_heads"] * head
    keys = config["num_key_value_heads"] * head
    shapes = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "self_attn.q_norm.weight": (head,),
        "self_attn.k_norm.weight": (head,),
    }
    mlps, inner = ["mlp."], config["intermediate_size"]
    if "num_experts" in config:
        mlps = [f"mlp.experts.{e}." for e in range(config["num_experts"])]
        inner = config["moe_intermediate_size"]
        shapes["mlp.gate.weight"] = (config["num_experts"], hidden)
    for mlp in mlps:
        shapes |= {
            f"{mlp}gate_proj.weight": (inner, hidden),
            f"{mlp}up_proj.weight": (inner, hidden),
            f"{mlp}down_proj.weight": (hidden, inner),
        }
    return {f"model.layers.{layer}.{name}": shape for name, shape in shapes.items()}


def num_bytes(shapes: Shapes) -> int:
    return sum(2 * int(np.prod(shape)) for shape in shapes.values())


def write_checkpoint(folder: Path, config: dict[str, Any], size: float) -> Shapes:
    """Writes a checkpoint of about `size` bytes and returns the shapes in it."""
    folder.mkdir(parents=True)
    vocab = (config["vocab_size"], config["hidden_size"])
    shapes: Shapes = {
        "model.embed_tokens.weight": vocab,
        "lm_head.weight": vocab,
        "model.norm.weight": (config["hidden_size"],),
    }
    layers = max(
        1, round((size - num_bytes(shapes)) / num_bytes(layer_shapes(config, 0)))
    )
    for layer in range(layers):
        shapes |= layer_shapes(config, layer)
    config = config | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    random = np.random.default_rng(0)
    weight_map = {}
    for index, shard in enumerate(split(shapes)):
        name = f"model-{index:05}.safetensors"
        write_shard(folder / name, shard, random)
        weight_map |= dict.fromkeys(shard, name)
    index_file = folder / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"weight_map": weight_map}))
    return shapes


def split(shapes: Shapes) -> Iterator[Shapes]:
    shard: Shapes = {}
    for name, shape in shapes.items():
        shard[name] = shape
        if num_bytes(shard) >= SHARD_BYTES:
            yield shard
            shard = {}
    if shard:
        yield shard


def write_shard(path: Path, shapes: Shapes, random: np.random.Generator) -> None:
    """Writes one file, a few million random weights at a time."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + num_bytes({name: shape})
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        left = offset // 2
        while left:
            piece = random.standard_normal(min(left, PIECE), np.float32)
            file.write((0.02 * piece).astype(ml_dtypes.bfloat16).tobytes())
            left -= piece.size


# --- The measurement, in a process of its own -----------------------------------------


def load_then_convert(folder: Path, *, donate: bool) -> Any:
    model = jmx8.load(folder, dtype="bfloat16")
    return jmx8.quantize_model(model, donate=donate)


METHODS: dict[str, Callable[[Path], Any]] = {
    "jmx8.load": jmx8.load,
    "load all, then convert": functools.partial(load_then_convert, donate=False),
    "load all, then convert, donated": functools.partial(
        load_then_convert, donate=True
    ),
}


def resident_bytes(field: str) -> int:
    """Returns VmRSS or VmHWM; `ru_maxrss` would count what the parent had."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def run_child(method: str, folder: Path) -> dict[str, Any]:
    """Loads once and returns what it took."""
    device = jax.devices()[0]
    # Starts the compiler and the device, whose memory is not the loader's.
    jax.jit(lambda x: x + 1)(jnp.zeros(8)).block_until_ready()
    on_host = device.platform == "cpu"
    host_before = resident_bytes("VmRSS")
    before = 0 if on_host else device.memory_stats()["bytes_in_use"]
    start = time.perf_counter()
    model = METHODS[method](folder)
    leaves = jax.block_until_ready(jax.tree.leaves(model))
    seconds = time.perf_counter() - start
    host_peak = resident_bytes("VmHWM") - host_before
    peak = host_peak
    if not on_host:
        peak = device.memory_stats()["peak_bytes_in_use"] - before
    checksum = 0
    for leaf in leaves:
        checksum = zlib.crc32(np.asarray(leaf).view(np.uint8).data, checksum)
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "peak": peak,
        "host_peak": host_peak,
        "final": sum(leaf.nbytes for leaf in leaves),
        "seconds": seconds,
        "checksum": checksum,
    }


# --- The comparison -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Result:
    """One row of the table."""

    model: str
    method: str
    on_disk: int
    largest: int
    child: dict[str, Any]

    @property
    def ratio(self) -> float:
        return self.child["peak"] / (1.10 * self.child["final"] + self.largest)


def compare(name: str, folder: Path, arguments: argparse.Namespace) -> list[Result]:
    """Writes one checkpoint and loads it in every way."""
    config = CONFIGS[name]
    if name == "qwen3_moe":
        config = config | {"num_experts": arguments.experts}
    shapes = write_checkpoint(folder, config, arguments.gib * GIB)
    largest = max(num_bytes({"": shape}) for shape in shapes.values())
    results = []
    for method in METHODS:
        command = [sys.executable, __file__, "--child", method, "--folder", str(folder)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        child = json.loads(done.stdout.splitlines()[-1])
        results.append(Result(name, method, num_bytes(shapes), largest, child))
    checksums = {result.child["checksum"] for result in results}
    if len(checksums) != 1:
        raise RuntimeError(f"{name}: the methods give different models")
    return results


def format_report(results: list[Result]) -> str:
    on_host = results[0].child["platform"] == "cpu"
    memory = "the resident set" if on_host else "`peak_bytes_in_use` of the allocator"
    return f"""# Loading a checkpoint

{describe_run()}

Sizes in MiB. Peak: {memory}, less what it was before.
Bound: 1.10 x final + largest tensor. Seconds include compilation; the files are in the
page cache.

{markdown_table(COLUMNS, [format_row(result) for result in results])}
"""


def format_row(result: Result) -> list[str]:
    child = result.child
    sizes = (result.on_disk, result.largest, child["final"], child["peak"])
    return [
        result.model,
        result.method,
        *(f"{size / 2**20:.0f}" for size in (*sizes, child["host_peak"])),
        f"{child['peak'] / child['final']:.2f}",
        f"{result.ratio:.2f}",
        f"{child['seconds']:.1f}",
        f"{result.on_disk / child['seconds'] / 1e9:.2f}",
    ]


if __name__ == "__main__":
    sys.exit(main())

"""Feeds hostile checkpoints to everything that reads one, guided by coverage.

    pip install atheris
    python benchmarks/fuzz_checkpoint.py [--runs N] [--seed N] [CORPUS_FOLDER ...]

An execution replaces one file of a small checkpoint: a safetensors file (raw, or with
a header length that fits), config.json, the index, ModelOpt's file, or a shard. Half of
the mutations are of bytes, half of the JSON's structure. Whatever happens besides that
it is read, or refused with a `CheckpointError`, ends the run, and the input is kept as
`crash-*`: another exception, a file opened outside of the folder, more than 1 GiB of
memory allocated, or more than 10 seconds. Inputs that reach new code are added to the
first corpus folder.
"""

import argparse
import importlib
import resource
import sys
import time
from pathlib import Path
from random import Random
from typing import Any


atheris: Any = importlib.import_module("atheris")  # has no types
sys.path.insert(0, str(Path(__file__).parents[1]))
with atheris.instrument_imports(include=["jmx8.checkpoint", "jmx8.models"]):
    from tests.fuzz_target import make_target, mutate

WORDS = """
"__metadata__" "dtype" "shape" "data_offsets" "F8_E4M3" "F8_E8M0" "F8_E5M2" "U8" "BF16"
"F32" "F16" "I64" "BOOL" "weight_map" "metadata" "quantization_config" "quant_method"
"quant_algo" "MXFP8" "MIXED_PRECISION" "mxfp8" "fp8" "modelopt" "compressed-tensors"
"torchao" "format" "mxfp8-quantized" "weight_block_size" "ignore" "exclude_modules"
"modules_to_not_convert" "ignored_layers" "quantization" "re:" "model_type" "_scale"
"_scale_inv" "._weight_qdata" "._weight_scale" ".k_scale" "../" "outside.safetensors"
"/etc/passwd" "model.layers.0.mlp.up_proj.weight" "lm_head.weight" "[128, 128]" "null"
"[1, 32]" "18446744073709551615" "281474976710656" "4294967296" "-1" "1e999" "NaN"
"\\\\ud800" "\\\\u0000" "[]" "{}"
""".split()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("corpus", nargs="*", type=Path)
    arguments = parser.parse_args()
    target = make_target()
    corpus = arguments.corpus or [target.single.parent / "corpus"]
    corpus[0].mkdir(exist_ok=True, parents=True)
    for i, seed in enumerate(target.seeds()):
        (corpus[0] / f"seed-{i}").write_bytes(seed)
    words = target.single.parent / "words"
    quoted = (word.strip('"').replace('"', "") for word in WORDS)
    words.write_text("".join(f'"{word}"\n' for word in quoted))
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes = {"read": 0, "refused": 0}
    began = time.monotonic()

    def execute(data: bytes) -> None:
        outcome = "read" if target.execute(data) == "read" else "refused"
        outcomes[outcome] += 1
        if sum(outcomes.values()) % 10_000 == 0:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used
            assert peak < 2**20, f"memory grew by {peak} KiB"
            seconds = time.monotonic() - began
            print(
                f"{outcomes}, {target.num_folders} of them in a folder, in "
                f"{seconds:.0f} s, {peak} KiB more memory",
                flush=True,
            )

    def change(data: bytes, max_size: int, seed: int) -> bytes:
        if seed % 2:
            return atheris.Mutate(data, max_size)
        # libFuzzer demands that the result fits.
        return mutate(data, Random(seed))[:max_size]

    flags = [
        f"-runs={arguments.runs}",
        f"-seed={arguments.seed}",
        f"-dict={words}",
        "-max_len=8192",
        "-mutate_depth=2",  # more of them, and hardly any is JSON any more
        "-timeout=10",
        "-rss_limit_mb=0",  # what counts is how much it grows, see above
        "-print_final_stats=1",
    ]
    atheris.Setup(
        [sys.argv[0], *flags, *map(str, corpus)], execute, custom_mutator=change
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()

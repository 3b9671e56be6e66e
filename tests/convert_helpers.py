"""What the tests of conversion share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import jmx8
from jmx8.convert._walk import walk


def normal(seed, shape, dtype=jnp.bfloat16):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


@functools.partial(jax.jit, static_argnames="axis")
def quantized(x, axis=-1):
    """What conversion has to give: compiled, as op by op takes seconds per shape."""
    return jmx8.quantize(x, axis=axis)


def assert_same_bytes(actual, expected):
    """Compares two pytrees byte for byte, and everything in them but arrays."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(
            np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8)
        )


def is_mx(x):
    return isinstance(x, jmx8.MXArray)


def converted_paths(tree):
    """Returns the paths of the leaves that are MXArrays."""
    return [leaf.path for leaf in walk(tree) if is_mx(leaf.value)]


def small_tree():
    return {
        "embed": {"weight": normal(0, (50, 64))},
        "layers": [
            {
                "q_proj": {"weight": normal(1, (32, 64)), "bias": normal(2, (32,))},
                "norm": {"weight": normal(3, (64,), jnp.float32)},
                "gate": {"weight": normal(4, (50, 64))},
                "gate_proj": {"weight": normal(5, (32, 64), jnp.float32)},
            },
            {"experts": {"w13": normal(6, (4, 48, 40)), "w2": normal(7, (4, 40, 24))}},
        ],
        "lm_head": {"weight": normal(8, (50, 64))},
        "steps": jnp.arange(12).reshape(3, 4),
        "name": "tree",
        "nothing": None,
    }

"""Run as a program: the backend "sm90" on four devices of a CPU."""

import os


os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from jmx8 import _mx_array, mx_matmul, mx_moe, quantize

from . import emulated_sm90
from .helpers import assert_bits_equal


MESH = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))


def put(x, *spec):
    return jax.device_put(x, NamedSharding(MESH, P(*spec)))


def check_quantize(calls) -> None:
    """Every device converts its own blocks; blocks that are cut are put together."""
    local = {
        ((8, 128), ("d",)): (2, 128),
        ((8, 128), (None, "d")): (8, 32),
        ((8, 64), (None, "d")): (8, 64),
        ((2, 8, 64), (None, "d")): (2, 2, 64),
    }
    for (shape, spec), of_device in local.items():
        x = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
        expected = _mx_array.quantize(x)
        for run in (quantize, jax.jit(quantize), jax.jit(jax.vmap(quantize))):
            calls.clear()
            w = jax.block_until_ready(run(put(x, *spec)))
            jax.tree.map(assert_bits_equal, w, expected)
            assert w.elements.sharding.spec == P(*spec)
            assert {given["x"][1] for _, given in calls} == {of_device}


def check_ops() -> None:
    """Layers run inside shard_map, and on sharded operands nowhere else."""
    x = jax.random.normal(jax.random.key(0), (8, 64), jnp.bfloat16)
    w = quantize(jax.random.normal(jax.random.key(1), (16, 64), jnp.bfloat16))
    stack = jax.tree.map(lambda a: jnp.stack([a] * 4), quantize(jnp.ones((64, 64))))
    ids = jnp.arange(16).reshape(8, 2) % 4
    weights = jnp.ones((8, 2))
    matmul = lambda x: mx_matmul(x, w)
    moe = lambda x, ids: mx_moe(
        x, stack, stack, ids, weights[: len(x)], activation="relu2"
    )
    for function, operands in ((matmul, (x,)), (moe, (x, ids))):
        expected = function(*operands)
        sharded = [put(operand, "d") for operand in operands]
        mapped = jax.shard_map(function, mesh=MESH, in_specs=P("d"), out_specs=P("d"))
        assert_bits_equal(jax.jit(mapped)(*sharded), expected)
        with pytest.raises(jax.errors.JaxRuntimeError, match=r"inside jax\.shard_map"):
            jax.block_until_ready(jax.jit(function)(*sharded))


def main() -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        calls = emulated_sm90.use(monkeypatch)
        check_quantize(calls)
        check_ops()


if __name__ == "__main__":
    main()

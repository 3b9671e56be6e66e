"""Run as a program: calls through the FFI seam on four devices of a CPU."""

import os


os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P

from .test_ffi import call_add_one


def main() -> None:
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jnp.arange(16, dtype=jnp.float32).reshape(8, 2)
    sharded = jax.device_put(x, NamedSharding(mesh, P("d")))
    replicated = jax.device_put(x, NamedSharding(mesh, P()))

    for check_vma in (True, False):
        shard_map = jax.shard_map(
            call_add_one,
            mesh=mesh,
            in_specs=P("d"),
            out_specs=P("d"),
            check_vma=check_vma,
        )
        out = jax.jit(shard_map)(sharded)
        assert out.sharding == sharded.sharding
        np.testing.assert_array_equal(out, x + 1)

    for call in (call_add_one, jax.jit(call_add_one)):
        np.testing.assert_array_equal(call(replicated), x + 1)
        try:
            call(sharded)
        except jax.errors.JaxRuntimeError as error:
            assert "inside jax.shard_map, or replicate" in str(error), error
        else:
            raise AssertionError("sharded operands were gathered without a word")

    # A result that is wanted sharded is computed whole.
    out = jax.jit(call_add_one, out_shardings=sharded.sharding)(replicated)
    np.testing.assert_array_equal(out, x + 1)


if __name__ == "__main__":
    main()

"""Checks that new weights are sharded as the old; run on its own, 4 CPU devices."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

import jmx8


def read(array):
    return np.asarray(array).view(np.uint8)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def check(old, new, expected):
    for x, y, z in zip(*map(jax.tree.leaves, (old, new, expected)), strict=True):
        assert y.sharding == x.sharding, (x.sharding, y.sharding)
        assert y.committed and (x.dtype, x.shape) == (y.dtype, y.shape)
        assert (read(y) == read(z)).all()


def main():
    mesh = Mesh(np.asarray(jax.devices()).reshape(2, 2), ("a", "b"))
    shard = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
    w, kernel, plain = normal(0, 64, 128), normal(1, 128, 64), normal(2, 6, 4)
    make = lambda: jmx8.quantize_params(
        {
            "w": shard(w, "a", "b"),
            "kernel": shard(kernel, "b", None),
            "norm": shard(plain, "a", None),
        },
        contract={"w": -1, "kernel": -2},
        donate=False,
    )
    old = make()
    traced = []

    @jax.jit
    def forward(params, x):
        traced.append(1)
        return x @ params["w"].T + params["norm"].sum(), x @ params["kernel"]

    forward(old, jnp.ones((2, 128), jnp.bfloat16))
    new_w, new_kernel, new_plain = normal(3, 64, 128), normal(4, 128, 64), plain + 1
    expected = {
        "w": jmx8.quantize(new_w),
        "kernel": jmx8.quantize(new_kernel, axis=-2),
        "norm": new_plain,
    }
    everywhere = NamedSharding(mesh, P())
    other = NamedSharding(mesh, P("b", "a"))
    for place in (
        np.asarray,
        lambda x: x,
        lambda x: jax.device_put(x, everywhere),
        lambda x: jax.device_put(x, other),
        lambda x: jax.device_put(x, jax.devices()[3]),
    ):
        old = make()
        values = {"w": new_w, "kernel": new_kernel, "norm": new_plain}
        values = {name: place(x) for name, x in values.items()}
        new = jmx8.update_weights(old, values, donate=False)
        check(old, new, expected)
        forward(new, jnp.ones((2, 128), jnp.bfloat16))
    assert traced == [1], traced
    print("all good")


if __name__ == "__main__":
    main()

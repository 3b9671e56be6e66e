"""Checks sharded Flax models; run on its own, with 4 CPU devices."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn, nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import jmx8
from jmx8.flax import KernelAxes


MESH = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def read(array):
    return np.asarray(array).view(np.uint8)


def specs(array):
    entries = tuple(array.sharding.spec)
    return entries + (None,) * (array.ndim - len(entries))


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        names = lambda *names: {"out_sharding": names}
        self.up = nnx.Linear(128, 64, rngs=rngs, kernel_metadata=names("data", "model"))
        self.heads = nnx.LinearGeneral(
            64, (4, 16), rngs=rngs, kernel_metadata=names("data", "model", None)
        )
        self.down = nnx.LinearGeneral(
            (4, 16),
            128,
            axis=(-2, -1),
            rngs=rngs,
            kernel_metadata=names("model", None, "data"),
        )

    def __call__(self, x):
        return self.down(self.heads(self.up(x)))


STORED = {
    "up": ("model", "data"),
    "heads": ("model", "data"),
    "down": ("data", "model"),
}


def check_nnx():
    # Flax shards what a model makes under a mesh, by the names.
    with jax.set_mesh(MESH):
        placed: Any = nnx.state(Net())
    nnx.use_eager_sharding(False)
    assert specs(placed["heads"].kernel.get_value()) == ("data", "model", None)
    q = jmx8.quantize_params(placed, contract={"heads/kernel": (0,), "down/*": (0, 1)})
    whole = jmx8.quantize_params(Net())
    for name, expected in STORED.items():
        kernel, reference = q[name].kernel, getattr(whole, name).kernel
        assert kernel.out_sharding == reference.out_sharding == expected
        for part in ("elements", "scales"):
            array = getattr(kernel.get_value(), part)
            assert specs(array) == expected, (name, specs(array))
            same = getattr(reference.get_value(), part)
            assert (read(array) == read(same)).all(), name
    # The names place a state that was loaded whole just as the arrays were placed.
    graph, state = nnx.split(whole)
    later = jax.device_put(state, nnx.get_named_sharding(state, MESH))
    for a, b in zip(jax.tree.leaves(later), jax.tree.leaves(q), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)

    x = jax.random.normal(jax.random.key(1), (3, 128))
    run = nnx.jit(lambda model, x: model(x))
    np.testing.assert_allclose(
        run(nnx.merge(graph, later), x), run(whole, x), rtol=1e-4, atol=1e-5
    )


def check_abstract():
    abstract = nnx.eval_shape(Net)
    with jax.set_mesh(MESH):
        q = jmx8.quantize_params(nnx.as_abstract(abstract))
    for name, expected in STORED.items():
        kernel = getattr(q, name).kernel.get_value()
        assert isinstance(kernel.elements, jax.ShapeDtypeStruct)
        assert specs_of(kernel.elements) == expected
        assert specs_of(kernel.scales) == expected


def specs_of(struct):
    entries = tuple(struct.sharding.spec)
    return entries + (None,) * (len(struct.shape) - len(entries))


def check_linen():
    init = nn.initializers.lecun_normal()
    layer = nn.Dense(64, kernel_init=nn.with_partitioning(init, ("data", "model")))
    x = jax.random.normal(jax.random.key(1), (3, 128))
    variables = layer.init(jax.random.key(0), x)
    whole = jmx8.quantize_params(nn.unbox(variables["params"]), donate=False)
    q = jmx8.quantize_params(variables["params"], donate=False)
    assert q["kernel"].names == ("model", "data")
    with jax.set_mesh(MESH):
        traced = jax.make_jaxpr(layer.apply)(variables, x)
    assert str(traced).count(" sharding_constraint[") == 1  # Flax's own, and no other
    assert nn.get_partition_spec(q)["kernel"] == P("model", "data")
    placed = jax.device_put(q, nn.get_sharding(q, MESH))
    assert specs(placed["kernel"].value.elements) == ("model", "data")
    run = jax.jit(lambda q, x: layer.apply({"params": q}, x))
    with jax.set_mesh(MESH):
        y = run(placed, x)
    np.testing.assert_allclose(y, run(whole, x), rtol=1e-4, atol=1e-5)


def check_inner_axis_is_refused():
    kernel = jnp.ones((64, 4, 16))
    sharded = jax.device_put(kernel, NamedSharding(MESH, P(None, None, "model")))
    for axes in ((0,), KernelAxes((0,))):
        try:
            jmx8.quantize_params({"query": {"kernel": sharded}}, contract=axes)
        except ValueError as error:
            assert "axis 2 split" in str(error), error
        else:
            raise AssertionError("a split inner axis was accepted")
    split = jax.device_put(kernel, NamedSharding(MESH, P(("data", "model"))))
    try:
        jmx8.quantize_params({"query": {"kernel": split}})
    except ValueError as error:
        assert "shards of 16" in str(error), error
    else:
        raise AssertionError("a split block was accepted")
    assert not split.is_deleted() and not sharded.is_deleted()


check_nnx()
check_abstract()
check_linen()
check_inner_axis_is_refused()
print("all good")

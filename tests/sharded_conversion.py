"""Checks conversion of sharded arrays; run on its own, with 4 CPU devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import jmx8
from jmx8.convert import quantize_params


def read(array):
    return np.asarray(array).view(np.uint8)


def full(spec, ndim):
    return tuple(spec) + (None,) * (ndim - len(tuple(spec)))


@functools.partial(jax.jit, static_argnames="axis")
def quantized(x, axis):
    return jmx8.quantize(x, axis=axis)


def check_sharding(out, mesh, spec, ndim, axis):
    wanted = full(spec, ndim)
    if axis == -2:
        wanted = (*wanted[:-2], wanted[-1], wanted[-2])
    for part in (out.elements, out.scales):
        assert isinstance(part.sharding, NamedSharding), part.sharding
        assert part.sharding.mesh == mesh
        assert full(part.sharding.spec, ndim) == wanted, part.sharding


def check_bytes(out, placed, expected, axis):
    """Checks the whole, and on each device what quantizing its own shard gives."""
    local = {
        shard.device: np.asarray(shard.data) for shard in placed.addressable_shards
    }
    for part in ("elements", "scales"):
        array = getattr(out, part)
        assert (read(array) == read(getattr(expected, part))).all()
        for shard in array.addressable_shards:
            alone = getattr(quantized(local[shard.device], axis), part)
            assert (read(alone) == read(shard.data)).all()
    # Quantize, then shard: the same bytes on the same devices.
    later = jax.device_put(expected.elements, out.elements.sharding)
    pairs = zip(later.addressable_shards, out.elements.addressable_shards, strict=True)
    for a, b in pairs:
        assert a.device == b.device and (read(a.data) == read(b.data)).all()


def check_report(x, placed, axis):
    """Checks that a sharded array's row is that of the array on one device."""
    _, report = quantize_params({"w": placed}, contract=axis, return_report=True)
    assert placed.is_deleted()
    _, single = quantize_params({"w": x}, contract=axis, return_report=True)
    a, b = report.rows[0].statistics, single.rows[0].statistics
    assert a is not None and b is not None
    assert abs(a.sqnr_db - b.sqnr_db) < 1e-4, (a, b)
    assert a.amax == b.amax
    assert (a.exponent_min, a.exponent_max) == (b.exponent_min, b.exponent_max)
    assert report.bytes_before == single.bytes_before
    assert report.bytes_after == single.bytes_after


def check(mesh, shape, spec, axis):
    x = np.asarray(jax.random.normal(jax.random.key(0), shape, jnp.bfloat16))
    sharding = NamedSharding(mesh, spec)
    placed = jax.device_put(x, sharding)
    abstract = jax.ShapeDtypeStruct(shape, x.dtype, sharding=sharding)
    for value in (placed, abstract):
        out = quantize_params({"w": value}, contract=axis, donate=False)["w"]
        check_sharding(out, mesh, spec, len(shape), axis)
        assert out.shape == shape
        if value is placed:
            check_bytes(out, placed, quantized(x, axis), axis)
    check_report(x, placed, axis)


def check_refusal(tree):
    try:
        quantize_params(tree)
    except ValueError as error:
        text = str(error)
    else:
        raise AssertionError("nothing was refused")
    end = "which is not a multiple of 32. Split it less, or another axis."
    assert text.splitlines() == [
        "quantize_params: bad/weight: has its contracted axis of 96 split into shards "
        f"of 48, {end}",
        "quantize_params: worse/kernel: has its contracted axis of 64 split into "
        f"shards of 16, {end}",
    ], text


def abstract(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def check_mesh(mesh):
    both = ("a", "b")
    for axis in (-1, -2):
        check(mesh, (128, 128), P("a", "b"), axis)
    check(mesh, (4, 64, 64), P("a", None, "b"), -1)
    # Padded along an axis that is not sharded.
    check(mesh, (40, 64), P(None, "a"), -2)
    if mesh.axis_types[0] is AxisType.Auto:
        check(mesh, (128, 128), P(), -1)
        check(mesh, (128, 128), P("a"), -2)
        check(mesh, (128, 128), P(None, both), -1)
        check(mesh, (128, 128), P(None, both), -2)
        check(mesh, (4, 64, 64), P("a", "b"), -2)

    def put(shape, spec):
        ones = np.ones(shape, jnp.bfloat16)
        return jax.device_put(ones, NamedSharding(mesh, spec))

    tree = {
        "good": {"weight": put((32, 64), P("a"))},
        "bad": {"weight": put((32, 96), P(None, "a"))},
        "worse": {"kernel": put((64, 32), P(both))},
    }
    check_refusal(tree)
    assert not any(x.is_deleted() for x in jax.tree.leaves(tree))
    check_refusal(jax.tree.map(abstract, tree))

    # A NaN that only the last device has.
    values = np.ones((32, 64), jnp.bfloat16)
    values[31, 63] = np.nan
    try:
        spread = jax.device_put(values, NamedSharding(mesh, P("a", "b")))
        quantize_params({"weight": spread})
    except ValueError as error:
        assert "weight: 1 NaN, 0 infinite" in str(error)
    else:
        raise AssertionError("NaN was not found")

    # A copy on every device that shares its memory with the one that is kept.
    kept = jnp.ones((32, 64))
    everywhere = jax.device_put(kept, NamedSharding(mesh, P()))
    out = quantize_params({"embed": {"weight": kept}, "out": {"weight": everywhere}})
    assert not kept.is_deleted() and out["embed"]["weight"] is kept

    # Inside jit, where the compiler places the result.
    y = jax.device_put(
        np.asarray(jax.random.normal(jax.random.key(1), (64, 128))),
        NamedSharding(mesh, P("a", "b")),
    )
    traced = jax.jit(quantize_params)({"weight": y})["weight"]
    eager = quantize_params({"weight": y})["weight"]
    assert (read(traced.elements) == read(eager.elements)).all()
    assert (read(traced.scales) == read(eager.scales)).all()


if __name__ == "__main__":
    assert len(jax.devices()) == 4
    for kind in (AxisType.Auto, AxisType.Explicit):
        check_mesh(jax.make_mesh((2, 2), ("a", "b"), axis_types=(kind, kind)))
    print("all good")

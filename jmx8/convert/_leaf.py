"""Conversion of one tensor: concrete, sharded, abstract or traced."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from .._kernel_axes import as_kernel, KernelAxes, MXKernel
from .._mx_array import BLOCK_SIZE, MXArray
from ..ops.quantize import quantize
from .report import measure, ReportRow, Statistics


# What is contracted: the axis -1 or -2, or several, which are flattened to -2.
Axis = int | KernelAxes


def convert_leaf(
    path: str, x: Any, axis: Axis = -1, *, reason: str = "", with_stats: bool = False
) -> tuple[MXArray, ReportRow]:
    """Quantizes one tensor and describes what happened.

    Args:
        path: Its path, for the row.
        x: `jax.Array`, numpy array, `ShapeDtypeStruct` or tracer of a float dtype.
        axis: The contracted axis, -1 or -2, or axes.
        reason: How the axis is known, for the row.
        with_stats: Whether to compute the row's statistics, which reads `x` once
            more. They stay None for an abstract or traced `x`.

    Returns:
        The quantized tensor and its row.
    """
    on_device = jnp.asarray(x) if isinstance(x, np.ndarray) else x
    w = quantize_leaf(on_device, axis)
    measured = with_stats and is_concrete(x)
    row = ReportRow(
        path=path,
        shape=tuple(x.shape),
        dtype=str(x.dtype),
        action="converted",
        reason=reason,
        axis=axis if isinstance(axis, int) else -2,
        bytes_before=_num_bytes(x),
        bytes_after=w.nbytes,
        statistics=_measure(on_device, w, axis) if measured else None,
    )
    return w, row


def kept_row(path: str, x: Any, reason: str) -> ReportRow:
    """Returns the row of a tensor that is not converted; an `MXArray` is one too."""
    size = _num_bytes(x)
    shape, dtype = tuple(x.shape), str(x.dtype)
    return ReportRow(path, shape, dtype, "kept", reason, None, size, size)


def quantize_leaf(x: Any, axis: Axis = -1) -> MXArray:
    """Quantizes one tensor where it is, with one compilation per shape and dtype.

    A `NamedSharding` is kept: elements and scales have the spec of `x`, with the last
    two entries exchanged for axis -2, and those of `KernelAxes.stored` for axes. Every
    device quantizes what it holds.

    Args:
        x: `jax.Array`, numpy array, `ShapeDtypeStruct` or tracer of a float dtype.
        axis: The contracted axis, -1 or -2, or axes.

    Returns:
        The quantized tensor; of `ShapeDtypeStruct`s if `x` is one.

    Raises:
        ValueError: If `sharding_problem` finds one.
    """
    if isinstance(x, Tracer):
        return _presented(_quantize(x, axis), axis, x.shape)
    problem = sharding_problem(x, axis)
    if problem:
        raise ValueError(f"quantize_leaf: {problem}")
    if isinstance(x, jax.ShapeDtypeStruct):
        return _abstract(x, axis)
    sharding: Any = getattr(x, "sharding", None)
    if isinstance(sharding, NamedSharding):
        w = _sharded_quantize(sharding.mesh, _spec(sharding, x.ndim), axis)(x)
    else:
        w = _jitted_quantize(jnp.asarray(x), axis)
    return _presented(w, axis, x.shape)


def _presented(w: MXArray, axis: Axis, shape: tuple[int, ...]) -> MXArray:
    """Returns what `_quantize` made of an array of `shape`, with that shape."""
    return w if isinstance(axis, int) else as_kernel(w, axis, shape)


def _quantize(x: Array, axis: Axis) -> MXArray:
    """Quantizes an array, flattened if it has several axes of a kind."""
    if isinstance(axis, KernelAxes):
        return quantize(axis.flatten(x), axis=-2)
    return quantize(x, axis=axis)


def _measure(x: Array, w: MXArray, axis: Axis) -> Statistics:
    if isinstance(axis, int) or not isinstance(x.sharding, NamedSharding):
        return measure(x, w)
    # What a device holds of either is the same if both are flattened.
    spec = _spec(x.sharding, x.ndim)
    out = _swap(_stored(spec, axis))
    flat = _shard_map(axis.flatten, x.sharding.mesh, spec, out)(x)
    return measure(flat, w.flat if isinstance(w, MXKernel) else w)


def sharding_problem(x: Any, axis: Axis) -> str:
    """Returns why `x` cannot be quantized as it is sharded; "" if it can."""
    sharding = getattr(x, "sharding", None)
    if isinstance(x, Tracer) or sharding is None:
        return ""
    if not isinstance(sharding, NamedSharding):
        if len(sharding.device_set) == 1:
            return ""
        return f"is on several devices by {sharding}. Use a NamedSharding."
    shape = tuple(x.shape)
    local = sharding.shard_shape(shape)
    if isinstance(axis, KernelAxes):
        axes = axis.normalize(len(shape))
        for group in (axes.contracted, axes.free(len(shape))):
            split = [i for i in group[1:] if local[i] != shape[i]]
            if split:
                return (
                    f"has its axis {split[0]} split, which is flattened behind another "
                    f"as {axis} says. Split axis {group[0]} instead."
                )
        k, part = axis.flat_shape(shape)[-2], axis.flat_shape(local)[-2]
    else:
        k, part = shape[axis], local[axis]
    if part != k and part % BLOCK_SIZE != 0:
        return (
            f"has its contracted axis of {k} split into shards of {part}, which is "
            f"not a multiple of {BLOCK_SIZE}. Split it less, or another axis."
        )
    return ""


def count_nonfinite(x: Any) -> tuple[int, int]:
    """Returns how many values of a concrete array are NaN and how many infinite."""
    nan, inf = jax.device_get(_nonfinite(jnp.asarray(x)))
    return int(nan), int(inf)


def is_concrete(x: Any) -> bool:
    """Whether `x` is an array with values, neither abstract nor traced."""
    return isinstance(x, (jax.Array, np.ndarray)) and not isinstance(x, Tracer)


def is_deleted(x: Any) -> bool:
    """Whether `x` is a jax array whose memory has been freed."""
    return isinstance(x, jax.Array) and is_concrete(x) and x.is_deleted()


def buffers(x: Any) -> frozenset[Any]:
    """Returns keys of the memory that an array occupies."""
    if isinstance(x, MXArray):
        return buffers(x.elements) | buffers(x.scales)
    if (
        not is_concrete(x)
        or isinstance(x, np.ndarray)
        or jnp.issubdtype(x.dtype, jax.dtypes.extended)
        or x.size == 0
        or is_deleted(x)
    ):
        return frozenset([id(x)])
    # Not id: `jax.device_put` may return another array object on the same memory.
    shards = [shard.data for shard in x.addressable_shards]
    return frozenset((s.device, s.unsafe_buffer_pointer()) for s in shards)


def free(x: Any, *, after: MXArray) -> None:
    """Frees a jax array once `after`, which was computed from it, is there."""
    if isinstance(x, jax.Array) and is_concrete(x):
        jax.block_until_ready(after)
        x.delete()


@jax.jit
def _nonfinite(x: Array) -> tuple[Array, Array]:
    # int64 where it is enabled; int32 holds any count of a tensor below 4 GiB.
    return jnp.sum(jnp.isnan(x)), jnp.sum(jnp.isinf(x))


_jitted_quantize = jax.jit(_quantize, static_argnames="axis")


@functools.cache
def _sharded_quantize(mesh: Any, spec: PartitionSpec, axis: Axis) -> Any:
    quantize_shard = functools.partial(_quantize, axis=axis)
    return _shard_map(quantize_shard, mesh, spec, _stored(spec, axis))


def _shard_map(function: Any, mesh: Any, spec: PartitionSpec, out: PartitionSpec):
    # shard_map states what the compiler could only be trusted to find: no block
    # crosses a shard, so nothing is communicated.
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=out))


def _abstract(x: jax.ShapeDtypeStruct, axis: Axis) -> MXArray:
    plain = jax.ShapeDtypeStruct(x.shape, x.dtype)
    w = jax.eval_shape(functools.partial(quantize_leaf, axis=axis), plain)
    sharding = x.sharding
    if isinstance(sharding, NamedSharding):
        spec = _spec(sharding, len(x.shape))
        sharding = NamedSharding(sharding.mesh, _stored(spec, axis))
    return jax.tree.map(
        lambda part: jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=sharding), w
    )


def _spec(sharding: NamedSharding, ndim: int) -> PartitionSpec:
    """Returns the spec with an entry for every axis."""
    entries = tuple(sharding.spec)
    return PartitionSpec(*entries, *[None] * (ndim - len(entries)))


def _stored(spec: PartitionSpec, axis: Axis) -> PartitionSpec:
    """Returns the spec of elements and scales."""
    if isinstance(axis, KernelAxes):
        return PartitionSpec(*axis.stored(tuple(spec)))
    return _swap(spec) if axis == -2 else spec


def _swap(spec: PartitionSpec) -> PartitionSpec:
    *batch, second_last, last = spec
    return PartitionSpec(*batch, last, second_last)


def _num_bytes(x: Any) -> int:
    if isinstance(x, MXArray):
        return x.nbytes
    return int(np.prod(x.shape, dtype=np.int64)) * x.dtype.itemsize

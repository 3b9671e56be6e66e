"""Conversion to MXFP8 in one pass: the bits of `_numerics.quantize_rows`."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, BFloat16, Float8e4m3fn

from ..._numerics import BLOCK_SIZE, quantize_rows
from ..._types import Float8e8m0fnu
from .._ffi import Output
from . import kernels, library


def unsupported(x: Array) -> str | None:
    """Returns why `quantize` cannot run here, None if it can."""
    if problem := library.why_not_here():
        return problem
    if x.dtype != jnp.bfloat16:
        return f"it converts bfloat16, and x is {x.dtype}"
    if x.ndim == 0 or x.shape[-1] % BLOCK_SIZE or x.size == 0:
        return f"the last axis is not a positive multiple of {BLOCK_SIZE}"
    if any(jax.typeof(x).sharding.spec):
        return "x is sharded over explicit axes of a mesh"
    return None


@jax.custom_jvp
def quantize(
    x: BFloat16[Array, "*batch k"],
) -> tuple[Float8e4m3fn[Array, "*batch k"], Float8e8m0fnu[Array, "*batch blocks"]]:
    """Returns elements and scales; batched, sharded and differentiated as in XLA."""
    return _jitted(x)


@quantize.defjvp
def _jvp(primals, tangents):
    return jax.jvp(quantize_rows, primals, tangents)


@jax.custom_batching.custom_vmap
def _quantize(x):
    return _partitioned(x.ndim)(x)


@_quantize.def_vmap
def _rule(axis_size, in_batched, x):
    del axis_size, in_batched
    return _quantize(x), (True, True)


# Outside `jit` nothing is partitioned, and so a sharded array would be gathered.
_jitted = jax.jit(_quantize)


def _call(x):
    blocks = (*x.shape[:-1], x.shape[-1] // BLOCK_SIZE)
    return kernels.QUANTIZE(
        x=x,
        elements=Output(x.shape, jnp.float8_e4m3fn),
        scales=Output(blocks, jnp.float8_e8m0fnu),
    )


@functools.cache  # so that calls outside `jit` compile once
def _partitioned(ndim: int):
    """Returns `_call` such that each device converts the blocks that it has."""

    def partition(mesh, operands, results):
        (x,) = operands
        sharding = x.sharding
        if sharding.shard_shape(x.shape)[-1] % BLOCK_SIZE:
            sharding = NamedSharding(mesh, PartitionSpec())
        return mesh, _call, tuple(sharding for _ in results), (sharding,)

    call = custom_partitioning(lambda x: _call(x))
    rows = " ".join(f"a{i}" for i in range(ndim - 1))
    call.def_partition(
        partition,
        sharding_rule=f"{rows} (s t) -> {rows} (s t), {rows} s",
        need_replication_factors=("t",),
        t=BLOCK_SIZE,
        decode_shardings=False,
    )
    return call

"""What a jaxpr computes outside the ops of jmx8."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def float_shapes(function: Any, *args: Any) -> set[tuple[int, ...]]:
    """Returns the shapes of all arrays of 16-bit or wider floats that are made.

    What an op of jmx8 does inside is not counted, only what it returns.
    """
    return {*_float_shapes(jax.make_jaxpr(function)(*args).jaxpr)}


def largest_float(function: Any, *args: Any) -> int:
    """Returns the size of the largest of these arrays."""
    shapes = float_shapes(function, *args)
    return max(np.prod(shape, dtype=int) for shape in shapes)


def _float_shapes(jaxpr: Any) -> Iterator[tuple[int, ...]]:
    for eqn in jaxpr.eqns:
        inner = [*_jaxprs(eqn)]
        if inner and eqn.primitive.name != "custom_vmap_call":
            for sub in inner:
                yield from _float_shapes(sub)
            continue
        for var in eqn.outvars:
            dtype = var.aval.dtype
            if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits > 8:
                yield var.aval.shape


def _jaxprs(eqn: Any) -> Iterator[Any]:
    for param in eqn.params.values():
        for value in param if isinstance(param, tuple | list) else (param,):
            if hasattr(getattr(value, "jaxpr", value), "eqns"):
                yield getattr(value, "jaxpr", value)

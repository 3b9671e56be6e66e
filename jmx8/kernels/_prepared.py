"""Weights in the layout of one backend, derived from canonical ones."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._mx_array import MXArray, quantize


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a backend stores a weight, or a bias that goes with it.

    Attributes:
        name: What error messages and reprs call it.
        prepare: From the canonical array, not transposed, to those of the backend.
        restore: From the arrays and an abstract canonical one to what they were made
            from, bit for bit.
    """

    name: str
    prepare: Callable[[Any], tuple[Array, ...]]
    restore: Callable[[tuple[Array, ...], Any], Any]


class PreparedWeights(eqx.Module):
    """An `MXArray`, or a bias, that was rearranged for the kernels of one backend.

    Made once, after loading, by `jmx8.prepare`, to take the array's place in a layer.
    Only canonical arrays are saved, sharded and updated: `canonical` gives them back,
    bit for bit.

    Attributes:
        arrays: What the kernel takes.
        layout: How they came about.
        shape: Shape of the canonical array, `[..., n, k]`.
        dtype: Its dtype; what an `MXArray` stands for.
        is_mx: Whether the canonical array is an `MXArray`.
    """

    arrays: tuple[Array, ...]
    layout: Layout = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(static=True)
    dtype: np.dtype = eqx.field(static=True, converter=jnp.dtype)
    is_mx: bool = eqx.field(static=True)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.arrays)

    def canonical(self) -> MXArray | Array:
        """Returns the array that this was prepared from."""
        like = jax.ShapeDtypeStruct(self.shape, self.dtype)
        like = jax.eval_shape(quantize, like) if self.is_mx else like
        return self.layout.restore(self.arrays, like)

    def __repr__(self) -> str:
        shape = ",".join(map(str, self.shape))
        return f"PreparedWeights({self.dtype.name}[{shape}], {self.layout.name})"

    def __pdoc__(self, **_):
        import wadler_lindig as wl  # Equinox's own pretty-printer

        return wl.TextDoc(repr(self))


def prepare_weights(w: MXArray | Array, layout: Layout) -> PreparedWeights:
    """Rearranges `w`, which must not be transposed, as `layout` says."""
    arrays = layout.prepare(w)
    return PreparedWeights(arrays, layout, w.shape, w.dtype, isinstance(w, MXArray))


def is_prepared(node: Any) -> bool:
    return isinstance(node, PreparedWeights)


def to_canonical(tree: Any) -> Any:
    """Returns `tree` with `MXArray`s in place of `PreparedWeights`."""
    restore = lambda node: node.canonical() if is_prepared(node) else node
    return jax.tree.map(restore, tree, is_leaf=is_prepared)

"""Which axes of a kernel with several axes a layer contracts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclass(frozen=True)
class KernelAxes:
    """The roles of the axes of a kernel such as `[embed, heads, head_dim]`.

    An `MXArray` has one contracted axis, the second-last of `[..., k, n]`. A kernel of
    another shape is flattened to `[*batch, k, n]` when it is quantized: its contracted
    axes become k and what is left becomes n, each in the kernel's order. The layer
    that holds it knows its own shape and restores it in the output.

    Attributes:
        contracted: The axes that the product sums over.
        batch: The axes that the kernel shares with the input and the output. Each
            index of them is a product of its own.
    """

    contracted: tuple[int, ...]
    batch: tuple[int, ...] = ()

    def normalize(self, ndim: int) -> "KernelAxes":
        """Returns the same with sorted, non-negative axes.

        Raises:
            ValueError: If an axis does not exist, comes twice, or none is contracted.
        """
        axes = (*self.contracted, *self.batch)
        positive = [axis + ndim if axis < 0 else axis for axis in axes]
        valid = all(0 <= axis < ndim for axis in positive)
        if not valid or not self.contracted or len(set(positive)) != len(positive):
            raise ValueError(
                "KernelAxes: needs at least one contracted axis, and different axes of "
                f"a kernel of {ndim}, got {self}."
            )
        count = len(self.contracted)
        return KernelAxes(
            tuple(sorted(positive[:count])), tuple(sorted(positive[count:]))
        )

    def free(self, ndim: int) -> tuple[int, ...]:
        """Returns the axes that only the kernel and the output have."""
        axes = self.normalize(ndim)
        return tuple(
            i for i in range(ndim) if i not in axes.contracted and i not in axes.batch
        )

    def permutation(self, ndim: int) -> tuple[int, ...]:
        """Returns the axes in the order batch, contracted, free."""
        axes = self.normalize(ndim)
        return (*axes.batch, *axes.contracted, *self.free(ndim))

    def after(self, count: int) -> "KernelAxes":
        """Returns the axes of a stack of such kernels: `count` more come first."""
        shift = lambda axes: tuple(axis + count for axis in axes)
        return KernelAxes(shift(self.contracted), (*range(count), *shift(self.batch)))

    def flat_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Returns the shape `[*batch, k, n]` of a kernel of `shape`."""
        axes = self.normalize(len(shape))
        return (
            *(shape[axis] for axis in axes.batch),
            math.prod(shape[axis] for axis in axes.contracted),
            math.prod(shape[axis] for axis in self.free(len(shape))),
        )

    def flatten(self, kernel: Float[Array, "..."]) -> Float[Array, "*batch k n"]:
        """Returns the kernel as `[*batch, k, n]`."""
        moved = jnp.transpose(kernel, self.permutation(kernel.ndim))
        return moved.reshape(self.flat_shape(kernel.shape))

    def stored(self, entries: Sequence[Any]) -> tuple[Any, ...]:
        """Returns one entry per axis of the elements `[*batch, n, k]` of the MXArray.

        Args:
            entries: One per axis of the kernel, such as the names of mesh axes. A
                flattened axis gets that of its first: a shard of a later one would
                not be contiguous.
        """
        axes = self.normalize(len(entries))
        free = self.free(len(entries))
        return (
            *(entries[axis] for axis in axes.batch),
            entries[free[0]] if free else None,
            entries[axes.contracted[0]],
        )


def einsum_axes(spec: str) -> KernelAxes:
    """Returns the roles of the axes of the second operand of `jnp.einsum`.

    Args:
        spec: An explicit equation of two operands, of which the first and the result
            may have an ellipsis.

    Raises:
        ValueError: If the kernel has an ellipsis, an axis that comes twice, or one
            that is summed without the input having it.
    """
    inputs, result = spec.replace(" ", "").split("->")
    x, kernel = inputs.split(",")
    alone = [c for c in kernel if c not in x and c not in result]
    if "." in kernel or len(set(kernel)) != len(kernel) or alone:
        raise ValueError(
            "einsum: an MXArray needs an equation whose kernel has neither an ellipsis "
            f"nor repeated axes, nor axes summed on their own, got {spec!r}."
        )
    shared = [i for i, c in enumerate(kernel) if c in x]
    return KernelAxes(
        tuple(i for i in shared if kernel[i] not in result),
        tuple(i for i in shared if kernel[i] in result),
    )

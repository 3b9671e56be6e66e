"""Kernels with several axes to contract or to keep, as layers of Flax have them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._mx_array import MXArray


@dataclass(frozen=True)
class KernelAxes:
    """The roles of the axes of a kernel such as `[embed, heads, head_dim]`.

    A kernel is flattened to `[*batch, k, n]` when it is quantized: its contracted axes
    become k and what is left becomes n, each in the kernel's order.

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

    def without_leading(self) -> "KernelAxes":
        """Returns the axes without batch axes in front of all others."""
        count = 0
        while count in self.batch:
            count += 1
        shift = lambda axes: tuple(axis - count for axis in axes if axis >= count)
        return KernelAxes(shift(self.contracted), shift(self.batch))

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

    def unflatten(self, flat: Array, shape: Sequence[int]) -> Array:
        """Returns the kernel of `shape` of which `flat` was made."""
        order = self.permutation(len(shape))
        moved = flat.reshape([shape[axis] for axis in order])
        return jnp.transpose(moved, [order.index(axis) for axis in range(len(shape))])

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


class MXKernel(MXArray):
    """An `MXArray` with the shape of a kernel such as `[embed, heads, head_dim]`.

    Elements and scales are those of the flattened kernel, `[*batch, n, k]`. Axes in
    front of all others are batch axes, and may come and go, as `jax.vmap` makes them.
    It is made for `jmx8.ops.folded`, which layers of Flax call; `@` refuses it.

    Attributes:
        axes: The roles of the kernel's axes, without batch axes in front.
        contracted_shape: The sizes of its contracted axes.
        free_shape: The sizes of its free axes.
    """

    axes: KernelAxes = eqx.field(static=True, kw_only=True)
    contracted_shape: tuple[int, ...] = eqx.field(static=True, kw_only=True)
    free_shape: tuple[int, ...] = eqx.field(static=True, kw_only=True)

    @property
    def kernel_axes(self) -> KernelAxes:
        """The roles of all axes of `shape`."""
        stacked = len(self.elements.shape) - 2 - len(self.axes.batch)
        return self.axes.after(stacked)

    @property
    def shape(self) -> tuple[int, ...]:
        axes = self.kernel_axes
        sizes = (*self.elements.shape[:-2], *self.contracted_shape, *self.free_shape)
        order = axes.permutation(len(sizes))
        return tuple(sizes[order.index(axis)] for axis in range(len(sizes)))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def flat(self) -> MXArray:
        """The kernel as `[*batch, k, n]`."""
        parts = self.elements, self.scales
        return MXArray(*parts, self.padding, self.dtype, self.transposed)

    def presented(self, values: Array) -> Array:
        return self.kernel_axes.unflatten(values, self.shape)

    def __rmatmul__(self, x: Any) -> Array:
        raise TypeError(
            f"x @ w: w is an MXKernel of shape {self.shape}, of which a product "
            f"contracts {self.kernel_axes.contracted}. Use `x @ w.flat`, or "
            "`jmx8.quantized` around the function."
        )

    def __repr__(self) -> str:
        contracted = self.kernel_axes.contracted
        return f"{MXArray.__repr__(self)[:-1]}, axes {contracted} of a kernel)"


def as_kernel(flat: MXArray, axes: KernelAxes, shape: Sequence[int]) -> MXKernel:
    """Returns the kernel of `shape` that was flattened and quantized to `flat`."""
    axes, free = axes.normalize(len(shape)), axes.free(len(shape))
    sizes = lambda group: tuple(shape[axis] for axis in group)
    return MXKernel(
        flat.elements,
        flat.scales,
        flat.padding,
        flat.dtype,
        flat.transposed,
        axes=axes.without_leading(),
        contracted_shape=sizes(axes.contracted),
        free_shape=sizes(free),
    )


def matmul_axes(ndim: int) -> KernelAxes:
    """Returns the roles of the axes of `[*batch, k, n]`."""
    return KernelAxes((ndim - 2,), tuple(range(ndim - 2)))


def kernel_axes(w: MXArray) -> KernelAxes | None:
    """Returns the roles of the axes of `w`; None if it is `[..., n, k]`."""
    if isinstance(w, MXKernel):
        return w.kernel_axes
    return matmul_axes(w.ndim) if w.transposed else None


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

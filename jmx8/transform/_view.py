"""MXFP8 arrays whose axes are in any order, and what moves them without widening.

An `MXArray` has its blocks along one of its last two axes. Between a weight and the
product that it is meant for, ordinary code transposes, reshapes and slices; an `MXView`
keeps up with that. Data is moved as bytes, since XLA's CPU compiler would widen FP8 to
move it, and only if the stored order really changes.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._kernel_axes import MXKernel
from .._mx_array import BLOCK_SIZE, dequantize, MXArray


class NoRule(Exception):
    """Why an operation cannot be done on MXFP8 arrays, and what to do about it."""


class MXView(eqx.Module):
    """An MXFP8 array as a function sees it that was written for ordinary arrays.

    Attributes:
        elements: E4M3 codes; blocks along the last axis, whatever that is called.
        scales: E8M0 exponents, the same axes but for the last, which is 32 times
            shorter.
        axes: Axis `i` of the array is axis `axes[i]` of `elements`.
        padding: How many trailing elements of the last axis of `elements` are not
            elements of the array.
        dtype: Dtype that the array stands for.
        is_rows: Whether these are single rows, picked by index. A function uses them as
            values (embeddings), so that they may be widened.
    """

    elements: Any
    scales: Any
    axes: tuple[int, ...] = eqx.field(static=True)
    padding: int = eqx.field(static=True)
    dtype: np.dtype = eqx.field(static=True)
    is_rows: bool = eqx.field(static=True, default=False)

    @property
    def ndim(self) -> int:
        return len(self.axes)

    @property
    def block_axis(self) -> int:
        """The axis that the blocks run along."""
        return self.axes.index(self.ndim - 1)

    @property
    def shape(self) -> tuple[int, ...]:
        stored = list(self.elements.shape)
        stored[-1] -= self.padding
        return tuple(stored[axis] for axis in self.axes)

    def __repr__(self) -> str:
        shape = ",".join(map(str, self.shape))
        return f"MXFP8 {self.dtype.name}[{shape}], blocks along axis {self.block_axis}"


def view_of(w: MXArray) -> MXView:
    """Returns `w` as a view of the shape `w.shape`."""
    if isinstance(w, MXKernel):
        order = w.kernel_axes.permutation(w.ndim)
        moved = reshape(view_of(w.flat), [w.shape[axis] for axis in order])
        return transpose(moved, [order.index(axis) for axis in range(w.ndim)])
    axes = tuple(range(w.ndim))
    if w.transposed:
        axes = (*axes[:-2], axes[-1], axes[-2])
    return MXView(w.elements, w.scales, axes, w.padding, jnp.dtype(w.dtype))


def array_of(view: MXView) -> MXArray:
    """Returns a view as an `MXArray` of the same shape.

    Raises:
        NoRule: If its blocks run along neither of its last two axes.
    """
    if view.block_axis < view.ndim - 2:
        raise NoRule(
            f"an MXArray has its blocks along one of its last two axes, but {view} "
            "does not. Transpose it first"
        )
    others = [axis for axis in range(view.ndim) if axis != view.block_axis]
    transposed = view.block_axis != view.ndim - 1
    elements, scales = arrange(view, others)
    return MXArray(elements, scales, view.padding, view.dtype, transposed)


def widen(view: MXView) -> jax.Array:
    """Returns the array itself, in its own dtype."""
    flat = MXArray(view.elements, view.scales, view.padding, view.dtype)
    return jnp.transpose(dequantize(flat, view.dtype), view.axes)


def move(view: MXView, function: Callable[[Any, int], Any]) -> tuple[Any, Any]:
    """Applies `function` to the bytes of elements and of scales.

    It is given the length of the last axis that stands for one byte: 1 and 32.
    """
    as_bytes = lambda a: lax.bitcast_convert_type(a, jnp.uint8)
    parts = ((view.elements, 1), (view.scales, BLOCK_SIZE))
    return tuple(  # pyright: ignore[reportReturnType]
        lax.bitcast_convert_type(function(as_bytes(a), unit), a.dtype)
        for a, unit in parts
    )


def arrange(view: MXView, others: Sequence[int]) -> tuple[Any, Any]:
    """Returns elements and scales with the axes `others` first, then the blocks."""
    order = (*(view.axes[axis] for axis in others), view.ndim - 1)
    if order == tuple(range(view.ndim)):
        return view.elements, view.scales
    return move(view, lambda a, unit: lax.transpose(a, order))


def with_parts(view: MXView, parts: tuple[Any, Any], **changes: Any) -> MXView:
    """Returns a view of other elements and scales."""
    static = {name: getattr(view, name) for name in ("axes", "padding", "dtype")}
    static |= {"is_rows": view.is_rows} | changes
    return MXView(*parts, **static)


def transpose(view: MXView, permutation: Sequence[int]) -> MXView:
    axes = tuple(view.axes[axis] for axis in permutation)
    return with_parts(view, (view.elements, view.scales), axes=axes)


def reshape(view: MXView, shape: Sequence[int]) -> MXView:
    """Reshapes in row-major order, with every block whole.

    Raises:
        NoRule: If a block would be cut, or elements of different blocks mixed.
    """
    shape = tuple(shape)
    if shape == view.shape:
        return view
    groups = _factor(view.shape, shape)
    blocks = next(i for i, (old, _) in enumerate(groups) if view.block_axis in old)
    _check_blocks(view, shape, *groups[blocks])
    block_group = groups.pop(blocks)
    # In the order of storage, so that most often nothing moves.
    groups.sort(key=lambda group: min((view.axes[i] for i in group[0]), default=-1))
    groups.append(block_group)
    *others, _ = (axis for old, _ in groups for axis in old)
    stored = [axis for _, new in groups for axis in new]
    axes = tuple(stored.index(axis) for axis in range(len(shape)))
    lengths = [shape[axis] for axis in stored]
    lengths[-1] += view.padding
    elements, scales = arrange(view, others)
    scale_lengths = (*lengths[:-1], lengths[-1] // BLOCK_SIZE)
    parts = _reshape(elements, lengths), _reshape(scales, scale_lengths)
    return with_parts(view, parts, axes=axes)


def _reshape(a, lengths):
    return lax.reshape(a, tuple(lengths))


def _check_blocks(view, shape, old, new):
    if len(old) == len(new) == 1:
        return
    whole = not view.padding and shape[new[-1]] % BLOCK_SIZE == 0
    if old[-1] != view.block_axis or not whole:
        raise NoRule(
            f"reshaping {view} to {shape} would cut its blocks of {BLOCK_SIZE}: only "
            "the last of the axes that are merged or split may hold them, in multiples "
            f"of {BLOCK_SIZE}"
        )


def _factor(
    old: Sequence[int], new: Sequence[int]
) -> list[tuple[list[int], list[int]]]:
    """Pairs runs of old and new axes that hold the same elements, as short as can be.

    Axes of length 1 that are left over belong to a run of their own.
    """
    if math.prod(old) == 0:
        raise NoRule(f"reshaping {tuple(old)} to {tuple(new)}: the array is empty")
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) and j < len(new):
        if old[i] != new[j] and 1 in (old[i], new[j]):
            # One of them is an axis that comes or goes.
            groups.append(([i], []) if old[i] == 1 else ([], [j]))
            i, j = (i + 1, j) if old[i] == 1 else (i, j + 1)
            continue
        size_old, size_new, start = old[i], new[j], (i, j)
        while size_old != size_new:
            if size_old < size_new:
                i += 1
                size_old *= old[i]
            else:
                j += 1
                size_new *= new[j]
        i, j = i + 1, j + 1
        groups.append(([*range(start[0], i)], [*range(start[1], j)]))
    groups += [([axis], []) for axis in range(i, len(old))]
    return groups + [([], [axis]) for axis in range(j, len(new))]


def broadcast(view: MXView, shape: Sequence[int], dims: Sequence[int]) -> MXView:
    """`lax.broadcast_in_dim`, along any axis but that of the blocks."""
    narrow = [1] * len(shape)
    for axis, dim in enumerate(dims):
        narrow[dim] = view.shape[axis]
    if narrow[dims[view.block_axis]] != shape[dims[view.block_axis]]:
        raise NoRule(f"{view} cannot be broadcast along its blocks, to {tuple(shape)}")
    # By hand, for a reshape takes no account of which axis of length 1 is which.
    added = [dim for dim in range(len(shape)) if dim not in dims]
    stored = [*added, *sorted(dims, key=lambda dim: view.axes[list(dims).index(dim)])]
    axes = tuple(stored.index(dim) for dim in range(len(shape)))
    lead = (1,) * len(added)
    expand = lambda a: _reshape(a, (*lead, *a.shape))
    wide = with_parts(view, (expand(view.elements), expand(view.scales)), axes=axes)
    if tuple(narrow) == tuple(shape):
        return wide
    target = tuple(shape[dim] for dim in stored[:-1])
    parts = move(wide, lambda a, unit: jnp.broadcast_to(a, (*target, a.shape[-1])))
    return with_parts(wide, parts)


def unstack(view: MXView) -> MXView:
    """Prepares a view for a scan over its first axis.

    The result's arrays have that axis in front of those that its `axes` count.

    Raises:
        NoRule: If that is the axis of the blocks.
    """
    if view.block_axis == 0:
        raise NoRule(f"a loop over the first axis of {view} would cut its blocks")
    others = [view.axes.index(i) for i in range(view.ndim - 1) if i != view.axes[0]]
    parts = arrange(view, [0, *others])
    stored = [*others, view.block_axis]
    axes = tuple(stored.index(axis) for axis in range(1, view.ndim))
    return with_parts(view, parts, axes=axes)


def stack(view: MXView) -> MXView:
    """Undoes `unstack` on what a scan stacked."""
    axes = (0, *(axis + 1 for axis in view.axes))
    return with_parts(view, (view.elements, view.scales), axes=axes)

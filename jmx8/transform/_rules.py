"""What the primitives of JAX do to MXFP8 arrays.

A rule gets the interpreter, the equation and its operands, and returns the result, or
raises `NoRule` where the operation would need the weight as an ordinary array. Rules
move bytes and relabel axes; only products compute, and those are ops of jmx8.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._mx_array import BLOCK_SIZE, MXArray
from ._view import (
    arrange,
    broadcast,
    move,
    MXView,
    NoRule,
    reshape,
    transpose,
    widen,
    with_parts,
)


def _dot_general(interpret, eqn, values):
    lhs, rhs = values
    dims = eqn.params["dimension_numbers"]
    weight, x = (rhs, lhs) if isinstance(rhs, MXView) else (lhs, rhs)
    if isinstance(lhs, MXView) and isinstance(rhs, MXView):
        if not lhs.is_rows and not rhs.is_rows:
            raise NoRule("both operands are MXFP8; one of them must be activations")
        weight, x = (rhs, widen(lhs)) if lhs.is_rows else (lhs, widen(rhs))
    if weight.is_rows:
        raise NoRule("rows that were picked by index are no weight")
    (contract_x, contract_w), (batch_x, batch_w) = (
        dims if weight is rhs else ((c[1], c[0]) for c in dims)
    )
    x, dtype = jnp.asarray(x), eqn.outvars[0].aval.dtype
    w, free_w, batch, pairs = _matrix(weight, contract_w, contract_x, batch_w, batch_x)
    free_x = _others(x.ndim, (*contract_x, *batch_x))
    order = (*(b for _, b in batch), *free_x, *(c for _, c in pairs))
    k = math.prod(x.shape[c] for _, c in pairs)
    lead = [x.shape[axis] for axis in order[: len(order) - len(pairs)]]
    # A group needs an axis of rows.
    rows = [*lead, 1, k] if batch and not free_x else [*lead, k]
    out = interpret.matmul(_reshape(_transpose(x, order), rows), w, out_dtype=dtype)
    out = _reshape(out, [*lead, *(weight.shape[axis] for axis in free_w)])
    return _sort_result(out, weight is rhs, batch, batch_w, free_x, free_w)


def _matrix(view, contract_w, contract_x, batch_w, batch_x):
    """Returns the weight as `[*batch, n, k]`, and which axes went where.

    Axes are taken in the order of storage, so that most often nothing moves: the axes
    of n, and pairs of the weight's and the other operand's for batch and k.
    """
    if view.block_axis not in contract_w:
        raise NoRule(
            f"it contracts {_axes(contract_w)} of the weight, whose blocks run along "
            f"axis {view.block_axis}. Quantize it along the contracted axis, see "
            "`contract` of `quantize_params`"
        )
    stored = lambda pair: view.axes[pair[0]]
    batch = sorted(zip(batch_w, batch_x, strict=True), key=stored)
    pairs = sorted(zip(contract_w, contract_x, strict=True), key=stored)
    if len(pairs) > 1 and view.padding:
        raise NoRule(
            f"it contracts {_axes(contract_w)} of a weight with {view.padding} "
            "elements of padding; the axis of the blocks must be a multiple of "
            f"{BLOCK_SIZE}"
        )
    free = _others(view.ndim, (*contract_w, *batch_w))
    free = sorted(free, key=lambda axis: view.axes[axis])
    others = (*(b for b, _ in batch), *free, *(c for c, _ in pairs[:-1]))
    elements, scales = arrange(view, others)
    lead = [view.shape[b] for b, _ in batch]
    lead.append(math.prod(view.shape[axis] for axis in free))
    flatten = lambda a: _reshape(a, [*lead, math.prod(a.shape[-len(pairs) :])])
    w = MXArray(flatten(elements), flatten(scales), view.padding, view.dtype)
    return w, free, batch, pairs


def _sort_result(out, weight_is_rhs, batch, batch_w, free_x, free_w):
    """Puts `[*batch, *x, *w]`, which has the weight's axes as stored, in order."""
    # Where each axis of the result is in `out`.
    first_w = len(batch) + len(free_x)
    batch_order = [[b for b, _ in batch].index(b) for b in batch_w]
    x_order = [*range(len(batch), first_w)]
    w_order = [first_w + free_w.index(axis) for axis in sorted(free_w)]
    last = (*x_order, *w_order) if weight_is_rhs else (*w_order, *x_order)
    return _transpose(out, (*batch_order, *last))


def _ragged_dot(interpret, eqn, values):
    x, weight, group_sizes = values
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (contract, batch) = numbers.dot_dimension_numbers
    is_plain = (
        not isinstance(x, MXView)
        and isinstance(weight, MXView)
        and not batch[0]
        and len(numbers.rhs_group_dimensions) == 1
        and x.ndim == len(contract[0]) + 1
        and tuple(numbers.lhs_ragged_dimensions) == _others(x.ndim, contract[0])
        and group_sizes.ndim == 1
        and eqn.params["group_offset"] is None
    )
    if not is_plain:
        raise NoRule(
            "only rows [m, k] in groups, times one MXFP8 weight [g, k, n] each, are "
            "multiplied, as `lax.ragged_dot` does"
        )
    groups = numbers.rhs_group_dimensions
    w, free, _, pairs = _matrix(weight, contract[1], contract[0], groups, groups)
    (row_axis,) = numbers.lhs_ragged_dimensions
    x = _transpose(jnp.asarray(x), (row_axis, *(c for _, c in pairs)))
    x = _reshape(x, (x.shape[0], math.prod(x.shape[1:])))
    sizes, dtype = jnp.asarray(group_sizes), eqn.outvars[0].aval.dtype
    out = interpret.ragged_dot(x, w, sizes, out_dtype=dtype)
    out = _reshape(out, (x.shape[0], *(weight.shape[axis] for axis in free)))
    return _transpose(out, (0, *(1 + free.index(axis) for axis in sorted(free))))


def _convert(interpret, eqn, values):
    (view,) = values
    dtype = jnp.dtype(eqn.params["new_dtype"])
    if not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).bits < 16:
        raise NoRule(f"an MXFP8 array stands for floats, not for {dtype}")
    return with_parts(view, (view.elements, view.scales), dtype=dtype)


def _slice(interpret, eqn, values):
    (view,) = values
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    return _cut(view, starts, limits, eqn.params["strides"] or (1,) * view.ndim)


def _cut(view, starts, limits, strides):
    axis = view.block_axis
    start, limit, length = starts[axis], limits[axis], view.shape[axis]
    is_whole = start % BLOCK_SIZE == 0 and (limit % BLOCK_SIZE == 0 or limit == length)
    if strides[axis] != 1 or not is_whole or limit <= start:
        raise NoRule(
            f"a slice along the blocks, axis {axis}, must begin and end between blocks "
            f"of {BLOCK_SIZE}, got {start}:{limit}:{strides[axis]}"
        )
    padding = view.padding if limit == length else 0
    limits = [stop + padding if i == axis else stop for i, stop in enumerate(limits)]
    stored = [view.axes.index(i) for i in range(view.ndim)]

    def cut(a, unit):
        first, last = ([bounds[i] for i in stored] for bounds in (starts, limits))
        first[-1], last[-1] = first[-1] // unit, last[-1] // unit
        return lax.slice(a, first, last, [strides[i] for i in stored])

    return with_parts(view, move(view, cut), padding=padding)


def _split(interpret, eqn, values):
    (view,) = values
    outs, start, axis = [], 0, eqn.params["axis"]
    for size in eqn.params["sizes"]:
        starts, limits = [0] * view.ndim, [*view.shape]
        starts[axis], limits[axis] = start, start + size
        outs.append(_cut(view, starts, limits, (1,) * view.ndim))
        start += size
    return outs


def _dynamic_slice(interpret, eqn, values):
    view, *starts = values
    sizes = eqn.params["slice_sizes"]
    _check_whole_rows(view, sizes)
    stored = [view.axes.index(i) for i in range(view.ndim)]

    def cut(a, unit):
        first = [starts[i] for i in stored]
        first[-1] = jnp.zeros_like(first[-1])
        lengths = [*(sizes[i] for i in stored[:-1]), a.shape[-1]]
        return lax.dynamic_slice(a, first, lengths)

    is_rows = view.is_rows or _are_rows(view, sizes)
    return with_parts(view, move(view, cut), is_rows=is_rows)


def _gather(interpret, eqn, values):
    view, indices = values
    if isinstance(indices, MXView):
        raise NoRule("indices cannot be MXFP8")
    params = eqn.params
    sizes, dims = params["slice_sizes"], params["dimension_numbers"]
    _check_whole_rows(view, sizes)
    if view.block_axis in dims.start_index_map:
        raise NoRule(f"it picks along axis {view.block_axis}, that of the blocks")
    fill_value = math.nan if params["fill_value"] is None else params["fill_value"]
    if not math.isnan(fill_value) and fill_value != 0:
        raise NoRule(f"it fills in {fill_value} where an index is out of bounds")
    # Elements of zero with a scale of NaN are NaN.
    fill_scale = 0xFF if math.isnan(fill_value) else 0
    to_stored = lambda axes: tuple(view.axes[axis] for axis in axes)
    batching = sorted(
        zip(
            to_stored(dims.operand_batching_dims),
            dims.start_indices_batching_dims,
            strict=True,
        )
    )
    stored_dims = dims._replace(
        collapsed_slice_dims=tuple(sorted(to_stored(dims.collapsed_slice_dims))),
        start_index_map=to_stored(dims.start_index_map),
        operand_batching_dims=tuple(axis for axis, _ in batching),
        start_indices_batching_dims=tuple(axis for _, axis in batching),
    )
    removed = (*dims.collapsed_slice_dims, *dims.operand_batching_dims)
    kept = _others(view.ndim, removed)
    # The axes of a slice come out in the order of storage: the blocks last of them.
    blocks_at = dims.offset_dims[-1]
    stored = [view.axes.index(axis) for axis in range(view.ndim)]

    def pick(a, unit):
        picked = lax.gather(
            a,
            indices,
            stored_dims,
            (*(sizes[axis] for axis in stored[:-1]), a.shape[-1]),
            unique_indices=params["unique_indices"],
            indices_are_sorted=params["indices_are_sorted"],
            mode=params["mode"],
            fill_value=fill_scale if unit == BLOCK_SIZE else 0,
        )
        return jnp.moveaxis(picked, blocks_at, -1)

    parts = move(view, pick)
    ndim = parts[0].ndim
    moved = [*_others(ndim, (blocks_at,)), blocks_at]
    offset_of = dict(zip(sorted(to_stored(kept)), dims.offset_dims, strict=True))
    source = dict(
        zip(dims.offset_dims, map(offset_of.get, to_stored(kept)), strict=True)
    )
    axes = tuple(moved.index(source.get(axis, axis)) for axis in range(ndim))
    is_rows = view.is_rows or _are_rows(view, sizes)
    return with_parts(view, parts, axes=axes, is_rows=is_rows)


def _check_whole_rows(view, sizes):
    axis = view.block_axis
    if sizes[axis] != view.shape[axis]:
        raise NoRule(
            f"it takes {sizes[axis]} of the {view.shape[axis]} elements along axis "
            f"{axis}, that of the blocks, from a place unknown before it runs"
        )


def _are_rows(view, sizes):
    return math.prod(sizes) == sizes[view.block_axis]


def _concatenate(interpret, eqn, values):
    axis, first = eqn.params["dimension"], values[0]
    if not all(isinstance(value, MXView) for value in values):
        raise NoRule("it joins MXFP8 arrays with others")
    if any(value.block_axis != first.block_axis for value in values):
        raise NoRule("it joins arrays whose blocks run along different axes")
    along_blocks = axis == first.block_axis
    if along_blocks and any(value.padding for value in values[:-1]):
        raise NoRule(f"it joins blocks of which some hold less than {BLOCK_SIZE}")
    others = [first.axes.index(i) for i in range(first.ndim - 1)]
    arranged = [
        with_parts(first, arrange(value, others), padding=value.padding)
        for value in values
    ]
    as_bytes = lambda a: lax.bitcast_convert_type(a, jnp.uint8)
    join = lambda *a: lax.bitcast_convert_type(
        lax.concatenate([*map(as_bytes, a)], first.axes[axis]), a[0].dtype
    )
    parts = (
        join(*(view.elements for view in arranged)),
        join(*(view.scales for view in arranged)),
    )
    return with_parts(first, parts, padding=values[-1].padding)


def _identity(interpret, eqn, values):
    """For primitives that return what they are given."""
    return jax.tree.map(lambda a: eqn.primitive.bind(a, **eqn.params), values[0])


def _barrier(interpret, eqn, values):
    flat, structure = jax.tree.flatten(values)
    return jax.tree.unflatten(structure, eqn.primitive.bind(*flat))


def _stop_gradient(interpret, eqn, values):
    return values[0]  # There is no gradient with respect to MXFP8 weights anyway.


def _transpose(x, order):
    return lax.transpose(x, tuple(order))


def _reshape(x, shape):
    return lax.reshape(x, tuple(shape))


def _others(ndim, axes):
    return tuple(axis for axis in range(ndim) if axis not in axes)


def _axes(axes):
    return f"axis {axes[0]}" if len(axes) == 1 else f"axes {tuple(axes)}"


def _reshape_rule(interpret, eqn, values):
    return reshape(values[0], eqn.outvars[0].aval.shape)


RULES: dict[str, Callable[[Any, Any, list[Any]], Any]] = {
    "dot_general": _dot_general,
    "ragged_dot_general": _ragged_dot,
    "transpose": lambda interpret, eqn, values: transpose(
        values[0], eqn.params["permutation"]
    ),
    "reshape": _reshape_rule,
    "squeeze": _reshape_rule,
    "expand_dims": _reshape_rule,
    "broadcast_in_dim": lambda interpret, eqn, values: broadcast(
        values[0], eqn.outvars[0].aval.shape, eqn.params["broadcast_dimensions"]
    ),
    "slice": _slice,
    "split": _split,
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
    "concatenate": _concatenate,
    "convert_element_type": _convert,
    "stop_gradient": _stop_gradient,
    "copy": _identity,
    "name": _identity,
    "pvary": _identity,
    "optimization_barrier": _barrier,
}

"""`update_weights`: new weights into a model that is already compiled."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._mx_array import MXArray
from ..convert._leaf import buffers, count_nonfinite, quantize_leaf
from ..convert._walk import unpack
from ..kernels._prepared import is_prepared, prepare_weights, PreparedWeights
from .items import is_finite
from .names import find_table


Model = TypeVar("Model")


def update_weights(
    model: Model,
    weights: Mapping[str, Any],
    *,
    on_nonfinite: Literal["raise", "keep"] = "raise",
    donate: bool = True,
) -> Model:
    """Returns a model with some of its weights replaced, for the same compiled code.

    For weights that a trainer sends again and again. What was MXFP8 is converted anew,
    what kernels want laid out is laid out anew, and shapes, dtypes and shardings stay:
    a jitted function that was compiled for `model` takes the result as it is.

        model = jmx8.update_weights(model, {"model.norm.weight": new_norm, ...})

    Args:
        model: Model or other pytree, as `load`, `quantize_model`, `quantize_params` or
            `prepare` returns it; an `nnx.Module`, of which a new one is returned, or
            its `nnx.State`, with which `nnx.update` changes the module in place.
        weights: New arrays by name: the path of a parameter, such as
            `layers/0/self_attn/q_proj/weight`, or, for a model that `load` knows, the
            name of a tensor in its checkpoints, such as
            `model.layers.0.mlp.experts.7.up_proj.weight`. Float arrays of numpy or
            jax, on any device and sharded in any way. Experts may come one by one;
            those that do not come stay.
        on_nonfinite: "raise" refuses NaN and infinity; "keep" converts them as
            `quantize` says.
        donate: Whether the memory of each replaced parameter is freed before the new
            one is made, so that only one is ever held twice. `model` cannot be used
            afterwards.

    Returns:
        The model with these parameters, each in place of the old one.

    Raises:
        ValueError: If a name is unknown or given in two ways, a shape differs, or
            values are not finite. All are listed, and nothing is changed.
        TypeError: If a new weight is no float array.
    """
    if on_nonfinite not in ("raise", "keep"):
        raise ValueError(
            'update_weights: on_nonfinite must be "raise" or "keep", got '
            f"{on_nonfinite!r}."
        )
    unpacked = unpack(model)
    nodes, structure = jax.tree_util.tree_flatten_with_path(
        unpacked.tree, is_leaf=_is_weight
    )
    places = {
        jax.tree_util.keystr(keys, simple=True, separator="/"): i
        for i, (keys, _) in enumerate(nodes)
    }
    leaves = [leaf for _, leaf in nodes]
    parts = _resolve({path: leaves[i] for path, i in places.items()}, weights)
    _check(parts, leaves, places, check_finite=on_nonfinite == "raise")
    held = _held_twice(leaves)
    for path, rows in parts.items():
        old = leaves[places[path]]
        can_donate = donate and not (_buffers_of(old) & held)
        leaves[places[path]] = _replace(old, rows, can_donate)
    return unpacked.repack(jax.tree.unflatten(structure, leaves), {})


class _Part(NamedTuple):
    """New rows of a parameter.

    Attributes:
        name: What they were given as.
        start: The first of them, with all axes but the last merged.
        shape: The shape that they must have.
        value: They.
    """

    name: str
    start: int
    shape: tuple[int, ...]
    value: Any


def _is_weight(node: Any) -> bool:
    return isinstance(node, MXArray) or is_prepared(node)


# --- Which weight goes where ----------------------------------------------------------


def _resolve(
    leaves: Mapping[str, Any], weights: Mapping[str, Any]
) -> dict[str, list[_Part]]:
    """Returns the new rows of every parameter that gets some, or raises."""
    slots, copies = _slots(leaves)
    result: dict[str, list[_Part]] = {}
    unknown = []
    for name, value in weights.items():
        if name in leaves and _is_array(leaves[name]):
            path, start, shape = name, 0, tuple(leaves[name].shape)
        elif name in slots:
            path, start, shape = slots[name]
        elif copies.get(name) in weights:
            continue  # tied: the model has one parameter for both
        else:
            unknown.append(f"  {name}: no parameter is called so")
            continue
        result.setdefault(path, []).append(_Part(name, start, shape, value))
    if unknown:
        known = next(iter(slots or leaves), "nothing")
        raise ValueError(
            f"update_weights: {len(unknown)} of the names are unknown:\n"
            + "\n".join(unknown[:100])
            + f"\nNames are such as {known!r}. Nothing was changed."
        )
    return result


def _is_array(leaf: Any) -> bool:
    return _is_weight(leaf) or isinstance(leaf, jax.Array | np.ndarray)


def _slots(
    leaves: Mapping[str, Any],
) -> tuple[dict[str, tuple[str, int, tuple[int, ...]]], dict[str, str]]:
    """Returns path, first row and shape by the name of a tensor; and tied names."""
    arrays = all(map(_is_array, leaves.values()))
    table = find_table({p: x.shape for p, x in leaves.items()}) if arrays else None
    if table is None:
        return {}, {}
    result = {
        slot.name: (path, slot.start, slot.shape)
        for path, leaf in leaves.items()
        for way in table.alternatives(path, leaf.shape)
        for slot in way
    }
    return result, {n: o for n, o in table.tied if n not in result and o in result}


def _check(
    parts: Mapping[str, Sequence[_Part]],
    leaves: Sequence[Any],
    places: Mapping[str, int],
    *,
    check_finite: bool,
) -> None:
    problems = []
    for path, rows in parts.items():
        problems += _overlaps(path, rows)
        if _is_laid_out_in_shards(leaves[places[path]]):
            problems.append(
                f"  {path}: each device has laid out its own shard. Update the weights "
                "before `prepare`, or those that `canonical` gives back"
            )
        for part in rows:
            problems += _problems(part, check_finite)
    if problems:
        raise ValueError(
            "update_weights: the new weights do not fit:\n"
            + "\n".join(problems[:100])
            + "\nNothing was changed."
        )


def _problems(part: _Part, check_finite: bool) -> Iterator[str]:
    value = part.value
    if not isinstance(value, jax.Array | np.ndarray) or not jnp.issubdtype(
        value.dtype, jnp.floating
    ):
        found = getattr(value, "dtype", type(value).__name__)
        raise TypeError(
            f"update_weights: {part.name}: must be a float array, got {found}."
        )
    if tuple(value.shape) != part.shape:
        yield f"  {part.name}: must have shape {part.shape}, got {tuple(value.shape)}"
    elif check_finite and not (isinstance(value, np.ndarray) and is_finite(value)):
        nan, inf = count_nonfinite(value)
        if nan or inf:
            yield f"  {part.name}: has {nan} NaN, {inf} infinite"


def _overlaps(path: str, rows: Sequence[_Part]) -> Iterator[str]:
    ordered = sorted(rows, key=lambda part: part.start)
    for first, second in itertools.pairwise(ordered):
        if first.start + math.prod(first.shape[:-1]) > second.start:
            yield f"  {path}: given twice, as {first.name} and as {second.name}"


def _is_laid_out_in_shards(leaf: Any) -> bool:
    return is_prepared(leaf) and not all(
        a.sharding.is_fully_replicated for a in leaf.arrays
    )


# --- The new parameters ---------------------------------------------------------------


def _buffers_of(leaf: Any) -> frozenset[Any]:
    """Returns keys of the memory that a parameter occupies."""
    return frozenset().union(*(buffers(part) for part in jax.tree.leaves(leaf)))


def _held_twice(leaves: Sequence[Any]) -> frozenset[Any]:
    """Returns the memory that several parameters share, which must not be freed."""
    seen: set[Any] = set()
    twice: set[Any] = set()
    for leaf in leaves:
        if _is_array(leaf):
            found = _buffers_of(leaf)
            twice |= seen & found
            seen |= found
    return frozenset(twice)


def _replace(old: Any, rows: Sequence[_Part], donate: bool) -> Any:
    """Returns a parameter with new rows, where and how the old one is."""
    if isinstance(old, PreparedWeights):
        return _replace_prepared(old, rows, donate)
    if any(isinstance(part, np.ndarray) for part in jax.tree.leaves(old)):
        new = _replace(jax.tree.map(jnp.asarray, old), rows, donate=True)
        return jax.tree.map(np.asarray, new)
    ordered = sorted(rows, key=lambda part: part.start)
    if sum(math.prod(part.shape[:-1]) for part in ordered) < math.prod(old.shape[:-1]):
        return _replace_rows(old, ordered, donate)
    like = old.elements if isinstance(old, MXArray) else old
    values = [_place(part.value, like, is_part=len(ordered) > 1) for part in ordered]
    value = values[0] if len(values) == 1 else _join(values, tuple(old.shape))
    if isinstance(old, MXArray) and old.transposed:
        value = jnp.matrix_transpose(value)
    if like.committed:
        value = jax.device_put(value, like.sharding)
    if donate:
        _free(old)
    if not isinstance(old, MXArray):
        return value.astype(old.dtype)
    w = quantize_leaf(value)
    return _like(old, w.elements, w.scales)


def _place(value: Any, like: Array, *, is_part: bool) -> Array:
    """Returns a new array on the devices of the old one.

    Uncommitted, if that is: a compiled function tells the two apart.
    """
    if not like.committed:
        is_committed = isinstance(value, jax.Array) and value.committed
        return jnp.asarray(np.asarray(value) if is_committed else value)
    sharding: Any = like.sharding
    if len(sharding.device_set) == 1:
        return jax.device_put(value, sharding)
    if is_part or tuple(value.shape) != tuple(like.shape):
        spec = jax.sharding.PartitionSpec()
        return jax.device_put(value, jax.sharding.NamedSharding(sharding.mesh, spec))
    return jax.device_put(value, sharding)


@functools.partial(jax.jit, static_argnums=1)
def _join(values: Sequence[Array], shape: tuple[int, ...]) -> Array:
    return jnp.concatenate([value.reshape(-1, shape[-1]) for value in values]).reshape(
        shape
    )


def _replace_rows(old: Any, rows: Sequence[_Part], donate: bool) -> Any:
    """Returns a parameter of which only some rows are new."""
    if isinstance(old, MXArray):
        elements, scales = old.elements, old.scales
        for part in rows:
            value = _place(part.value, elements, is_part=True)
            w = quantize_leaf(value.reshape(-1, value.shape[-1]))
            elements = _set_rows(elements, w.elements, part.start, donate)
            scales = _set_rows(scales, w.scales, part.start, donate)
        return _like(old, elements, scales)
    for part in rows:
        value = _place(part.value, old, is_part=True)
        value = value.reshape(-1, value.shape[-1]).astype(old.dtype)
        old = _set_rows(old, value, part.start, donate)
    return old


def _like(old: MXArray, elements: Array, scales: Array) -> MXArray:
    """Returns a new array of which a compiled function sees no difference."""
    if old.scales.committed:
        elements = jax.device_put(elements, old.elements.sharding)
        scales = jax.device_put(scales, old.scales.sharding)
    return MXArray(elements, scales, old.padding, old.dtype, old.transposed)


def _set_rows(old: Array, rows: Array, start: int, donate: bool) -> Array:
    update = _set_rows_in_place if donate else _set_rows_of_copy
    sharding = old.sharding if old.committed else None
    new = update(old, rows, np.int32(start))
    return new if sharding is None else jax.device_put(new, sharding)


def _write_rows(old: Array, rows: Array, start: Array) -> Array:
    # As bytes: on a CPU, XLA would widen a whole array of float8 for it.
    bits = jnp.dtype(f"uint{8 * old.dtype.itemsize}")
    matrix = jax.lax.bitcast_convert_type(old, bits).reshape(-1, old.shape[-1])
    rows = jax.lax.bitcast_convert_type(rows, bits)
    matrix = jax.lax.dynamic_update_slice(matrix, rows, (start, jnp.zeros_like(start)))
    return jax.lax.bitcast_convert_type(matrix.reshape(old.shape), old.dtype)


_set_rows_in_place = jax.jit(_write_rows, donate_argnums=0)
_set_rows_of_copy = jax.jit(_write_rows)


def _replace_prepared(
    old: PreparedWeights, rows: Sequence[_Part], donate: bool
) -> PreparedWeights:
    canonical = old.canonical()
    shardings = [a.sharding if a.committed else None for a in old.arrays]
    if donate:
        _free(old)
    new = prepare_weights(_replace(canonical, rows, donate=True), old.layout)
    arrays = tuple(
        a if sharding is None else jax.device_put(a, sharding)
        for a, sharding in zip(new.arrays, shardings, strict=True)
    )
    return dataclasses.replace(new, arrays=arrays)


def _free(leaf: Any) -> None:
    for part in jax.tree.leaves(leaf):
        if isinstance(part, jax.Array) and not part.is_deleted():
            part.delete()

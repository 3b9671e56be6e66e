"""`quantized`: ordinary functions on MXFP8 weights."""

from collections.abc import Callable
from typing import Any, get_args

import equinox as eqx
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from .._device import resolve_activations
from .._mx_array import MXArray
from .._types import Activations
from ..kernels._prepared import PreparedWeights
from ..nn import Experts, MXExperts, MXLinear
from ..ops.matmul import mx_matmul, mx_matmul_w8a8
from ..ops.ragged_dot import mx_ragged_dot, mx_ragged_dot_w8a8
from ._interpret import Fallback, Interpreter
from ._view import array_of, MXView, NoRule, view_of, widen


# These know what to do with the MXFP8 weights that they hold.
_LAYERS = (MXLinear, MXExperts, Experts, PreparedWeights)


def quantized(
    function: Callable[..., Any],
    *,
    activations: Activations = "auto",
    fallback: Fallback = "raise",
) -> Callable[..., Any]:
    """Makes a function that was written for ordinary arrays take `MXArray`s too.

    `quantized(fn)(params, x)` is `fn(params, x)` with every product of activations and
    an `MXArray` computed by the ops of jmx8: `x @ w`, `w.T`, `jnp.einsum`,
    `lax.dot_general` with any dimension numbers that contract the axis of the blocks,
    and `lax.ragged_dot`. Inside, an `MXArray` looks like an array of its logical shape
    and dtype, the one it was quantized from: a weight `[k, n]` that was quantized with
    `axis=-2` is `[k, n]` there. It may be transposed, reshaped, sliced, picked from,
    concatenated and cast, with blocks kept whole; passed through `jit`, `scan`, `cond`,
    `while_loop`, `checkpoint` and functions with custom derivatives; and returned. Rows
    that are picked by index (embeddings) become ordinary arrays when they are used. An
    `MXArray` that a layer of jmx8 holds stays what it is.

    The function is traced, as `jax.jit` does, and evaluated with these rules. Wrap the
    result in `jax.jit`, where that costs time at the trace only: what is compiled is
    what calls of the ops by hand give. `jax.vmap` and `jax.grad` with respect to
    activations work around it. The gradient of a function with a custom one is that of
    its code if an `MXArray` is among its arguments.

    Args:
        function: Any JAX function, a method, or an Equinox module that holds
            `MXArray`s itself.
        activations: "bf16" multiplies activations as they are (W8A16), "mxfp8"
            quantizes them first (W8A8), "auto" is "mxfp8" where the hardware multiplies
            MXFP8.
        fallback: What an operation without a rule does: "raise", or "dequantize", which
            widens the weight for that operation and warns about each.

    Returns:
        The function, which takes and returns `MXArray`s.

    Raises:
        ValueError: If `activations` or `fallback` is unknown.
        NotImplementedError: When it is called, if an operation on an `MXArray` has no
            rule. The message names it, its operands, and where it is.
    """
    for name, value, options in (
        ("activations", activations, get_args(Activations)),
        ("fallback", fallback, get_args(Fallback)),
    ):
        if value not in options:
            raise ValueError(
                f"quantized: {name} must be one of {options}, got {value!r}."
            )
    return eqx.module_update_wrapper(_Quantized(function, activations, fallback))


class _Quantized(eqx.Module):
    """A pytree, so that a module's weights can be arguments of `eqx.filter_jit`."""

    function: Callable[..., Any]
    activations: Activations = eqx.field(static=True)
    fallback: Fallback = eqx.field(static=True)

    @property
    def __wrapped__(self):
        return self.function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, structure = jax.tree.flatten(
            (self.function, args, kwargs), is_leaf=_is_whole
        )
        where = [i for i, leaf in enumerate(leaves) if _is_dynamic(leaf)]
        given = [leaves[i] for i in where]
        values = [_present(v) if isinstance(v, MXArray) else v for v in given]
        # What is returned untouched is returned as it came.
        untouched = {id(v): w for v, w in zip(values, given, strict=True) if v is not w}
        returned = []

        def flat_function(*arrays):
            filled = [*leaves]
            for i, array in zip(where, arrays, strict=True):
                filled[i] = array
            function, args, kwargs = jax.tree.unflatten(structure, filled)
            returned[:] = jax.tree.flatten(function(*args, **kwargs))
            return [leaf for leaf in returned[0] if _is_array(leaf)]

        jaxpr = jax.make_jaxpr(flat_function)(*map(_abstract, values))
        outs = iter(self._interpreter()(jaxpr, values))
        out_leaves, out_structure = returned
        return jax.tree.unflatten(
            out_structure,
            [
                _restore(next(outs), untouched) if _is_array(x) else x
                for x in out_leaves
            ],
        )

    def __get__(self, instance: Any, owner: Any) -> Any:
        """Makes `quantized` a decorator of methods too."""
        return self if instance is None else eqx.Partial(self, instance)

    def _interpreter(self) -> Interpreter:
        w8a8 = resolve_activations(self.activations) == "mxfp8"
        matmul = mx_matmul_w8a8 if w8a8 else mx_matmul
        ragged_dot = mx_ragged_dot_w8a8 if w8a8 else mx_ragged_dot
        return Interpreter(matmul, ragged_dot, self.fallback)


def _restore(value: Any, untouched: dict[int, MXArray]) -> Any:
    if not isinstance(value, MXView):
        return value
    if id(value) in untouched:
        return untouched[id(value)]
    if value.is_rows:
        return widen(value)
    try:
        return array_of(value)
    except NoRule as reason:
        raise NotImplementedError(f"quantized: returning an array: {reason}.") from None


def _is_whole(node: Any) -> bool:
    return isinstance(node, (MXArray, *_LAYERS))


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)


def _is_dynamic(leaf: Any) -> bool:
    return isinstance(leaf, MXArray) or _is_array(leaf)


def _present(w: MXArray) -> MXView:
    try:
        return view_of(w)
    except NoRule as reason:
        raise NotImplementedError(f"quantized: argument {w}: {reason}.") from None


def _abstract(value: Any) -> Any:
    if not isinstance(value, MXView):
        return value
    # As what it stands for, spread over a mesh and inside `shard_map` as the elements.
    stored = jax.typeof(value.elements)
    spec = PartitionSpec(*(stored.sharding.spec[axis] for axis in value.axes))
    return jax.ShapeDtypeStruct(
        value.shape,
        value.dtype,
        sharding=NamedSharding(stored.sharding.mesh, spec),
        manual_axis_type=stored.manual_axis_type,
    )

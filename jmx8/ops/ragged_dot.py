"""Products of rows in groups with one MXFP8 weight for each group."""

import functools

import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

from .._mx_array import MXArray
from .._types import Implementation
from ..kernels import xla_moe
from ..kernels.sm90 import ragged_dot as sm90
from . import _dispatch
from .moe import check_dtype, merge_batch, shift_ids


def _fold(axis_size, batched, x, w, ids):
    """Folds a batch axis of the rows into m, and one of the weights into g."""
    num_rows, num_groups = x.shape[-2], w.shape[-3]
    (x, w, ids), first_groups = merge_batch(
        axis_size, batched, (x, w, ids), (True, False, True)
    )
    ids = shift_ids(ids, first_groups, num_groups)
    return (x, w, ids), lambda out: out.reshape(axis_size, num_rows, out.shape[-1])


_XLA = functools.partial(xla_moe.ragged_dot, quantize_activations=False)
_XLA_W8A8 = functools.partial(xla_moe.ragged_dot, quantize_activations=True)

_RAGGED_DOT = _dispatch.Op(
    "mx_ragged_dot",
    (
        _dispatch.Backend(
            "sm90", sm90.unsupported, sm90.run, "widens the weights in registers"
        ),
        _dispatch.xla_backend(_XLA),
    ),
    _fold,
    _XLA,
    (0, 2),
)
_RAGGED_DOT_W8A8 = _dispatch.Op(
    "mx_ragged_dot_w8a8", (_dispatch.xla_backend(_XLA_W8A8),), _fold, _XLA, (0, 2)
)


def mx_ragged_dot(
    x: Float[Array, "m k"],
    w: MXArray,
    group_sizes: Int[Array, " g"],
    *,
    out_dtype: DTypeLike | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "m n"]:
    """Multiplies consecutive groups of rows by their own weights (W8A16).

    `jax.lax.ragged_dot` with weights `[g, n, k]` instead of `[g, k, n]`: the first
    `group_sizes[0]` rows are multiplied by `w[0].T`, and so on. The weights are widened
    exactly and the sum is float32, rounded once. Differentiable with respect to `x`.

    Args:
        x: Rows `[m, k]`, bfloat16, float16 or float32.
        w: Weights `[g, n, k]`, or the transpose `[g, k, n]` of such an array.
        group_sizes: How many rows belong to each group, `[g]`. Rows after the last
            group give zeros.
        out_dtype: Dtype of the result; None for that of `x`.
        implementation: Which backend runs; None chooses.

    Returns:
        Array `[m, n]` of `out_dtype`.

    Raises:
        TypeError: If `x` is not a float array, `group_sizes` not one of integers, or
            `w` not an `MXArray`.
        ValueError: If shapes disagree, or `implementation` is unknown.
    """
    return _ragged_dot(_RAGGED_DOT, x, w, group_sizes, out_dtype, implementation)


def mx_ragged_dot_w8a8(
    x: Float[Array, "m k"],
    w: MXArray,
    group_sizes: Int[Array, " g"],
    *,
    out_dtype: DTypeLike | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "m n"]:
    """As `mx_ragged_dot`, with the rows quantized to MXFP8 along k first (W8A8).

    The gradient with respect to `x` is that of `mx_ragged_dot`, as if `x` had not been
    rounded. Arguments, result and errors are those of `mx_ragged_dot`.
    """
    return _ragged_dot(_RAGGED_DOT_W8A8, x, w, group_sizes, out_dtype, implementation)


def _ragged_dot(op, x, w, group_sizes, out_dtype, implementation):
    if not isinstance(w, MXArray):
        raise TypeError(
            f"{op.name}: w must be an MXArray, got {type(w).__name__}. Use "
            "`jmx8.quantize(w)` to make one."
        )
    check_dtype(op.name, "x", x, jnp.floating)
    check_dtype(op.name, "group_sizes", group_sizes, jnp.integer)
    shape = w.mT.shape if w.transposed else w.shape
    if len(shape) != 3 or x.ndim != 2 or x.shape[1] != shape[2]:
        raise ValueError(
            f"{op.name}: x must be [m, k] and w [g, n, k], got {x.shape=} and "
            f"{w.shape=}, stored as {shape}."
        )
    if group_sizes.shape != shape[:1]:
        raise ValueError(
            f"{op.name}: group_sizes must have shape {shape[:1]}, one for each group "
            f"of w, got {group_sizes.shape}."
        )
    if w.padding:
        x = jnp.pad(x, ((0, 0), (0, w.padding)))
    w = MXArray(w.elements, w.scales, dtype=w.dtype)
    # Backends see the group of each row, which need not be in order.
    rows = jnp.arange(x.shape[0], dtype=group_sizes.dtype)
    ids = jnp.searchsorted(jnp.cumsum(group_sizes), rows, side="right")[:, None]
    options = {"out_dtype": jnp.dtype(x.dtype if out_dtype is None else out_dtype)}
    return _dispatch.call(op, implementation, options, x, w, ids)

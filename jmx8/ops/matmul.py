"""Products of activations and MXFP8 weights.

`mx_matmul` takes the activations as they are (W8A16); `mx_matmul_w8a8` quantizes them
to MXFP8 first. That changes the result, so these are two ops and not two
implementations of one.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from .._mx_array import MXArray, set_matmul
from .._types import Implementation
from ..kernels import xla_matmul
from ..kernels._prepared import PreparedWeights
from ..kernels.cutile import dense as cutile
from ..kernels.flashinfer import backends as flashinfer
from ..kernels.sm90 import dense as sm90
from . import _dispatch


def _fold(axis_size, batched, x, w, *biases):
    """Folds a batch axis of x into m, and one of w into a group axis.

    A bias that is not the same in all of the batch becomes one for each row.
    """
    x_batched, w_batched, *bias_batched = batched
    stack = lambda a, is_batched: (
        a if is_batched else jnp.broadcast_to(a, (axis_size, *a.shape))
    )
    x, m = stack(x, x_batched), x.shape[-2]
    if w_batched:
        biases = map(stack, biases, bias_batched)
        return (x, w, *biases), lambda out: out

    # [b, *g, m, k] to [*g, b * m, k]: one call, with the weights read once.
    def fold_rows(a):
        a = jnp.moveaxis(a, 0, -3)
        return a.reshape(*a.shape[:-3], axis_size * m, a.shape[-1])

    def fold_bias(bias, is_batched):
        if not is_batched and bias.shape[-2] == 1:
            return bias
        bias = stack(bias, is_batched)
        rows = (*bias.shape[:-2], m, bias.shape[-1])
        return fold_rows(jnp.broadcast_to(bias, rows))

    def unfold(out):
        out = out.reshape(*out.shape[:-2], axis_size, m, out.shape[-1])
        return jnp.moveaxis(out, -3, 0)

    return (fold_rows(x), w, *map(fold_bias, biases, bias_batched)), unfold


_MATMUL = _dispatch.Op(
    "mx_matmul",
    (
        _dispatch.Backend(
            "sm90",
            sm90.unsupported,
            sm90.run,
            "widens the weights in registers",
            tactics=sm90.tactics,
            version=sm90.VERSION,
        ),
        _dispatch.Backend(
            "flashinfer_cutile",
            cutile.unsupported,
            cutile.run,
            "widens the weights in registers",
        ),
        _dispatch.xla_backend(xla_matmul.matmul),
    ),
    _fold,
    xla_matmul.matmul,
    token_operands=(0, 2),
)
# Rounding has no useful derivative: the gradient is that of the unquantized product.
_MATMUL_W8A8 = _dispatch.Op(
    "mx_matmul_w8a8",
    (
        _dispatch.Backend(
            "flashinfer_cutlass",
            flashinfer.matmul_unsupported,
            flashinfer.matmul_w8a8,
            "multiplies MXFP8 by MXFP8 in the tensor cores",
            flashinfer.prepare_matmul,
            flashinfer.matmul_tactics,
            flashinfer.VERSION,
        ),
        _dispatch.xla_backend(xla_matmul.matmul_w8a8),
    ),
    _fold,
    xla_matmul.matmul,
)

OPS = (_MATMUL, _MATMUL_W8A8)
W8A8_BACKENDS = tuple(backend.name for backend in _MATMUL_W8A8.backends)


def mx_matmul(
    x: Float[Array, "*batch k"],
    w: MXArray | PreparedWeights,
    *,
    bias: Float[Array, "*g n"] | None = None,
    out_dtype: DTypeLike | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "*batch n"]:
    """Multiplies activations by MXFP8 weights (W8A16): `x @ w.T + bias`.

    The weights are widened exactly, and the sum, bias included, is float32 and rounded
    once. Differentiable with respect to `x` and the bias. Under `jax.vmap` a batch axis
    of `x` becomes more rows of the same product.

    Args:
        x: Activations `[..., k]`, bfloat16, float16 or float32.
        w: Weights `[n, k]`, as a checkpoint stores them, or the transpose of such an
            array: the contracted axis is the one that the blocks run along. With
            leading axes, `[*g, n, k]`, `x` is `[*g, m, k]` and each group has its own
            weights.
        bias: `[*g, n]` of any float dtype; None for none.
        out_dtype: Dtype of the result; None for that of `x`.
        implementation: Which backend runs. None chooses, see `explain`. A named one is
            never replaced by another.

    Returns:
        Array `[..., n]` of `out_dtype`.

    Raises:
        TypeError: If `x` or the bias is not a float array, or `w` not an `MXArray`.
        ValueError: If shapes disagree, or `implementation` is unknown.
        NotImplementedError: If the named implementation cannot run these operands on
            this device; the message says why.
    """
    return _matmul(_MATMUL, x, w, out_dtype, implementation, bias)


def mx_matmul_w8a8(
    x: Float[Array, "*batch k"],
    w: MXArray | PreparedWeights,
    *,
    out_dtype: DTypeLike | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "*batch n"]:
    """Multiplies activations quantized to MXFP8 by MXFP8 weights: `q(x) @ w.T`.

    `q` is `quantize` along k, with one scale per 32 activations. The gradient with
    respect to `x` is that of `mx_matmul`, as if `x` had not been rounded. `w` may also
    be what `jmx8.prepare` made of an `MXArray`. There is no bias, since FlashInfer's
    kernel rounds the product. Otherwise the arguments, the result and the errors are
    those of `mx_matmul`.
    """
    return _matmul(_MATMUL_W8A8, x, w, out_dtype, implementation)


def prepare_matmul(
    w: MXArray | PreparedWeights,
    dtype: DTypeLike,
    implementation: Implementation | None = None,
) -> Any:
    """Returns the weight as the backend of `mx_matmul_w8a8` that will run wants it.

    Args:
        w: `[*g, n, k]`; one that is laid out already is returned as it is if no
            implementation is named.
        dtype: Dtype of the activations and of the result.
        implementation: The backend to lay it out for; None for the first that can run.
    """
    if implementation is None and isinstance(w, PreparedWeights):
        return w
    *groups, _, k = w.shape
    x = jax.ShapeDtypeStruct((*groups, 1, k), dtype)
    options = {"out_dtype": jnp.dtype(dtype)}
    return _dispatch.prepare(_MATMUL_W8A8, implementation, options, x, w)[1]


def _matmul(op, x, w, out_dtype, implementation, bias=None):
    _check_operands(op.name, x, w, bias)
    out_dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    if isinstance(w, MXArray):
        if w.padding:
            x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, w.padding)])
        w = MXArray(w.elements, w.scales, dtype=w.dtype)
    # Backends see [*g, m, k] and [*g, n, k] only.
    num_groups = w.ndim - 2
    m = math.prod(x.shape[num_groups:-1])
    rows = x.reshape(*x.shape[:num_groups], m, x.shape[-1])
    # Of the rows of each group: all have the same.
    biases = () if bias is None else (bias[..., None, :],)
    options = {"out_dtype": out_dtype}
    out = _dispatch.call(op, implementation, options, rows, w, *biases)
    return out.reshape(*x.shape[:-1], out.shape[-1])


def _check_operands(name, x, w, bias):
    if not isinstance(w, MXArray | PreparedWeights):
        raise TypeError(
            f"{name}: w must be an MXArray, got {type(w).__name__}. Use "
            "`jmx8.quantize(w)` to make one."
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name}: x must be a float array, got dtype {x.dtype}.")
    shape = w.mT.shape if isinstance(w, MXArray) and w.transposed else w.shape
    if len(shape) < 2 or x.ndim < 1 or x.shape[-1] != shape[-1]:
        raise ValueError(
            f"{name}: the last axis of x must be k and w must be [..., n, k], got "
            f"{x.shape=} and {w.shape=}, stored as {shape}. Transpose or reshape x."
        )
    groups = shape[:-2]
    if groups and (x.ndim < w.ndim or x.shape[: len(groups)] != groups):
        raise ValueError(
            f"{name}: x must be [*g, m, k] for weights [*g, n, k], got {x.shape=} and "
            f"{w.shape=}. Broadcast x over the groups, or use jax.vmap."
        )
    if bias is None:
        return
    if not jnp.issubdtype(bias.dtype, jnp.floating):
        raise TypeError(f"{name}: bias must be a float array, got dtype {bias.dtype}.")
    if bias.shape != shape[:-1]:
        raise ValueError(
            f"{name}: bias must have shape {shape[:-1]}, one value for each row of the "
            f"weights, got {bias.shape}."
        )


set_matmul(mx_matmul)

"""`dot_general` and `einsum` with an MXFP8 kernel of any number of axes.

They take the arguments of `jax.lax.dot_general` and `jnp.einsum`, so that layers with a
place for such a function run unchanged, and make one call of `mx_matmul`.
"""

import string
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float

from .._kernel_axes import einsum_axes, kernel_axes, KernelAxes, MXKernel
from .._mx_array import MXArray
from .matmul import mx_matmul


@dataclass(frozen=True)
class FoldedKernel:
    """An MXFP8 kernel on the way from a layer's parameter to its product.

    Attributes:
        array: The kernel, flattened to `[*batch, k, n]`.
        axes: The roles of the axes of `shape`.
        shape: The shape that the layer knows.
        dtype: The dtype that the layer computes in.
    """

    array: MXArray
    axes: KernelAxes
    shape: tuple[int, ...]
    dtype: np.dtype

    @classmethod
    def of(
        cls, array: MXArray, axes: KernelAxes, shape: Any, layer: str
    ) -> "FoldedKernel":
        """Returns the view of `array` that `layer` needs.

        Raises:
            ValueError: If `array` is not of `shape`, or quantized along other axes.
        """
        shape = tuple(shape)
        axes = axes.normalize(len(shape))
        if array.shape != shape or kernel_axes(array) != axes:
            raise ValueError(
                f"{layer}: needs a kernel of shape {shape} that is quantized along "
                f"axes {axes.contracted}, got {array}. Pass `contract` to "
                f"`quantize_params`: `{axes}` for this kernel."
            )
        flat = array.flat if isinstance(array, MXKernel) else array
        return cls(flat, axes, shape, array.dtype)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __getitem__(self, key: Any) -> "FoldedKernel":
        if key is not Ellipsis:
            raise TypeError(f"A kernel in MXFP8 can be read whole only, got [{key}].")
        return self


def dot_general(
    x: Float[Array, "..."],
    kernel: FoldedKernel,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    out_sharding: Any = None,
) -> Float[Array, "..."]:
    """Multiplies as `jax.lax.dot_general` does, with a kernel in MXFP8.

    Args:
        x: The left operand.
        kernel: The right operand.
        dimension_numbers: As for `jax.lax.dot_general`.
        precision: Ignored: the weights are exact and sums are float32 at any.
        preferred_element_type: Dtype of the result; None for that of `x`.
        out_sharding: Must be None.

    Returns:
        Batch axes, the other axes of `x`, the other axes of the kernel.

    Raises:
        ValueError: If the kernel was not quantized along the axes to contract.
        NotImplementedError: If `out_sharding` is given.
    """
    del precision
    if out_sharding is not None:
        raise NotImplementedError(
            "dot_general: out_sharding is not supported with an MXArray kernel, got "
            f"{out_sharding}. Constrain the result with jax.lax."
            "with_sharding_constraint or jax.reshard."
        )
    (x_contracted, contracted), (x_batch, batch) = dimension_numbers
    axes = kernel.axes
    asked = KernelAxes(tuple(contracted), tuple(batch)).normalize(kernel.ndim)
    if asked != axes:
        raise ValueError(
            f"dot_general: the kernel of shape {kernel.shape} was quantized for {axes} "
            f"and is used with {asked}. Pass the latter to `quantize_params` as its "
            "`contract`."
        )
    # The order in which `quantize_params` flattened the kernel.
    x_axis = dict(zip((*contracted, *batch), (*x_contracted, *x_batch), strict=True))
    x_free = [i for i in range(x.ndim) if i not in x_axis.values()]
    batch_axes = [x_axis[axis] for axis in axes.batch]
    order = (*batch_axes, *x_free, *(x_axis[axis] for axis in axes.contracted))
    groups = tuple(x.shape[i] for i in batch_axes)
    rows = tuple(x.shape[i] for i in x_free)
    out_free = tuple(kernel.shape[axis] for axis in axes.free(kernel.ndim))
    # A group of products needs an axis of rows, be it of one.
    x = _transposed(x, order).reshape(
        *groups, *(rows or (1,) * bool(groups)), kernel.array.shape[-2]
    )
    out = mx_matmul(x, kernel.array, out_dtype=preferred_element_type)
    out = out.reshape(*groups, *rows, *out_free)
    position = [axes.batch.index(axis + kernel.ndim * (axis < 0)) for axis in batch]
    return _transposed(out, (*position, *range(len(position), out.ndim)))


def einsum(
    spec: str,
    x: Float[Array, "..."],
    kernel: FoldedKernel,
    *,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    out_sharding: Any = None,
) -> Float[Array, "..."]:
    """Multiplies as `jnp.einsum` does, with a kernel in MXFP8 as the second operand.

    Args:
        spec: An explicit equation. The first operand may have an ellipsis, and every
            axis of it has to be in the kernel or in the result.
        x: The first operand.
        kernel: The second.
        precision: Ignored, see `dot_general`.
        preferred_element_type: Dtype of the result; None for that of `x`.
        out_sharding: Must be None.

    Raises:
        ValueError: If the equation is of another kind, or as `dot_general`.
        NotImplementedError: If `out_sharding` is given.
    """
    inputs, result = spec.replace(" ", "").split("->")
    x_names, names = inputs.split(",")
    unused = [c for c in string.ascii_letters if c not in spec]
    ellipsis = "".join(unused[: x.ndim - len(x_names.replace("...", ""))])
    x_names = x_names.replace("...", ellipsis)
    result = result.replace("...", ellipsis)
    lost = [c for c in x_names if c not in names and c not in result]
    if lost or len(set(x_names)) != len(x_names) or len(x_names) != x.ndim:
        raise ValueError(
            "einsum: an MXArray needs an equation whose first operand has no repeated "
            f"axes and none summed on their own, got {spec!r} for {x.shape=}."
        )
    axes = einsum_axes(f"{x_names},{names}->{result}")
    pairs = [
        (tuple(x_names.index(names[i]) for i in group), group)
        for group in (axes.contracted, axes.batch)
    ]
    out = dot_general(x, kernel, pairs, precision, preferred_element_type, out_sharding)
    shared = [names[i] for i in axes.batch]
    have = [
        *shared,
        *(c for c in x_names if c not in names),
        *(names[i] for i in axes.free(len(names))),
    ]
    return _transposed(out, tuple(have.index(c) for c in result))


def _transposed(x: Array, order: tuple[int, ...]) -> Array:
    return x if order == tuple(range(x.ndim)) else jnp.transpose(x, order)

"""`quantize`, by a kernel where there is one."""

from jaxtyping import Array, Float

from .. import _mx_array
from .._mx_array import MXArray
from ..kernels.sm90 import quantize as sm90


def quantize(x: Float[Array, "..."], *, axis: int = -1) -> MXArray:
    # What is transposed first, XLA reads where it is.
    if axis != -1 or sm90.unsupported(x):
        return _mx_array.quantize(x, axis=axis)
    elements, scales = sm90.quantize(x)
    return MXArray(elements, scales, dtype=x.dtype)


quantize.__doc__ = _mx_array.quantize.__doc__

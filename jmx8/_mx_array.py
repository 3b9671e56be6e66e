"""The MXFP8 array type and its exact conversions from and to wider floats.

Terminology, used the same way in the whole package:

- block: 32 consecutive elements along K that share one scale (OCP MX v1.0).
- tile: the sub-matrix that one step of a kernel works on. Never a block.
- linear scales: `[..., n, k // 32]`, row-major. The only layout outside `kernels/`.
"""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, DTypeLike, Float, Float8e4m3fn

from ._numerics import BLOCK_SIZE as BLOCK_SIZE, dequantize_rows, quantize_rows
from ._text import format_bytes
from ._types import Float8e8m0fnu


class MXArray(eqx.Module):
    """An array in MXFP8: E4M3 elements and one E8M0 scale per 32 of them along K.

    Element `i` of a row is `elements[..., i] * 2**(scales[..., i // 32] - 127)`,
    reading the scale as its byte. Blocks always run along the last axis of `elements`,
    which is the axis that a matmul contracts; `w.T` changes how the array is
    presented (`shape`, `@`), never what is stored. Any shape-changing operation other
    than that, and any implicit conversion to an ordinary array, is refused.

    Attributes:
        elements: E4M3 codes, `[..., n, k]`, k rounded up to a multiple of 32.
        scales: E8M0 exponents in linear order, `[..., n, k // 32]`. Code 0xFF is NaN.
        padding: How many trailing elements of K are zeros that the logical array does
            not have.
        dtype: Dtype that the array stands for, the one it was quantized from.
        transposed: Whether the logical shape is `[..., k, n]`.

    Raises:
        ValueError: If the shapes do not fit together. Checked on construction only,
            so that transformations may rebuild the class with placeholder leaves.
    """

    elements: Float8e4m3fn[Array, "..."]
    scales: Float8e8m0fnu[Array, "..."]
    padding: int = eqx.field(static=True, default=0)
    dtype: np.dtype = eqx.field(
        static=True, default=jnp.dtype(jnp.bfloat16), converter=jnp.dtype
    )
    transposed: bool = eqx.field(static=True, default=False)

    # numpy must hand `array @ w` to `__rmatmul__` instead of treating w as an object.
    __array_ufunc__ = None

    def __check_init__(self):
        *batch, k = self.elements.shape
        if k % BLOCK_SIZE != 0:
            raise ValueError(
                f"MXArray: last axis must be a multiple of {BLOCK_SIZE} (one E8M0 "
                f"scale per block), got elements.shape={self.elements.shape}. Use "
                "`quantize`, which pads."
            )
        expected = (*batch, k // BLOCK_SIZE)
        if self.scales.shape != expected:
            raise ValueError(
                f"MXArray: elements of shape {self.elements.shape} need scales of "
                f"shape {expected}, got {self.scales.shape}. Pass linear scales; "
                "swizzled ones belong to a kernel call."
            )
        if not 0 <= self.padding < BLOCK_SIZE:
            raise ValueError(
                f"MXArray: padding must be in [0, {BLOCK_SIZE}), got {self.padding}."
            )
        if self.transposed and self.elements.ndim < 2:
            raise ValueError(
                f"MXArray: a transposed array needs 2 axes, got {self.elements.shape}."
            )

    @property
    def shape(self) -> tuple[int, ...]:
        *batch, k = self.elements.shape
        shape = (*batch, k - self.padding)
        return (*shape[:-2], shape[-1], shape[-2]) if self.transposed else shape

    @property
    def ndim(self) -> int:
        return len(self.elements.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in memory: one per element and one per block."""
        return math.prod(self.elements.shape) + math.prod(self.scales.shape)

    def presented(self, values: Array) -> Array:
        """Returns what the elements stand for, `[..., n, k]` or its transpose, in the
        shape of this array. The same here; a subclass may have another shape."""
        return values

    @property
    def mT(self) -> "MXArray":
        """The array with its last two axes exchanged; no data moves."""
        return MXArray(
            self.elements, self.scales, self.padding, self.dtype, not self.transposed
        )

    @property
    def T(self) -> "MXArray":
        """The transpose of a 2-D array; no data moves."""
        if self.ndim != 2:
            raise ValueError(f"MXArray.T: needs 2 axes, got {self.shape}. Use `mT`.")
        return self.mT

    def __rmatmul__(self, x: Any) -> Array:
        """`x @ w`: contracts x's last axis with w's second-last, which must be K."""
        if not self.transposed:
            raise TypeError(
                f"x @ w: w is an MXArray of shape {self.shape} whose blocks run along "
                "its last axis, and this product would contract another one. Write "
                "`x @ w.T`, or quantize a `[k, n]` weight with `quantize(w, axis=-2)`."
            )
        return _matmul(jnp.asarray(x), self)

    def __matmul__(self, x: Any) -> Array:
        """`w @ x`: contracts w's last axis, which must be K, with x's second-last."""
        if self.transposed:
            raise TypeError(
                f"w @ x: w is a transposed MXArray of shape {self.shape} whose blocks "
                "run along its second-last axis, and this product would contract the "
                "last one. Write `w.T @ x` or `x @ w`."
            )
        x = jnp.asarray(x)
        if x.ndim == 1:
            return _matmul(x, self)
        return jnp.matrix_transpose(_matmul(jnp.matrix_transpose(x), self))

    def __getitem__(self, key: Any) -> "MXArray":
        """`w[...]`, the whole array; anything else is refused."""
        if key is not Ellipsis:
            raise TypeError(
                f"{self} can be indexed with `...` only, got {key!r}. Index the result "
                "of `jmx8.dequantize`, or before quantizing."
            )
        return self

    def __array__(self, dtype=None, copy=None):
        raise TypeError(
            f"{self} is not converted to an ordinary array implicitly. Use "
            "`jmx8.mx_matmul` or `@` to multiply with it, or `jmx8.dequantize` to get "
            "an array."
        )

    def __repr__(self) -> str:
        shape = ",".join(map(str, self.shape))
        kind = "abstract" if _is_abstract(self.elements) else format_bytes(self.nbytes)
        axis = -2 if self.transposed else -1
        return f"MXArray({self.dtype.name}[{shape}], MXFP8 along axis {axis}, {kind})"

    def __pdoc__(self, **_):
        import wadler_lindig as wl  # Equinox's own pretty-printer

        return wl.TextDoc(repr(self))


def _no_matmul(x: Any, w: MXArray) -> Array:
    raise AssertionError("jmx8.ops.matmul has not been imported")


_matmul: Callable[[Any, MXArray], Array] = _no_matmul


def set_matmul(function: Callable[[Any, MXArray], Array]) -> None:
    """Sets what `@` calls. `ops` depends on this module, so it installs itself."""
    global _matmul
    _matmul = function


def quantize(x: Float[Array, "..."], *, axis: int = -1) -> MXArray:
    """Quantizes to MXFP8 along one of the last two axes.

    The scale of a block is the smallest power of two that maps the block's absmax
    into E4M3 range without saturation ("RCEIL"). With `E` and `M` the exponent field
    and mantissa of the absmax as float32: `code = E - 8 + (M > 0x600000)`, and 0 below
    `1.75 * 2**-118`. FlashInfer, cuDNN and TransformerEngine round the same way. The
    OCP specification's own conversion (MX v1.0, section 6.3) rounds down, and may
    saturate. Elements are rounded to nearest even.

    Non-finite values give FlashInfer's bytes, since a jitted function cannot raise:
    NaN becomes +448 and does not count for the absmax; an infinity makes the scale
    2**127, itself +448 and the rest of its block zero; a block whose odd elements are
    all NaN gets the scale 0xFF (NaN). Subnormal values are zeros.

    Args:
        x: Array of any float dtype, at least one axis. Jit-able, vmappable, works on
            abstract values. If the size of `axis` is not a multiple of 32, the stored
            elements are padded with zeros, the logical shape is not.
        axis: The axis that a matmul will contract: -1 for `[..., n, k]`, -2 for
            `[..., k, n]`.

    Returns:
        An `MXArray` of the shape of `x`. An all-zero block gets code 0.

    Raises:
        TypeError: If `x` is not a float array.
        ValueError: If `axis` is neither of the last two axes.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"quantize: x must be a float array, got dtype {x.dtype}.")
    if axis not in (-1, -2) or x.ndim < -axis:
        raise ValueError(
            f"quantize: axis must be -1 or -2 and exist in x, got {axis=}, {x.shape=}. "
            "Move the contracted axis there first."
        )
    transposed = axis == -2
    rows = jnp.matrix_transpose(x) if transposed else x
    padding = -rows.shape[-1] % BLOCK_SIZE
    if padding:
        rows = jnp.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, padding)])
    elements, scales = quantize_rows(rows)
    return MXArray(elements, scales, padding, x.dtype, transposed)


def dequantize(w: MXArray, dtype: DTypeLike = jnp.float32) -> Float[Array, "..."]:
    """Returns the value of `w` as an ordinary array.

    Args:
        w: MXFP8 array.
        dtype: Dtype of the result. The value is exact in float32 and in bfloat16,
            unless it is below their smallest normal number, 2**-126.

    Returns:
        Array of `w.shape`, without the padding of K. Blocks of scale 0xFF are NaN.
    """
    values = dequantize_rows(w.elements, w.scales)
    values = values[..., : values.shape[-1] - w.padding].astype(dtype)
    return w.presented(jnp.matrix_transpose(values) if w.transposed else values)


def _is_abstract(x: Any) -> bool:
    return isinstance(x, Tracer) or not isinstance(x, jax.Array | np.ndarray)

"""Pure-XLA matmuls: run everywhere, and are the reference for the other backends."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from .._mx_array import dequantize, MXArray, quantize


def matmul(
    x: Float[Array, "*g m k"],
    w: MXArray,
    bias: Float[Array, "*g r n"] | None = None,
    *,
    out_dtype: DTypeLike,
) -> Float[Array, "*g m n"]:
    """Computes `x @ w.T + bias` with exactly widened weights, in float32.

    `w` is `[*g, n, k]`, neither padded nor transposed; the bias is one for all rows,
    r = 1, or one for each, r = m.
    """
    dtype = compute_dtype(x.dtype)
    x, w_values = x.astype(dtype), dequantize(w, dtype)
    if bias is None:
        return dot_rows(x, w_values, out_dtype)
    return add_bias(dot_rows(x, w_values, jnp.float32), bias, out_dtype)


def add_bias(
    out: Float[Array, "*g m n"], bias: Float[Array, "*g r n"], out_dtype: DTypeLike
) -> Float[Array, "*g m n"]:
    """Adds a bias to a float32 product, which is rounded then and not before."""
    return (out + bias.astype(jnp.float32)).astype(out_dtype)


def matmul_w8a8(
    x: Float[Array, "*g m k"], w: MXArray, *, out_dtype: DTypeLike
) -> Float[Array, "*g m n"]:
    """As `matmul`, with the rows of `x` quantized too."""
    return matmul(fake_quantize(x), w, out_dtype=out_dtype)


def fake_quantize(x: Float[Array, "*g k"]) -> Float[Array, "*g k"]:
    """Returns the values that `x` has after a round trip through MXFP8.

    They are of the dtype to multiply in: float16 cannot hold what its largest values
    are rounded to.
    """
    # The barrier keeps XLA from quantizing what was not yet rounded to the dtype of x.
    codes = quantize(jax.lax.optimization_barrier(x))
    return dequantize(codes, compute_dtype(x.dtype))


def compute_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Returns the dtype to multiply in: float16 has too few exponents for MXFP8."""
    return jnp.dtype(jnp.bfloat16 if dtype == jnp.bfloat16 else jnp.float32)


def dot_rows(
    x: Float[Array, "*g m k"], w: Float[Array, "*g n k"], out_dtype: DTypeLike
) -> Float[Array, "*g m n"]:
    """Computes `x @ w.T` for each group, accumulated in float32."""
    groups = tuple(range(x.ndim - 2))
    contracted = (x.ndim - 1,)
    out = jax.lax.dot_general(
        x,
        w,
        ((contracted, contracted), (groups, groups)),
        # bfloat16 products are exact in float32; this keeps float32 ones from TF32.
        precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    return out.astype(out_dtype)

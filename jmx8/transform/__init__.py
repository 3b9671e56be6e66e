"""Function transformations: running ordinary JAX code on MXFP8 weights."""

from ._quantized import quantized as quantized

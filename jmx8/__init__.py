"""MXFP8 inference for JAX."""

from ._mx_array import (
    dequantize as dequantize,
    MXArray as MXArray,
    quantize as quantize,
)

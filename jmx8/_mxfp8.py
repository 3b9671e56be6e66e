"""MXFP8 in numbers. Imports nothing."""

BLOCK_SIZE = 32  # OCP MX v1.0 fixes k = 32 for every concrete format.
E4M3_MAX = 448.0
E8M0_BIAS = 127

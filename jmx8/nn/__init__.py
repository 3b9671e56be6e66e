"""Equinox modules that hold MXFP8 weights, and the parts that models share."""

from ._linear import MXLinear as MXLinear
from ._moe import Experts as Experts, MXExperts as MXExperts, SparseMoE as SparseMoE

"""Equinox modules that hold MXFP8 weights, and the parts that models share."""

from ._activations import with_activations as with_activations
from ._linear import MXLinear as MXLinear
from ._moe import Experts as Experts, MXExperts as MXExperts, SparseMoE as SparseMoE
from ._prepare import canonical as canonical, prepare as prepare

"""What may be chosen, in Python and on the command line. Imports nothing from jmx8."""

from typing import Literal


# Numerics of a layer's activations. "auto" is "mxfp8" where the hardware multiplies
# MXFP8 natively and "bf16" elsewhere.
Activations = Literal["bf16", "mxfp8", "auto"]

# What `load` makes of a checkpoint.
LoadDtype = Literal["mxfp8", "bfloat16", "float32"]
Framework = Literal["equinox", "nnx"]

# What `quantize_checkpoint` and `save` write, and after how many bytes the next file
# begins.
FormatName = Literal["modelopt", "compressed-tensors", "mxfp8"]
SHARD_BYTES = 4 * 10**9

"""Type aliases shared by every module. Imports nothing from jmx8."""

from typing import ClassVar, Literal, TYPE_CHECKING


# Backends of the ops. Each op says which of them it has.
Implementation = Literal[
    "sm90", "flashinfer_cutlass", "flashinfer_trtllm", "flashinfer_cutile", "xla"
]

# Numerics of a layer's activations. "auto" is "mxfp8" where the hardware multiplies
# MXFP8 natively and "bf16" elsewhere.
Activations = Literal["bf16", "mxfp8", "auto"]

if TYPE_CHECKING:
    # Static checkers cannot subscript a jaxtyping dtype class.
    from typing import Annotated as Float8e8m0fnu
else:
    from jaxtyping import AbstractDtype

    # jaxtyping 0.3 has no E8M0 type, and its `Float` does not match E8M0 arrays.
    class Float8e8m0fnu(AbstractDtype):
        dtypes: ClassVar = ["float8_e8m0fnu"]

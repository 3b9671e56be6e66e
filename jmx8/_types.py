"""Type aliases shared by every module. See also `_options`."""

from typing import ClassVar, Literal, TYPE_CHECKING

from ._options import Activations as Activations


# Backends of the ops. Each op says which of them it has.
Implementation = Literal[
    "sm90", "flashinfer_cutlass", "flashinfer_trtllm", "flashinfer_cutile", "xla"
]

if TYPE_CHECKING:
    # Static checkers cannot subscript a jaxtyping dtype class.
    from typing import Annotated as Float8e8m0fnu
else:
    from jaxtyping import AbstractDtype

    # jaxtyping 0.3 has no E8M0 type, and its `Float` does not match E8M0 arrays.
    class Float8e8m0fnu(AbstractDtype):
        dtypes: ClassVar = ["float8_e8m0fnu"]

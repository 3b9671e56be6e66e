"""Compiles FlashInfer's cuTile kernels: `python -m jmx8.kernels.cutile.build FILE`.

The only file here that imports FlashInfer (which imports torch). FILE holds a pickled
list of `Cubin`s; whoever asked for them wrote it.
"""

import importlib
import io
import pathlib
import pickle
import sys
from typing import Any

import cuda.tile as ct  # pyright: ignore[reportMissingImports]
from cuda.tile.compilation import (  # pyright: ignore[reportMissingImports]
    ArrayConstraint,
    CallingConvention,
    ConstantConstraint,
    export_kernel,
    KernelSignature,
    ScalarConstraint,
)

from .. import _cache
from ._cubins import compiler_version, path_of, why_not_compile
from ._launch import Cubin


# XLA aligns its buffers to 128 bytes. This is what the tensor copy engine needs, and
# what FlashInfer's own launches find.
_ALIGNMENT = 16


def kernel_of(cubin: Cubin) -> Any:
    """Returns FlashInfer's kernel object."""
    module = importlib.import_module(f"flashinfer.fused_moe.cutile.{cubin.module}")
    return getattr(module, cubin.function)


def constraint_of(parameter: tuple[Any, ...]) -> Any:
    """Returns a parameter of `Cubin.parameters` in cuda-tile's words."""
    kind, *details = parameter
    if kind == "scalar":
        return ScalarConstraint(ct.int32)
    if kind == "constant":
        return ConstantConstraint(*details)
    dtype, index_bits, shape_divisors, stride_divisors = details
    ndim = len(shape_divisors)
    return ArrayConstraint(
        getattr(ct, dtype),
        ndim,
        index_dtype=ct.int64 if index_bits == 64 else ct.int32,
        stride_lower_bound_incl=0,
        alias_groups=(),
        may_alias_internally=False,
        stride_constant=(None,) * (ndim - 1) + (1,),
        stride_divisible_by=stride_divisors,
        shape_divisible_by=shape_divisors,
        base_addr_divisible_by=_ALIGNMENT,
    )


def compile_cubin(cubin: Cubin) -> bytes:
    """Compiles one kernel."""
    kernel = kernel_of(cubin)
    if cubin.hints:
        kernel = kernel.replace_hints(**dict(cubin.hints))
    signature = KernelSignature(
        [constraint_of(parameter) for parameter in cubin.parameters],
        CallingConvention.cutile_python_v1(),
        symbol=cubin.function,
    )
    output = io.BytesIO()
    export_kernel(
        kernel, [signature], output, gpu_code=cubin.arch, output_format="cubin"
    )
    return output.getvalue()


def main(request: str) -> None:
    if problem := why_not_compile():
        sys.exit(f"cannot compile cuTile kernels: {problem}.")
    for cubin in pickle.loads(pathlib.Path(request).read_bytes()):
        _cache.write_whole(path_of(cubin, compiler_version()), compile_cubin(cubin))


if __name__ == "__main__":
    main(sys.argv[1])

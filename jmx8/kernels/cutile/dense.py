"""The backend "flashinfer_cutile" of `mx_matmul`: the grouped kernel, one expert."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from ..._mx_array import MXArray
from .. import _ffi
from .._prepared import PreparedWeights
from ..xla_matmul import add_bias
from . import _backend, _launch, _pipeline, _tiles
from ._launch import Cubin, Target
from ._permute import Permutation
from ._tiles import Gemm


# On an H200 this is level with XLA's product of widened weights at 1024 rows (196 and
# 209 µs for 4096 to 12288), and takes twice as long for twice the rows, which that does
# not.
MOST_ROWS = 1024


def unsupported(
    x: Float[Array, "*g m k"],
    w: MXArray | PreparedWeights,
    bias: Float[Array, "*g r n"] | None = None,
    *,
    out_dtype: DTypeLike,
) -> str | None:
    """Returns why `run` cannot run here, or should not; None if it can."""
    if problem := _backend.why_not_here():
        return problem
    if not isinstance(w, MXArray):
        return f"the weights are laid out for {w.layout.name}"
    if w.ndim != 2:
        return "FlashInfer's cuTile kernels take one weight matrix, not a group of them"
    if x.dtype != jnp.bfloat16:
        return f"FlashInfer's cuTile kernels take bfloat16, and x is {x.dtype}"
    if x.size == 0:
        return "there is nothing to compute"
    num_rows = x.shape[0]
    n, k = w.shape
    if num_rows > MOST_ROWS:
        return (
            f"widening the weights once is faster than doing so for each block of rows "
            f"when there are more than {MOST_ROWS}, and x has {num_rows}"
        )
    arch = _backend.target().arch
    dtype = out_dtype if bias is None else jnp.float32
    return _backend.why_not_built(required_cubins(arch, num_rows, n, k, dtype))


def run(
    x: Float[Array, "m k"],
    w: MXArray,
    bias: Float[Array, "r n"] | None = None,
    *,
    out_dtype: DTypeLike,
) -> Float[Array, "m n"]:
    """Computes `x @ w.T + bias`; see `ops.matmul.mx_matmul`.

    Two runs give the same bits.
    """
    if bias is not None:
        return add_bias(run(x, w, out_dtype=jnp.float32), bias, out_dtype)
    arch = _backend.target().arch
    operands, structure = jax.tree.flatten((x, w))
    product = _product(
        arch,
        *_tiles.dense_tiles(arch, x.shape[0]),
        structure,
        tuple(operand.ndim for operand in operands),
        jax.ShapeDtypeStruct((x.shape[0], w.shape[0]), out_dtype),
    )
    (out,) = product(*operands)
    return out


@functools.cache  # so that calls outside `jit` compile once
def _product(arch, block_rows, gemm, structure, ranks, out_type):
    """Returns the product as a function of arrays that refuses sharded ones."""

    def call(*operands):
        out = matmul(
            *jax.tree.unflatten(structure, operands),
            out_dtype=out_type.dtype,
            block_rows=block_rows,
            gemm=gemm,
            target=_backend.target_of(arch),
        )
        return (out,)

    return _ffi.guard("mx_matmul[flashinfer_cutile]", call, ranks, (out_type,))


def matmul(
    x: Float[Array, "m k"],
    w: MXArray,
    *,
    out_dtype: DTypeLike,
    block_rows: int,
    gemm: Gemm,
    target: Target,
) -> Float[Array, "m n"]:
    """Computes `x @ w.T` with exactly widened weights and float32 accumulation."""
    num_rows = x.shape[0]
    num_blocks = -(-num_rows // block_rows)
    # The rows are in place already, and all places belong to expert 0.
    places = Permutation(
        slots=jnp.zeros(num_blocks * block_rows, jnp.int32),
        block_expert=jnp.zeros(num_blocks, jnp.int32),
        num_places=jnp.full(1, num_rows, jnp.int32),
        place_of=None,
    )
    return _pipeline.grouped_matmul(
        x,
        MXArray(w.elements[None], w.scales[None], dtype=w.dtype),
        gemm,
        places=places,
        num_rows=num_rows,
        block_rows=block_rows,
        target=target,
        num_columns=w.shape[0],
        out_dtype=out_dtype,
    )


@functools.cache
def required_cubins(
    arch: str, num_rows: int, n: int, k: int, out_dtype: DTypeLike = jnp.bfloat16
) -> tuple[Cubin, ...]:
    """Returns the kernels that `x @ w.T` runs for x `[num_rows, k]` and w `[n, k]`."""
    block_rows, gemm = _tiles.dense_tiles(arch, num_rows)
    product = functools.partial(
        matmul,
        out_dtype=out_dtype,
        block_rows=block_rows,
        gemm=gemm,
        target=_backend.target_of(arch),
    )
    x = jax.ShapeDtypeStruct((num_rows, k), jnp.bfloat16)
    with _launch.record() as launches:
        jax.eval_shape(product, x, _backend.abstract_weights(n, k))
    return tuple(dict.fromkeys(launch.cubin for launch in launches))

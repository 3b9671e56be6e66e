"""The functions of the compiled library, as `csrc/exports.cu` exports them.

Operands are trusted below: whoever calls has validated shapes and dtypes.
"""

import functools
from collections.abc import Iterable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..._mx_array import MXArray
from .._ffi import Kernel, Output, Workspace
from ..xla_activation import Activation, SwiGLUOAI
from . import library
from .configs import GemmConfig


def _kernel(name: str, arguments: Iterable[str]) -> Kernel:
    load = functools.partial(library.function, name)
    return Kernel(f"sm90.{name}", load, tuple(arguments))


GEMM = _kernel(
    "gemm",
    (
        *("x", "w", "scales", "bias", "out", "slot_rows", "tiles", "num_tiles"),
        *("activation", "alpha", "beta", "limit"),
        *("kernel", "tile_rows", "variant", "split_k"),
    ),
)
PERMUTE = _kernel(
    "permute",
    (
        *("ids", "slot_rows", "slot_of_row", "tiles", "num_tiles", "workspace"),
        *("num_experts", "tile_rows", "row_divisor"),
    ),
)
COMBINE = _kernel("combine", ("rows", "slot_of_row", "weights", "out"))
ROUTE = _kernel(
    "route",
    (
        *("logits", "bias", "ids", "weights", "scores"),
        *("num_groups", "topk_groups", "renormalize", "scaling_factor"),
    ),
)
QUANTIZE = _kernel("quantize", ("x", "elements", "scales"))

# As `enum class Activation` numbers them; 0 is none.
_ACTIVATIONS = {"silu": 1, "gelu": 2, "gelu_tanh": 3, "relu2": 5}
_SWIGLUOAI = 4


def permute_workspace(num_rows: int, num_experts: int) -> int:
    """Returns how many bytes of scratch memory `PERMUTE` takes."""
    return library.function("permute_workspace")(num_rows, num_experts)


def permute(
    ids: Int[Array, "t k"], *, num_experts: int, tile_rows: int, row_divisor: int
) -> tuple[Array, Array, Array, Array]:
    """Sorts the routed rows by expert; ids outside `[0, num_experts)` get no slot.

    Args:
        ids: `[t, k]`, int32.
        num_experts: Experts that are here.
        tile_rows: The most slots that a tile has.
        row_divisor: What the flat index of a routed row is divided by to give the row
            of x that its slot reads.

    Returns:
        The row of x for each slot, the slot of each routed row (-1 for none), the
        tiles, and their number, all int32.
    """
    num_rows = ids.size
    # Each expert may have one tile that is not full, and no tile is empty.
    max_tiles = min(num_rows, num_experts + num_rows // tile_rows)
    slot_rows, slot_of_row, tiles, num_tiles = PERMUTE(
        ids=ids,
        slot_rows=Output((num_rows,), jnp.int32),
        slot_of_row=Output(ids.shape, jnp.int32),
        tiles=Output((max_tiles, 4), jnp.int32),
        num_tiles=Output((1,), jnp.int32),
        workspace=Workspace(permute_workspace(num_rows, num_experts)),
        num_experts=num_experts,
        tile_rows=tile_rows,
        row_divisor=row_divisor,
    )
    return slot_rows, slot_of_row, tiles, num_tiles


def gemm(
    x: Float[Array, "rows k"],
    w: MXArray,
    bias: Float[Array, "*e n"] | None,
    out: Output,
    config: GemmConfig,
    *,
    tiles: Int[Array, "tiles 4"] | None = None,
    num_tiles: Int[Array, "1"] | None = None,
    slot_rows: Int[Array, " slots"] | None = None,
    activation: Activation | None = None,
) -> Array:
    """Computes `activation(x @ w.T + bias)`, accumulated in float32.

    Args:
        x: bfloat16.
        w: `[n, k]` (stored, so including padding), or `[e, n, k]` with `tiles`.
        bias: `[n]` or `[e, n]` of any float dtype, or None.
        out: `[rows, n]` or, with `tiles`, `[slots, n]`; half of n if the activation is
            gated. bfloat16 or float32.
        config: How it is computed.
        tiles: Which slots belong to which expert, see `permute`.
        num_tiles: How many of `tiles` are used.
        slot_rows: The row of x that a slot reads; None for the slot's own.
        activation: Applied to the sum; None for none.
    """
    if bias is not None and bias.dtype not in (jnp.bfloat16, jnp.float32):
        bias = bias.astype(jnp.float32)
    number, alpha, beta, limit = _activation_parameters(activation)
    (result,) = GEMM(
        x=x,
        w=w.elements,
        scales=w.scales,
        bias=bias,
        out=out,
        slot_rows=slot_rows,
        tiles=tiles,
        num_tiles=num_tiles,
        activation=number,
        alpha=alpha,
        beta=beta,
        limit=limit,
        **config._asdict(),
    )
    return result


def _activation_parameters(
    activation: Activation | None,
) -> tuple[int, float, float, float]:
    """Returns an activation's number and its alpha, beta and limit."""
    if activation == "swigluoai":
        activation = SwiGLUOAI()
    if isinstance(activation, SwiGLUOAI):
        limit = float("inf") if activation.limit is None else float(activation.limit)
        return _SWIGLUOAI, float(activation.alpha), float(activation.beta), limit
    number = 0 if activation is None else _ACTIVATIONS[activation]
    return number, 0.0, 0.0, float("inf")


def combine(
    rows: Float[Array, "slots h"],
    slot_of_row: Int[Array, "t k"],
    weights: Float[Array, "t k"] | None,
) -> Float[Array, "t h"]:
    """Sums the rows of each token by weight, in float32 and in order; None: ones."""
    out = Output((slot_of_row.shape[0], rows.shape[1]), rows.dtype)
    (result,) = COMBINE(rows=rows, slot_of_row=slot_of_row, weights=weights, out=out)
    return result

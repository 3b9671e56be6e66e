"""The functions of the compiled library, as `csrc/exports.cu` exports them.

Operands are trusted below: whoever calls has validated shapes and dtypes.
"""

import functools
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..._mx_array import MXArray
from .._ffi import Kernel, Output
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
        *("ids", "slot_rows", "slot_of_row", "tiles", "num_tiles"),
        *("num_experts", "tile_rows", "row_divisor"),
    ),
)
MOE = _kernel(
    "moe",
    (
        *("x", "w13", "w13_scales", "w13_bias", "w2", "w2_scales", "w2_bias"),
        *("ids", "weights", "out"),
        *("slot_rows", "slot_of_row", "tiles", "num_tiles", "hidden", "rows"),
        *("row_divisor", "activation", "alpha", "beta", "limit", "tile_rows"),
        *("first_kernel", "first_variant", "first_split_k"),
        *("second_kernel", "second_variant", "second_split_k"),
    ),
)
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
    slot_rows, slot_of_row, tiles, num_tiles = PERMUTE(
        ids=ids,
        **_places(ids, num_experts, tile_rows),
        num_experts=num_experts,
        tile_rows=tile_rows,
        row_divisor=row_divisor,
    )
    return slot_rows, slot_of_row, tiles, num_tiles


def _places(ids: Any, num_experts: int, tile_rows: int) -> dict[str, Any]:
    """Returns what `permute` writes."""
    # Each expert may have one tile that is not full, and no tile is empty.
    max_tiles = min(ids.size, num_experts + ids.size // tile_rows)
    return {
        "slot_rows": Output((ids.size,), jnp.int32),
        "slot_of_row": Output(ids.shape, jnp.int32),
        "tiles": Output((max_tiles, 4), jnp.int32),
        "num_tiles": Output((1,), jnp.int32),
    }


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
) -> Array:
    """Computes `x @ w.T + bias`, accumulated in float32.

    Args:
        x: bfloat16.
        w: `[n, k]` (stored, so including padding), or `[e, n, k]` with `tiles`.
        bias: `[n]` or `[e, n]` of any float dtype, or None.
        out: `[rows, n]`, or `[slots, n]` with `tiles`; bfloat16 or float32.
        config: How it is computed.
        tiles: Which slots belong to which of the matrices, see `permute`.
        num_tiles: How many of `tiles` are used.
        slot_rows: The row of x that a slot reads; None for the slot's own.
    """
    (result,) = GEMM(
        x=x,
        w=w.elements,
        scales=w.scales,
        bias=_bias(bias),
        out=out,
        slot_rows=slot_rows,
        tiles=tiles,
        num_tiles=num_tiles,
        **_activation_parameters(None),
        **config._asdict(),
    )
    return result


def moe(
    x: Float[Array, "r padded"],
    w13: MXArray,
    w13_bias: Float[Array, "e n"] | None,
    w2: MXArray,
    w2_bias: Float[Array, "e h"] | None,
    ids: Int[Array, "t k"],
    weights: Float[Array, "t k"] | None,
    first: GemmConfig,
    second: GemmConfig,
    *,
    activation: Activation,
) -> Float[Array, "t h"]:
    """Computes a layer of experts; ids outside `[0, e)` contribute nothing.

    Args:
        x: bfloat16, a row for each token, or for each routed row; stored with the
            padding of w13.
        w13: `[e, 2i, h]`, or `[e, i, h]` if the activation is not gated.
        w13_bias: `[e, 2i]` of any float dtype, or None.
        w2: `[e, h, i]`.
        w2_bias: `[e, h]` of any float dtype, or None.
        ids: `[t, k]`, int32.
        weights: `[t, k]`, float32; None for ones.
        first: How the first matmul is computed.
        second: How the second one is, with as many `tile_rows`.
        activation: Applied between the matmuls.
    """
    num_experts, h, _ = w2.shape
    num_rows = ids.size
    out, *_ = MOE(
        x=x,
        w13=w13.elements,
        w13_scales=w13.scales,
        w13_bias=_bias(w13_bias),
        w2=w2.elements,
        w2_scales=w2.scales,
        w2_bias=_bias(w2_bias),
        ids=ids,
        weights=weights,
        out=Output((ids.shape[0], h), x.dtype),
        **_places(ids, num_experts, first.tile_rows),
        hidden=Output((num_rows, w2.elements.shape[-1]), x.dtype),
        rows=Output((num_rows, h), x.dtype),
        row_divisor=num_rows // x.shape[0],
        tile_rows=first.tile_rows,
        first_kernel=first.kernel,
        first_variant=first.variant,
        first_split_k=first.split_k,
        second_kernel=second.kernel,
        second_variant=second.variant,
        second_split_k=second.split_k,
        **_activation_parameters(activation),
    )
    return out


def _bias(bias: Float[Array, "*e n"] | None) -> Float[Array, "*e n"] | None:
    if bias is not None and bias.dtype not in (jnp.bfloat16, jnp.float32):
        return bias.astype(jnp.float32)
    return bias


def _activation_parameters(activation: Activation | None) -> dict[str, Any]:
    """Returns what the functions are told of an activation; None for none."""
    if activation == "swigluoai":
        activation = SwiGLUOAI()
    if isinstance(activation, SwiGLUOAI):
        limit = float("inf") if activation.limit is None else float(activation.limit)
        values = _SWIGLUOAI, float(activation.alpha), float(activation.beta), limit
    else:
        number = 0 if activation is None else _ACTIVATIONS[activation]
        values = number, 0.0, 0.0, float("inf")
    return dict(zip(("activation", "alpha", "beta", "limit"), values, strict=True))

"""Where FlashInfer's kernels expect each byte of a weight and of its scales.

Pure JAX, and nothing here rounds: every function moves bytes, and has an inverse.
Scales are bytes (`uint8`) throughout, because padding must be zero bytes and E8M0 has
no zero.

Row orders are numpy index arrays with `order[new] = old`, so that several of them
compose (`a[b]` applies `a` first) and a weight is moved once.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, Shaped, UInt8


# Rows of a tile of swizzled scales: the "128x4" and the "8x4" layout.
TileRows = Literal[128, 8]

_TILE_COLS = 4
# trtllm-gen kernels shuffle rows within 32 if their epilogue tile has 128 rows.
_SHUFFLE_ROWS = 32


def round_up(size: int, multiple: int) -> int:
    """Returns the smallest multiple of `multiple` that is at least `size`."""
    return -(-size // multiple) * multiple


def swizzle_scales(
    scales: UInt8[Array, "*e rows cols"], tile_rows: TileRows = 128
) -> UInt8[Array, "*e size"]:
    """Reorders linear scales into tiles of 128 or 8 rows and 4 columns.

    Tiles are in row-major order. Within a 128x4 tile the rows r, r + 32, r + 64 and
    r + 96 are next to each other; an 8x4 tile is row-major. Rows and columns are padded
    with zero bytes to whole tiles, for each element of the leading axes.

    Args:
        scales: Bytes of E8M0 scales, `[..., rows, k // 32]`.
        tile_rows: 128 or 8.

    Returns:
        Bytes `[..., round_up(rows, tile_rows) * round_up(k // 32, 4)]`.
    """
    *batch, rows, cols = scales.shape
    pad_rows, pad_cols = -rows % tile_rows, -cols % _TILE_COLS
    scales = jnp.pad(scales, [(0, 0)] * len(batch) + [(0, pad_rows), (0, pad_cols)])
    quarter = min(tile_rows, 32)
    tiles = scales.reshape(
        *batch,
        (rows + pad_rows) // tile_rows,
        tile_rows // quarter,
        quarter,
        (cols + pad_cols) // _TILE_COLS,
        _TILE_COLS,
    )
    # The quarters of a tile become the second-fastest axis, columns stay the fastest.
    return _permute_last(tiles, (0, 3, 2, 1, 4)).reshape(*batch, -1)


def unswizzle_scales(
    swizzled: UInt8[Array, "*e size"],
    rows: int,
    cols: int,
    tile_rows: TileRows = 128,
) -> UInt8[Array, "*e {rows} {cols}"]:
    """Undoes `swizzle_scales` for scales that had `rows` and `cols`.

    Raises:
        ValueError: If `swizzled` does not have the size of such scales.
    """
    *batch, size = swizzled.shape
    padded_rows, padded_cols = round_up(rows, tile_rows), round_up(cols, _TILE_COLS)
    if size != padded_rows * padded_cols:
        raise ValueError(
            f"unswizzle_scales: {rows} x {cols} scales take {padded_rows} x "
            f"{padded_cols} = {padded_rows * padded_cols} bytes in the {tile_rows}x4 "
            f"layout, got {size}."
        )
    quarter = min(tile_rows, 32)
    tiles = swizzled.reshape(
        *batch,
        padded_rows // tile_rows,
        padded_cols // _TILE_COLS,
        quarter,
        tile_rows // quarter,
        _TILE_COLS,
    )
    linear = _permute_last(tiles, (0, 3, 2, 1, 4))
    return linear.reshape(*batch, padded_rows, padded_cols)[..., :rows, :cols]


def _permute_last(a: Array, axes: tuple[int, ...]) -> Array:
    """Permutes the last axes, counted from the first of them."""
    lead = a.ndim - len(axes)
    return jnp.transpose(a, (*range(lead), *(lead + axis for axis in axes)))


def pack_int32(scales: UInt8[Array, "*b n"]) -> Int32[Array, "*b n//4"]:
    """Packs four bytes to a word, the first in the lowest bits."""
    words = scales.reshape(*scales.shape[:-1], -1, 4)
    return jax.lax.bitcast_convert_type(words, jnp.int32)


def unpack_int32(words: Int32[Array, "*b n"]) -> UInt8[Array, "*b 4*n"]:
    """Undoes `pack_int32`."""
    scales = jax.lax.bitcast_convert_type(words, jnp.uint8)
    return scales.reshape(*words.shape[:-1], -1)


def swap_halves(rows: int) -> np.ndarray:
    """Returns the order that makes `[up; gate]` of `[gate; up]`; its own inverse."""
    return np.roll(np.arange(rows), -_half(rows))


def interleave_halves(rows: int) -> np.ndarray:
    """Returns the order that makes up0, gate0, up1, gate1, … of `[up; gate]`."""
    return np.arange(rows).reshape(2, _half(rows)).T.reshape(-1)


def _half(rows: int) -> int:
    if rows % 2 != 0:
        raise ValueError(
            f"A gated weight must have an even number of rows, got {rows}."
        )
    return rows // 2


def shuffle_rows(rows: int) -> np.ndarray:
    """Returns the order of a trtllm-gen weight with an epilogue tile of 128 rows.

    Of every 32 rows: 0, 4, 8, …, 28, then 1, 5, …, 29, and so on to 31.
    """
    if rows % _SHUFFLE_ROWS != 0:
        raise ValueError(
            f"shuffle_rows: rows must be a multiple of {_SHUFFLE_ROWS}, got {rows}."
        )
    blocks = np.arange(rows).reshape(-1, _SHUFFLE_ROWS // 4, 4)
    return blocks.transpose(0, 2, 1).reshape(-1)


def invert(order: np.ndarray) -> np.ndarray:
    """Returns the order that undoes `order`."""
    return np.argsort(order)


def take_rows(
    a: Shaped[Array, "*e rows cols"], order: np.ndarray
) -> Shaped[Array, "*e rows cols"]:
    """Returns the rows of a matrix of bytes, or of wider numbers, in another order."""
    return jnp.take(a, order.astype(np.int32), axis=-2, mode="clip")

"""What a conversion did: one row per tensor, with sizes and errors."""

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._mx_array import dequantize, MXArray
from .._mxfp8 import E8M0_BIAS
from .._text import format_bytes, format_table


_MAX_NAMES = 4  # of kept tensors that the summary tells for one reason


@dataclass(frozen=True)
class Statistics:
    """How well an `MXArray` stands for the array that it was quantized from.

    Attributes:
        sqnr_db: Signal to quantization noise, `10 log10(sum x**2 / sum (x - y)**2)`
            with y the dequantized array. Infinite if they are equal.
        amax: The largest magnitude of the original.
        exponent_min: Exponent of the smallest scale, among blocks that hold something
            other than zeros. None if there is no such block.
        exponent_max: Exponent of the largest scale, likewise.
    """

    sqnr_db: float
    amax: float
    exponent_min: int | None
    exponent_max: int | None


@dataclass(frozen=True)
class ReportRow:
    """What happened to one tensor.

    Attributes:
        path: Where it is in the tree.
        shape: Its logical shape.
        dtype: Its dtype before.
        action: "converted" or "kept".
        reason: Why it was kept, or how the contracted axis was known.
        axis: The contracted axis, -1 or -2. None if kept.
        bytes_before: Bytes of the original; 0 if an earlier row has them.
        bytes_after: Bytes of the result; 0 if an earlier row has them.
        statistics: Conversion errors. None if kept or not computed, as for abstract
            arrays.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    action: Literal["converted", "kept"]
    reason: str
    axis: int | None
    bytes_before: int
    bytes_after: int
    statistics: Statistics | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the row as JSON values; an infinite or NaN SQNR as a string."""
        row: dict[str, Any] = dataclasses.asdict(self) | {"shape": list(self.shape)}
        statistics = row.pop("statistics")
        names = [field.name for field in dataclasses.fields(Statistics)]
        row.update(statistics or dict.fromkeys(names))
        return {name: _json_value(value) for name, value in row.items()}


@dataclass(frozen=True)
class Report:
    """What a conversion did. `str()` gives a table.

    Attributes:
        rows: One per tensor, in tree order.
    """

    rows: tuple[ReportRow, ...]

    @property
    def converted(self) -> tuple[ReportRow, ...]:
        return tuple(row for row in self.rows if row.action == "converted")

    @property
    def kept(self) -> tuple[ReportRow, ...]:
        return tuple(row for row in self.rows if row.action == "kept")

    @property
    def bytes_before(self) -> int:
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        return sum(row.bytes_after for row in self.rows)

    def worst(self, count: int = 5) -> tuple[ReportRow, ...]:
        """Returns the converted tensors with the lowest SQNR, worst first."""
        measured = [row for row in self.rows if row.statistics is not None]
        return tuple(sorted(measured, key=_sqnr)[:count])

    def to_dict(self) -> dict[str, Any]:
        """Returns the totals and rows as values that `json.dumps` takes."""
        return {
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "num_converted": len(self.converted),
            "num_kept": len(self.kept),
            "rows": [row.to_dict() for row in self.rows],
        }

    def summary(self) -> str:
        """Returns the totals, and which tensors were kept and why, in a few lines."""
        converted = self.converted
        lines = [
            f"{len(converted)} of {len(self.rows)} tensors converted to MXFP8, "
            f"{format_bytes(self.bytes_before)} -> {format_bytes(self.bytes_after)}"
        ]
        worst = self.worst(1)
        if worst:
            lines.append(f"lowest SQNR {_format_db(worst[0])} dB: {worst[0].path}")
        reasons: dict[str, list[ReportRow]] = {}
        for row in self.kept:
            reasons.setdefault(row.reason, []).append(row)
        for reason, rows in reasons.items():
            size = format_bytes(sum(row.bytes_after for row in rows))
            paths = [re.sub(r"(?<=[/.])\d+(?=[/.])", "*", row.path) for row in rows]
            names = list(dict.fromkeys(paths))
            more = [f"{len(names) - _MAX_NAMES} more"] if names[_MAX_NAMES:] else []
            names = ", ".join(names[:_MAX_NAMES] + more)
            lines.append(f"kept {len(rows)} ({size}): {reason} ({names})")
        return "\n".join(lines)

    def __str__(self) -> str:
        header = ("tensor", "shape", "before", "after", "SQNR dB", "amax", "exponents")
        cells = [(*header, "what")] + [_cells(row) for row in self.rows]
        table = format_table(cells, left=(0, 1, len(header)))
        return "\n".join([table, "", self.summary()])


class Piece(NamedTuple):
    """What the statistics of a part of an array are made of, relative to its amax."""

    signal: float
    noise: float
    amax: float
    codes: tuple[int, ...]  # the smallest and the largest scale in use, if any


def measure(x: Array, w: MXArray) -> Statistics:
    """Compares an array with its quantized form, in one pass over both.

    Args:
        x: The original, concrete. If sharded, `w` has to be sharded alike, and what
            counts is what this process holds.
        w: `quantize(x)`, along either axis.

    Returns:
        The statistics. Every term is float32, their sums are float64.
    """
    return combine_pieces([measure_piece(*piece) for piece in _pieces(x, w)])


def measure_piece(x: Array, w: MXArray) -> Piece:
    """Measures a part of an array on one device, for `combine_pieces`."""
    signal, noise, amax, smallest, largest = jax.device_get(_sums(x, w))
    # Row sums are added here: a float32 sum over an expert stack loses digits.
    return Piece(
        float(np.sum(signal, dtype=np.float64)),
        float(np.sum(noise, dtype=np.float64)),
        float(amax),
        (int(smallest), int(largest)) if largest > 0 else (),
    )


def combine_pieces(pieces: Sequence[Piece]) -> Statistics:
    """Returns the statistics of an array from those of all its parts, at least one."""
    amax = float(np.max([piece.amax for piece in pieces]))
    # Each piece is relative to its own amax, so that squares do not overflow.
    factors = [(p.amax / amax) ** 2 if p.amax < amax else 1.0 for p in pieces]
    signal = math.fsum(p.signal * f for p, f in zip(pieces, factors, strict=True))
    noise = math.fsum(p.noise * f for p, f in zip(pieces, factors, strict=True))
    codes = [code for piece in pieces for code in piece.codes]
    return Statistics(
        sqnr_db=_decibels(signal, noise),
        amax=amax,
        exponent_min=min(codes) - E8M0_BIAS if codes else None,
        exponent_max=max(codes) - E8M0_BIAS if codes else None,
    )


def _pieces(x: Array, w: MXArray) -> list[tuple[Array, MXArray]]:
    """Splits a sharded pair into what each device holds, replicas left out."""
    if len(x.sharding.device_set) == 1:
        return [(x, w)]
    elements = {shard.device: shard.data for shard in w.elements.addressable_shards}
    scales = {shard.device: shard.data for shard in w.scales.addressable_shards}

    def local(device) -> MXArray:
        parts = elements[device], scales[device]
        return MXArray(*parts, w.padding, w.dtype, w.transposed)

    shards = [shard for shard in x.addressable_shards if shard.replica_id == 0]
    return [(shard.data, local(shard.device)) for shard in shards]


@jax.jit
def _sums(x: Array, w: MXArray) -> tuple[Array, Array, Array, Array, Array]:
    x = x.astype(jnp.float32)
    amax = jnp.max(jnp.abs(x))
    unit = jnp.where(amax > 0, amax, 1)
    # Divided one by one: the difference is exact, its square may underflow.
    signal = jnp.sum(jnp.square(x / unit), axis=-1)
    noise = jnp.sum(jnp.square((x - dequantize(w)) / unit), axis=-1)
    codes = jax.lax.bitcast_convert_type(w.scales, jnp.uint8).astype(jnp.int32)
    # Code 0 is a block of zeros and 255 is NaN; neither has an exponent.
    used = (codes > 0) & (codes < 255)
    smallest = jnp.min(jnp.where(used, codes, 255))
    largest = jnp.max(jnp.where(used, codes, 0))
    return signal, noise, amax, smallest, largest


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    # Two logarithms: a noise of infinity gives -inf, not a domain error.
    return 10 * (math.log10(signal) - math.log10(noise)) if signal > 0 else math.nan


def _json_value(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _sqnr(row: ReportRow) -> float:
    assert row.statistics is not None
    # NaN is worse than any number, and would make the order arbitrary.
    value = row.statistics.sqnr_db
    return -math.inf if math.isnan(value) else value


def _format_db(row: ReportRow) -> str:
    return "" if row.statistics is None else f"{row.statistics.sqnr_db:.1f}"


def _cells(row: ReportRow) -> tuple[str, ...]:
    statistics = row.statistics
    exponents = "" if statistics is None else _format_range(statistics)
    return (
        row.path,
        ",".join(map(str, row.shape)),
        format_bytes(row.bytes_before),
        format_bytes(row.bytes_after),
        _format_db(row),
        "" if statistics is None else f"{statistics.amax:.4g}",
        exponents,
        f"{row.action}: {row.reason}",
    )


def _format_range(statistics: Statistics) -> str:
    if statistics.exponent_min is None:
        return "none"
    return f"{statistics.exponent_min}..{statistics.exponent_max}"

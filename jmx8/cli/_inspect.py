"""`jmx8 inspect`: what a checkpoint is, what its conversion does, how two differ."""

import dataclasses
import gc
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from .._mx_array import format_bytes
from ..checkpoint import load
from ..checkpoint.compare import compare, Difference, differing_layers
from ..checkpoint.describe import describe, Description
from ..convert import format_table, Report, ReportRow
from ._console import loading_bar


SortKey = Literal["name", "bytes", "sqnr", "amax", "exponent"]
_MAX_PROBLEMS = 5


def print_description(folder: Path, sort: SortKey, limit: int | None, as_json: bool):
    """Prints what a checkpoint is; reads headers only."""
    gc.disable()  # a quarter of the time for a large checkpoint, and nothing to collect
    found = describe(folder)
    if sort == "bytes":
        layers = sorted(found.layers, key=lambda layer: -layer.num_bytes)
        found = dataclasses.replace(found, layers=tuple(layers))
    if as_json:
        layers = found.to_dict()["layers"][:limit]
        print(json.dumps(found.to_dict() | {"layers": layers}, indent=1))
    else:
        print(format_description(found, limit))


def format_description(found: Description, limit: int | None) -> str:
    """Returns a description as text, with the first `limit` layers."""
    parts = [
        f"{found.path}: {found.model_type or 'no model_type'}, format: {found.format}",
        f"{found.num_parameters:,} parameters, {format_bytes(found.num_bytes)} in "
        f"{found.num_files} files",
    ]
    for name, (count, num_bytes) in found.totals().items():
        parts.append(f"  {name}: {count} weights, {format_bytes(num_bytes)}")
    for problem in found.problems[:_MAX_PROBLEMS]:
        parts.append(f"jmx8 does not read it: {problem}")
    if len(found.problems) > _MAX_PROBLEMS:
        parts.append(f"... and {len(found.problems) - _MAX_PROBLEMS} more problems")
    kinds = [("weights", "stored as", "shape", "count", "bytes")]
    kinds += [
        (
            kind.pattern,
            kind.stored_as,
            ",".join(map(str, kind.shape)),
            str(kind.count),
            format_bytes(kind.num_bytes),
        )
        for kind in found.kinds
    ]
    layers = [("layer", "parameters", "quantized", "bytes")]
    layers += [
        (
            layer.name,
            f"{layer.num_parameters:,}",
            f"{layer.num_quantized / max(1, layer.num_parameters):.1%}",
            format_bytes(layer.num_bytes),
        )
        for layer in found.layers[:limit]
    ]
    tables = [format_table(kinds, left=(0, 1, 2)), format_table(layers, left=(0,))]
    return "\n\n".join(["\n".join(parts), *tables])


def print_comparison(
    folder: Path, other: Path, limit: int | None, as_json: bool, quiet: bool
):
    """Prints how far the weights of two checkpoints are apart."""
    with loading_bar("comparing", quiet) as advance:
        differences = compare(folder, other, progress=advance)
    layers = differing_layers(differences)
    # What only one has comes first, then the largest errors.
    shown = sorted(differences, key=_distance)[:limit]
    if as_json:
        rows = [difference.to_dict() for difference in shown]
        print(json.dumps({"differing_layers": layers, "weights": rows}, indent=1))
        return
    cells = [("weight", "first", "second", "SQNR dB", "max difference")]
    cells += [_comparison_cells(difference) for difference in shown]
    print(format_table(cells, left=(0, 1, 2)))
    equal = sum(difference.is_equal for difference in differences)
    print(f"\n{equal} of {len(differences)} weights are equal")
    for layer, count in layers.items():
        print(f"{layer}: {count} differ")


def _distance(difference: Difference) -> float:
    value = difference.sqnr_db
    return -math.inf if value is None or math.isnan(value) else value


def _comparison_cells(difference: Difference) -> tuple[str, ...]:
    if difference.sqnr_db is None or difference.max_difference is None:
        figures = ("", "")
    elif difference.is_equal:
        figures = ("equal", "0")
    else:
        figures = f"{difference.sqnr_db:.1f}", f"{difference.max_difference:.4g}"
    first, second = difference.first or "absent", difference.second or "absent"
    return difference.name, first, second, *figures


def inspect_folder(
    folder: Path, *, skip: list[str], only: list[str], requantize: bool, quiet: bool
) -> Report:
    """Converts a checkpoint and returns the report on it."""
    with loading_bar("converting", quiet) as advance:
        _, report = load(
            folder,
            skip=skip or None,
            only=only or None,
            requantize=requantize,
            progress=advance,
            return_report=True,
        )
    return report


def sort_report(report: Report, key: SortKey, limit: int | None) -> Report:
    """Orders the rows, and drops all but the first `limit`.

    "name" goes up; "bytes", "amax" and "exponent" (the span of the scales) go down;
    "sqnr" puts the largest errors first. Rows without the figure come last.
    """
    rows = sorted(report.rows, key=_ORDERS[key])
    return dataclasses.replace(report, rows=tuple(rows[:limit]))


def format_report(report: Report, shown: Report, as_json: bool) -> str:
    """Returns the rows of `shown` and the totals of `report`."""
    if as_json:
        rows = [row.to_dict() for row in shown.rows]
        return json.dumps(report.to_dict() | {"rows": rows}, indent=1)
    table = str(shown).partition("\n\n")[0]
    return f"{table}\n\n{report.summary()}"


def _statistic(name: str, descending: bool) -> Callable[[ReportRow], float]:
    def order(row: ReportRow) -> float:
        value = None if row.statistics is None else getattr(row.statistics, name)
        if value is None:
            return math.inf
        return -value if descending else value

    return order


def _exponent_span(row: ReportRow) -> float:
    statistics = row.statistics
    if statistics is None or statistics.exponent_max is None:
        return math.inf
    assert statistics.exponent_min is not None  # both or neither
    return statistics.exponent_min - statistics.exponent_max


_ORDERS: dict[SortKey, Callable[[ReportRow], Any]] = {
    "name": lambda row: row.path,
    "bytes": lambda row: -row.bytes_after,
    "sqnr": _statistic("sqnr_db", descending=False),
    "amax": _statistic("amax", descending=True),
    "exponent": _exponent_span,
}

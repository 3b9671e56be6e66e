"""`jmx8 inspect` with weights: what a conversion does, how two checkpoints differ."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .._text import format_table
from ..checkpoint import load
from ..checkpoint.compare import compare, Difference, differing_layers
from ..convert import Report, ReportRow
from ._console import loading_bar
from ._inspect import SortKey


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

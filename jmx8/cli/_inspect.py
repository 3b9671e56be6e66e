"""`jmx8 inspect`: what the conversion of a checkpoint does to each tensor."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from ..checkpoint import load
from ..convert import Report, ReportRow
from ._console import loading_bar


SortKey = Literal["name", "bytes", "sqnr", "amax", "exponent"]


def inspect_folder(
    folder: Path, *, skip: list[str], only: list[str], quiet: bool
) -> Report:
    """Converts a checkpoint and returns the report on it."""
    with loading_bar("converting", quiet) as advance:
        _, report = load(
            folder,
            skip=skip or None,
            only=only or None,
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

"""The error of everything that is wrong with files, and reading JSON strictly."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


_MAX_LISTED = 100
_MAX_LINE = 600


class CheckpointError(ValueError):
    """A checkpoint that cannot be read as asked.

    The message has one line per problem, each naming the file and, where there is one,
    the tensor. It is meant to be shown to a person without a traceback.

    Attributes:
        problems: Every problem, one line each. The message lists the first hundred.
    """

    def __init__(self, problems: str | Sequence[str]):
        problems = (problems,) if isinstance(problems, str) else problems
        self.problems = tuple(_one_line(problem) for problem in problems)
        lines = list(self.problems[:_MAX_LISTED])
        if len(self.problems) > _MAX_LISTED:
            lines.append(f"... and {len(self.problems) - _MAX_LISTED} more problems")
        super().__init__("\n".join(lines))


def not_finite(weight: object, start: int, rows: np.ndarray) -> CheckpointError:
    """Returns the error of float32 rows of a weight, the first being row `start`."""
    nan, inf = np.isnan(rows).sum(), np.isinf(rows).sum()
    found = f"{nan} NaN and {inf} infinite" if nan or inf else "bfloat16 overflow"
    return CheckpointError(
        f"{weight}: weights must be finite, found {found} in rows {start} to "
        f"{start + len(rows) - 1}"
    )


def parse_json_object(data: bytes, where: Path | str) -> dict[str, Any]:
    """Returns a JSON object, in which no key may appear twice at any level."""
    try:
        value = json.loads(data.decode(), object_pairs_hook=_unique)
    # Deep nesting exhausts the parser's stack; every other defect is a ValueError.
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{where}: not valid JSON: {reason}") from None
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{where}: must hold a JSON object, got {type(value).__name__}"
        )
    return value


def read_json_object(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file."""
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path}: not a regular file")
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    return parse_json_object(data, path)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {key!r} appears twice")
            seen.add(key)
    return result


def _one_line(text: str) -> str:
    """Returns text that a file's content cannot break into lines or terminal codes."""
    if len(text) > _MAX_LINE:
        text = f"{text[:_MAX_LINE]}..."
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)

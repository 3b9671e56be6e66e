"""How far the weights of two checkpoints are apart."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .describe import layer_name, natural_order, stored_as
from .errors import CheckpointError
from .folder import open_folder
from .plan import CHUNK_BYTES
from .stored import find_weights, MXRows, settle_scales, Weight
from .stream import Progress


@dataclass(frozen=True)
class Difference:
    """A weight of two checkpoints.

    Attributes:
        name: Its name.
        first: How the first stores it, with the shape if that differs; "" if it has
            none.
        second: Likewise.
        sqnr_db: `10 log10(sum a**2 / sum (a - b)**2)`, a the first. Infinite if all
            values are equal, None if there is nothing to compare.
        max_difference: The largest `|a - b|`, None likewise.
    """

    name: str
    first: str
    second: str
    sqnr_db: float | None = None
    max_difference: float | None = None

    @property
    def is_equal(self) -> bool:
        """Whether both have it, with the same values."""
        return self.max_difference == 0

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON values; what is not finite as a string."""
        return {
            name: str(value)
            if isinstance(value, float) and not math.isfinite(value)
            else value
            for name, value in asdict(self).items()
        }


def compare(
    first: Path | str, second: Path | str, *, progress: Progress | None = None
) -> tuple[Difference, ...]:
    """Compares the weights of two checkpoints, whatever formats they are in.

    Both are read a few rows at a time. Weights are matched by name.

    Args:
        first: Folder of the reference.
        second: Folder of the other.
        progress: Called with the bytes read so far, the bytes in all, and the name of
            the weight.

    Returns:
        One `Difference` per name, in the order of the layers.

    Raises:
        CheckpointError: If either is not a checkpoint that is read.
    """
    ours, others = _weights(first), _weights(second)
    both = ours.keys() & others.keys()
    total = sum(ours[name].nbytes + others[name].nbytes for name in both)
    done = 0
    result = []
    for name in sorted(ours.keys() | others.keys(), key=natural_order):
        a, b = ours.get(name), others.get(name)
        if a is None or b is None or a.shape != b.shape:
            result.append(Difference(name, _describe(a, b), _describe(b, a)))
        else:
            result.append(Difference(name, stored_as(a), stored_as(b), *_measure(a, b)))
        if a is not None and b is not None:
            done += a.nbytes + b.nbytes
            if progress is not None:
                progress(done, total, name)
    return tuple(result)


def differing_layers(differences: tuple[Difference, ...]) -> dict[str, int]:
    """Returns how many weights differ, for every layer in which any does."""
    result: dict[str, int] = {}
    for difference in differences:
        if not difference.is_equal:
            layer = layer_name(difference.name)
            result[layer] = result.get(layer, 0) + 1
    return result


def _weights(folder: Path | str) -> dict[str, Weight]:
    found = find_weights(open_folder(folder))
    # Scales that are no powers of two are no harm here: nothing is kept in MXFP8.
    return settle_scales(found.values(), requantize=True)


def _describe(weight: Weight | None, other: Weight | None) -> str:
    if weight is None:
        return ""
    if other is None:
        return stored_as(weight)
    return f"{stored_as(weight)} {list(weight.shape)}"


def _measure(a: Weight, b: Weight) -> tuple[float, float]:
    """Returns the SQNR and the largest difference of two weights of one shape."""
    signal = noise = largest = 0.0
    for x, y in _aligned(_values(a), _values(b)):
        with np.errstate(invalid="ignore", over="ignore"):
            difference = np.where(x == y, 0, x - y)  # equal infinities do not differ
            difference[np.isnan(x) & np.isnan(y)] = 0
            signal += float(np.sum(np.square(x)))
            noise += float(np.sum(np.square(difference)))
            largest = max(largest, float(np.max(np.abs(difference), initial=0)))
            if np.isnan(difference).any():
                largest = math.nan
    if noise == 0:
        return math.inf, largest
    if signal == 0:
        return -math.inf, largest
    return 10 * (math.log10(signal) - math.log10(noise)), largest


def _values(weight: Weight) -> Iterator[np.ndarray]:
    """Yields the rows of a weight as float64."""
    for _, rows in weight.iter_rows(CHUNK_BYTES):
        values = rows.dequantize() if isinstance(rows, MXRows) else rows
        try:
            yield values.astype(np.float64)
        except (TypeError, ValueError):
            raise CheckpointError(
                f"{weight}: {values.dtype} has no values to compare"
            ) from None


def _aligned(
    first: Iterator[np.ndarray], second: Iterator[np.ndarray]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the same rows of both, however each is cut into pieces."""
    x = y = np.empty((0, 0))
    while True:
        x = x if len(x) else next(first, x)
        y = y if len(y) else next(second, y)
        count = min(len(x), len(y))
        if not count:
            return
        yield x[:count], y[:count]
        x, y = x[count:], y[count:]

"""Which weight goes where, decided from headers before any of them is read."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from .._mxfp8 import BLOCK_SIZE
from .errors import CheckpointError
from .folder import CheckpointFolder, Source
from .names import NameTable, Slot
from .stored import settle_scales, Weight


# How much is read at once: long enough to transfer and convert at full speed, short
# beside any model that is worth converting.
CHUNK_BYTES = 4 * 2**20

# What weights that are not quantized may be stored as.
_FLOATS = (ml_dtypes.bfloat16, np.float16, np.float32)


@dataclasses.dataclass(frozen=True)
class Part:
    """A weight that fills rows of a parameter.

    Attributes:
        weight: The weight on disk.
        path: Path of the parameter.
        start: First row, in the parameter with all axes but the last merged.
    """

    weight: Weight
    path: str
    start: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to read.

    Attributes:
        parts: Every weight that is read into a parameter, in the order of the data on
            disk. They fill every parameter exactly once.
        copies: Pairs of a weight that is not read, and the one that it must equal.
    """

    parts: tuple[Part, ...]
    copies: tuple[tuple[Weight, Weight], ...]

    @property
    def num_bytes(self) -> int:
        return sum(part.weight.nbytes for part in self.parts)


def make_plan(
    folder: CheckpointFolder,
    weights: Mapping[str, Weight],
    leaves: Mapping[str, Any],
    table: NameTable,
    *,
    requantize: bool = False,
) -> Plan:
    """Matches the weights of a checkpoint with the parameters of a model, strictly.

    Args:
        folder: The checkpoint.
        weights: Its weights, as `find_weights` returns them.
        leaves: The parameters by path; only their `shape` counts.
        table: How the parameters are stored.
        requantize: Whether weights that are in blocks of FP8, but not in MXFP8, may be
            rounded anew.

    Returns:
        The plan.

    Raises:
        CheckpointError: If a weight is missing, unknown, given in two ways, of the
            wrong shape or of a dtype that is not read. All such problems are listed.
    """
    slots: dict[str, tuple[str, Slot]] = {}
    problems: list[str] = []
    for path, leaf in leaves.items():
        ways = table.alternatives(path, leaf.shape)
        present = [way for way in ways if any(slot.name in weights for slot in way)]
        if len(present) > 1:
            first, second = (_first_present(way, weights) for way in present[:2])
            problems.append(f"{second}: given twice, {first} is a part of it too")
        for way in present or ways[:1]:
            slots |= {slot.name: (path, slot) for slot in way}
    for name, (path, _) in slots.items():
        if name not in weights:
            problems.append(f"{folder.path}: {name}: missing, {path} needs it")
    weights = _turn(weights, [slot for _, slot in slots.values()])
    copies = dict(_copies(weights, slots, table))
    for name, weight in weights.items():
        problems += _problems(weight, slots.get(name), copies.get(name))
    if problems:
        raise CheckpointError(problems)
    used = [weight for name, weight in weights.items() if name in slots]
    settled = settle_scales(used, requantize=requantize)
    return Plan(
        tuple(
            Part(weight, slots[name][0], slots[name][1].start)
            for name, weight in settled.items()
        ),
        tuple((weights[name], copy) for name, copy in copies.items()),
    )


def check_copies(plan: Plan) -> None:
    """Checks that weights which are not read hold what the model has in their place.

    Raises:
        CheckpointError: If one differs from its original in any bit.
    """
    for copy, original in plan.copies:
        _check_equal(copy.source, original.source)
        if copy.scales is not None and original.scales is not None:
            _check_equal(copy.scales, original.scales)


def _check_equal(copy: Source, original: Source) -> None:
    for start, rows in copy.file.iter_rows(copy.info.name, CHUNK_BYTES):
        stop = start + len(rows)
        other = original.file.read_rows(original.info.name, start, stop)
        if not np.array_equal(rows.view(np.uint8), other.view(np.uint8)):
            raise CheckpointError(
                f"{copy}: differs from {original.info.name} in rows {start} to "
                f"{stop - 1}, but config.json ties the two"
            )


def _first_present(way: list[Slot], weights: Mapping[str, Weight]) -> Weight:
    return next(weights[slot.name] for slot in way if slot.name in weights)


def _turn(weights: Mapping[str, Weight], slots: Iterable[Slot]) -> dict[str, Weight]:
    """Returns the weights with stacks of experts marked that are `[e, k, n]` on disk.

    A square stack tells nothing, so the other stacks of the checkpoint decide.
    """
    stacks = {
        slot.name: slot.shape
        for slot in slots
        if len(slot.shape) == 3 and slot.name in weights
    }
    turned = any(
        weights[name].shape == (e, k, n) != (e, n, k)
        for name, (e, n, k) in stacks.items()
    )
    return {
        name: (
            dataclasses.replace(weight, transposed=True)
            if turned and name in stacks
            else weight
        )
        for name, weight in weights.items()
    }


def _copies(
    weights: Mapping[str, Weight], slots: Mapping[str, Any], table: NameTable
) -> Iterator[tuple[str, Weight]]:
    for name, original in table.tied:
        if name not in slots and {name, original} <= weights.keys():
            yield name, weights[original]


def _problems(
    weight: Weight, target: tuple[str, Slot] | None, original: Weight | None
) -> Iterator[str]:
    """Yields what is wrong with one weight of the checkpoint."""
    info = weight.source.info
    if target is None and original is None:
        yield f"{weight}: unknown, the model has no place for it"
        return
    if weight.scales is None and info.dtype not in _FLOATS:
        yield (
            f"{weight}: dtype must be bfloat16, float16 or float32, or float8_e4m3fn "
            f"with scales, got {info.dtype}"
        )
    if weight.transposed and weight.block == (1, BLOCK_SIZE) and weight.scales:
        yield (
            f"{weight}: is stored as [e, k, n] with blocks along n; MXFP8 needs them "
            "along k, which a product sums over"
        )
    if original is not None:
        wanted, dtype = original.shape, original.source.info.dtype
        if info.dtype != dtype or (weight.scales is None) != (original.scales is None):
            yield f"{weight}: dtype must be that of {original.name}, {dtype}"
    else:
        assert target is not None
        wanted = target[1].shape
    if weight.shape != wanted:
        yield (
            f"{weight}: shape must be {list(wanted)} by config.json, got "
            f"{list(weight.shape)}"
        )

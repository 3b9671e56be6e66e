"""Which tensor goes where, decided from headers before any data is read."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from .errors import CheckpointError
from .folder import CheckpointFolder, Source
from .names import NameTable, Slot


# How much is read at once: long enough to transfer and convert at full speed, short
# beside any model that is worth converting.
CHUNK_BYTES = 4 * 2**20

# What weights may be stored as. Everything else has been quantized already.
_FLOATS = (jnp.bfloat16, jnp.float16, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Part:
    """A tensor that fills rows of a parameter.

    Attributes:
        source: The tensor on disk.
        path: Path of the parameter.
        start: First row, in the parameter with all axes but the last merged.
    """

    source: Source
    path: str
    start: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to read.

    Attributes:
        parts: Every tensor that is read into a parameter, in the order of the data on
            disk. They fill every parameter exactly once.
        copies: Pairs of a tensor that is not read, and the one that it must equal.
    """

    parts: tuple[Part, ...]
    copies: tuple[tuple[Source, Source], ...]

    @property
    def num_bytes(self) -> int:
        return sum(part.source.info.nbytes for part in self.parts)


def make_plan(
    folder: CheckpointFolder, leaves: Mapping[str, Any], table: NameTable
) -> Plan:
    """Matches the tensors of a checkpoint with the parameters of a model, strictly.

    Args:
        folder: The checkpoint.
        leaves: The parameters by path; only their `shape` counts.
        table: How the parameters are stored.

    Returns:
        The plan.

    Raises:
        CheckpointError: If a tensor is missing, unknown, given in two ways, of the
            wrong shape, or not of an unquantized dtype. All such problems are listed.
    """
    slots: dict[str, tuple[str, Slot]] = {}
    problems: list[str] = []
    for path, leaf in leaves.items():
        ways = table.alternatives(path, leaf.shape)
        present = [
            way for way in ways if any(slot.name in folder.sources for slot in way)
        ]
        if len(present) > 1:
            first, second = (_first_present(way, folder) for way in present[:2])
            problems.append(f"{second}: given twice, {first} is a part of it too")
        for way in present or ways[:1]:
            slots |= {slot.name: (path, slot) for slot in way}
    for name, (path, _) in slots.items():
        if name not in folder.sources:
            problems.append(f"{folder.path}: {name}: missing, {path} needs it")
    copies = dict(_copies(folder, slots, table))
    for name, source in folder.sources.items():
        problems += _problems(source, slots.get(name), copies.get(name))
    if problems:
        raise CheckpointError(problems)
    return Plan(
        tuple(
            Part(source, slots[name][0], slots[name][1].start)
            for name, source in folder.sources.items()
            if name in slots
        ),
        tuple((folder.sources[name], copy) for name, copy in copies.items()),
    )


def check_copies(plan: Plan) -> None:
    """Checks that tensors which are not read hold what the model has in their place.

    Raises:
        CheckpointError: If one differs from its original in any bit.
    """
    for copy, original in plan.copies:
        for start, rows in copy.file.iter_rows(copy.info.name, CHUNK_BYTES):
            stop = start + len(rows)
            other = original.file.read_rows(original.info.name, start, stop)
            if not np.array_equal(rows.view(np.uint8), other.view(np.uint8)):
                raise CheckpointError(
                    f"{copy}: differs from {original.info.name} in rows {start} to "
                    f"{stop - 1}, but config.json ties the two"
                )


def _first_present(way: list[Slot], folder: CheckpointFolder) -> Source:
    return next(folder.sources[s.name] for s in way if s.name in folder.sources)


def _copies(
    folder: CheckpointFolder, slots: Mapping[str, Any], table: NameTable
) -> Iterator[tuple[str, Source]]:
    for name, original in table.tied:
        if name not in slots and {name, original} <= folder.sources.keys():
            yield name, folder.sources[original]


def _problems(
    source: Source, target: tuple[str, Slot] | None, original: Source | None
) -> Iterator[str]:
    """Yields what is wrong with one tensor of the checkpoint."""
    info = source.info
    if target is None and original is None:
        yield f"{source}: unknown, the model has no place for it"
        return
    if info.dtype not in _FLOATS:
        yield (
            f"{source}: dtype must be bfloat16, float16 or float32, got {info.dtype}; "
            "this reads unquantized weights and converts them itself"
        )
    if original is not None:
        wanted, dtype = original.info.shape, original.info.dtype
        if info.dtype != dtype:
            yield f"{source}: dtype must be that of {original.info.name}, {dtype}"
    else:
        assert target is not None
        wanted = target[1].shape
    if info.shape != wanted:
        yield (
            f"{source}: shape must be {list(wanted)} by config.json, got "
            f"{list(info.shape)}"
        )

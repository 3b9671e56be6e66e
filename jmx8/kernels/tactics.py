"""Which tactics were measured to be the fastest: a table in the per-user cache.

A tactic is what a kernel can be told to run with. It has one part for each of the
kernel's matmuls, or for whatever else is chosen by itself; a part is a number, a text,
a boolean, None, or a tuple of these.
"""

import functools
import json
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

from ._cache import cache_folder, update_whole


_log = logging.getLogger("jmx8")

Tactic = tuple[Any, ...]

_num_stores = 0


def path() -> pathlib.Path:
    """Returns where the table is, which need not exist yet."""
    return cache_folder("tactics.json")


def version() -> tuple[pathlib.Path, int]:
    """Returns what changes whenever `lookup` may answer otherwise than before."""
    return path(), _num_stores


def lookup(key: str) -> Tactic | None:
    """Returns the tactic stored for `key`, None if there is none.

    The table is read once in the life of a process, and again after `store`.
    """
    return _read(path()).get(key)


def store(tactics: Mapping[str, Tactic]) -> pathlib.Path:
    """Adds tactics to the table, in place of those that have the same keys.

    Returns:
        Where the table is.

    Raises:
        OSError: If it cannot be written there, with what to do.
    """
    table = path()

    def change(old: bytes | None) -> bytes:
        known = {} if old is None else _parse(old, table)
        text = json.dumps({**known, **tactics}, indent=1, sort_keys=True)
        return f"{text}\n".encode()

    global _num_stores
    update_whole(table, change)
    _read.cache_clear()
    _num_stores += 1
    return table


@functools.cache
def _read(table: pathlib.Path) -> dict[str, Tactic]:
    try:
        return _parse(table.read_bytes(), table)
    except FileNotFoundError:
        return {}
    except OSError as error:
        _log.warning("the table of tactics %s is ignored: %s", table, error)
        return {}


def _parse(data: bytes, table: pathlib.Path) -> dict[str, Tactic]:
    """Returns the entries that are well formed, and warns of all else."""
    try:
        entries = json.loads(data)
    except (ValueError, RecursionError) as error:
        _log.warning("the table of tactics %s is ignored: %s", table, error)
        return {}
    if not isinstance(entries, dict):
        _log.warning("the table of tactics %s is ignored: it is no JSON object", table)
        return {}
    known = {k: _to_tuple(v) for k, v in entries.items() if _is_tactic(v)}
    if len(known) < len(entries):
        ignored = len(entries) - len(known)
        _log.warning("%d entries of %s are ignored: no tactics", ignored, table)
    return known


def _is_tactic(value: Any) -> bool:
    is_part = lambda v: v is None or isinstance(v, int | float | str)
    return isinstance(value, list) and all(is_part(v) or _is_tactic(v) for v in value)


def _to_tuple(value: Any) -> Any:
    return tuple(map(_to_tuple, value)) if isinstance(value, list) else value

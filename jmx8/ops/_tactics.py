"""Which tactic a backend runs with: the one that was measured, or else its default."""

import dataclasses
import logging
import operator
from typing import Any

import jax

from .._device import default_device
from .._mx_array import MXArray
from ..kernels import tactics
from ..kernels._prepared import is_prepared
from ._backend import Call


_log = logging.getLogger("jmx8")


def is_weight(operand: Any) -> bool:
    return isinstance(operand, MXArray) or is_prepared(operand)


def bucket(call: Call) -> Call:
    """Returns the call that stands for all that run with the same tactic.

    It has the number of tokens rounded up to a power of two.
    """

    def round_up(a):
        *groups, rows, size = a.shape
        rows = 1 << (rows - 1).bit_length() if rows else 0
        return jax.ShapeDtypeStruct((*groups, rows, size), a.dtype)

    operands = [
        round_up(operand) if i in call.op.token_operands else operand
        for i, operand in enumerate(call.operands)
    ]
    return dataclasses.replace(call, operands=tuple(operands))


def tactic_key(call: Call) -> str:
    """Returns what the tactic of a call is stored under."""
    call, backend = bucket(call), call.backend
    options = (f"{name}={value}" for name, value in call.options.items())
    parts = (default_device().device_kind, backend.version, backend.name, str(call))
    return "; ".join((*parts, *options))


def tuned_tactic(call: Call) -> tactics.Tactic | None:
    """Returns the tactic that `jmx8.autotune` stored for a call, None if none is."""
    if call.backend.tactics is None:
        return None
    key = tactic_key(call)
    tactic = tactics.lookup(key)
    if tactic is None:
        return None
    parts = call.backend.tactics(*bucket(call).operands, **call.options)
    if len(tactic) == len(parts) and all(map(operator.contains, parts, tactic)):
        return tactic
    _log.warning(
        "%s is ignored: %s has no such tactic; %s", tactic, call.backend.name, key
    )
    return None

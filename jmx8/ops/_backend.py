"""What an op consists of."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from .._mx_array import MXArray
from ..kernels._prepared import is_prepared


@dataclasses.dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    Attributes:
        name: What a caller passes as `implementation`.
        unsupported: Returns why the operands cannot run here, or None if they can.
        run: Computes the op. Takes the same operands and options as `unsupported`.
        reason: What speaks for it, as `explain` shows it.
        prepare: Returns the operands with the weights in the backend's own layout,
            without which it does not run; None if it takes canonical ones.
        tactics: Returns, for each part of a tactic, the values that it can have, the
            default first; takes the same operands and options as `run`, which then
            also takes a keyword `tactic`. None if there is nothing to choose.
        version: Of the library that the tactics belong to.
    """

    name: str
    unsupported: Callable[..., str | None]
    run: Callable[..., Any]
    reason: str
    prepare: Callable[..., tuple[Any, ...]] | None = None
    tactics: Callable[..., tuple[Sequence[Any], ...]] | None = None
    version: str = ""


@dataclasses.dataclass(frozen=True)
class Op:
    """An operation with several backends.

    Attributes:
        name: The public function's name.
        backends: In order of preference; the last one supports everything.
        fold: The batching rule: `(axis_size, in_batched, *operands)` to folded
            operands and a function that unfolds the result.
        reference: Differentiated in place of the backend's kernel.
        token_operands: Positions of the operands whose last axis but one are tokens.
    """

    name: str
    backends: tuple[Backend, ...]
    fold: Callable[..., tuple[tuple[Any, ...], Callable[[Any], Any]]]
    reference: Callable[..., Any]
    token_operands: tuple[int, ...] = (0,)


@dataclasses.dataclass(frozen=True)
class Call:
    """What a backend runs, the operands as shapes and dtypes."""

    op: Op
    backend: Backend
    options: Mapping[str, Any]
    operands: tuple[Any, ...]

    def __str__(self) -> str:
        return describe_call(self.op, self.operands)


def describe_call(op: Op, operands: tuple[Any, ...]) -> str:
    """Returns the op with its operands' types, as error messages show it."""
    return f"{op.name}({', '.join(map(_describe, operands))})"


def _describe(operand: Any) -> str:
    if operand is None:
        return "None"
    if isinstance(operand, MXArray):
        return f"MXArray({operand.dtype.name}[{','.join(map(str, operand.shape))}])"
    if is_prepared(operand):
        return repr(operand)
    return str(jax.typeof(operand))

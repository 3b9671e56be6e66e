"""How an op picks its backend, batches, differentiates, and explains itself.

Every op goes through `call`, in this order: a `custom_vjp` outermost, so that the
gradient never depends on the backend; a `custom_vmap` inside it, so that a batch axis
is folded into the operands; the choice of the backend last, so that it sees the shapes
that the kernel will see.
"""

import collections
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from .._device import default_device
from .._mx_array import MXArray
from ..kernels import tactics
from ..kernels._prepared import to_canonical
from ._backend import Backend as Backend, Call as Call, describe_call, Op as Op
from ._tactics import tuned_tactic


def xla_backend(run: Callable[..., Any]) -> Backend:
    """Returns the pure-XLA backend: the last in every list, since it never refuses."""
    run = _on_canonical(run)
    return Backend("xla", lambda *operands, **options: None, run, "runs everywhere")


def _on_canonical(run: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *operands, **options: run(*to_canonical(operands), **options)


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which backend an op runs for some operands, and why.

    Attributes:
        op: Name of the op, with the operands' types.
        implementation: The backend that runs.
        reason: Why it runs.
        passed_over: Pairs of a preferred backend and why it cannot run.
    """

    op: str
    implementation: str
    reason: str
    passed_over: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        lines = [f"{self.op} -> {self.implementation}: {self.reason}"]
        lines += [f"  not {name}: {reason}" for name, reason in self.passed_over]
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `explain` found: the device, and each distinct choice with its count."""

    device: str
    choices: dict[Choice, int]

    def __str__(self) -> str:
        rows = [f"{count} x {choice}" for choice, count in self.choices.items()]
        rows = rows or ["no jmx8 op is called"]
        return "\n".join([f"device: {self.device}", *rows])


class Record:
    """What one call of an op chose. A new one for each call, and compared by identity,
    so that JAX never takes a call that is recorded from its caches of traces."""

    choice: Choice
    call: Call | None = None  # As long as nothing has run.


_records: contextvars.ContextVar[list[Record] | None] = contextvars.ContextVar(
    "jmx8_records", default=None
)


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Tells which backends `function(*args, **kwargs)` runs, and why; runs nothing.

    Args:
        function: An op of jmx8, a model, or any function that calls them. Give the
            function itself and not `jax.jit(function)`, which is not traced again if it
            already ran; the same holds for jitted functions that it calls.
        *args: Its arguments; `jax.ShapeDtypeStruct`s do in place of arrays.
        **kwargs: Its keyword arguments, which stay as they are.

    Returns:
        An `Explanation`; `print` it.
    """
    records = trace(function, *args, **kwargs)
    choices = collections.Counter(record.choice for record in records)
    device = default_device()
    return Explanation(f"{device.platform} ({device.device_kind})", dict(choices))


def trace(function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Record]:
    """Returns a record of each call of an op in `function`; see `explain`."""
    records: list[Record] = []
    token = _records.set(records)
    try:
        eqx.filter_eval_shape(function, *args, **kwargs)
    finally:
        _records.reset(token)
    return [record for record in records if record.call is not None]


def select(
    op: Op, implementation: str | None, options: Mapping[str, Any], *operands: Any
) -> tuple[Backend, Choice]:
    """Returns the backend that runs `operands`.

    Raises:
        ValueError: If `implementation` is unknown.
        NotImplementedError: If the named implementation cannot run these operands on
            this device.
    """
    label = describe_call(op, operands)
    passed_over = []
    for backend in _candidates(op, implementation):
        problem = backend.unsupported(*operands, **options)
        if problem is None:
            reason = backend.reason if implementation is None else "asked for by name"
            return backend, Choice(label, backend.name, reason, tuple(passed_over))
        passed_over.append((backend.name, problem))
    raise _cannot_run(label, implementation, passed_over[0][1])


def _candidates(op: Op, implementation: str | None) -> tuple[Backend, ...]:
    if implementation is None:
        return op.backends
    found = tuple(b for b in op.backends if b.name == implementation)
    if not found:
        raise ValueError(
            f"{op.name}: unknown implementation {implementation!r}; expected one of "
            f"{[backend.name for backend in op.backends]}, or None to choose."
        )
    return found


def _cannot_run(label: str, implementation: str | None, problem: str) -> Exception:
    return NotImplementedError(
        f"{label}: implementation {implementation!r} cannot run: {problem}. "
        "Pass implementation=None to choose one that can."
    )


def prepare(
    op: Op, implementation: str | None, options: Mapping[str, Any], *operands: Any
) -> tuple[Any, ...]:
    """Returns the operands with their weights as the backend that will run wants them.

    Args:
        op: The op.
        implementation: Name of the backend to lay them out for; None for the first
            that can run.
        options: Static arguments of the op.
        *operands: As for `call`; all but the weights may be abstract.

    Raises:
        ValueError: If `implementation` is unknown.
        NotImplementedError: If the named implementation cannot run these operands on
            this device, however laid out.
    """
    problem = None
    for backend in _candidates(op, implementation):
        problem = backend.unsupported(*operands, **options)
        if backend.prepare is None:
            if problem is None:
                return to_canonical(operands)
            continue
        if problem is None:
            return operands  # laid out already
        lay_out = functools.partial(_lay_out, backend.prepare)
        problem = backend.unsupported(*jax.eval_shape(lay_out, operands), **options)
        if problem is None:
            return eqx.filter_jit(_lay_out)(backend.prepare, operands)
    assert problem is not None  # The last backend supports everything.
    raise _cannot_run(describe_call(op, operands), implementation, problem)


def _lay_out(prepare: Callable[..., Any], operands: tuple[Any, ...]) -> Any:
    return prepare(*to_canonical(operands))


def call(
    op: Op, implementation: str | None, options: Mapping[str, Hashable], *operands: Any
) -> Any:
    """Runs `op` on operands that its public function has validated.

    Args:
        op: The op.
        implementation: Name of a backend, or None.
        options: Static keyword arguments of the backends and of the reference.
        *operands: Arrays, `MXArray`s and None.

    Returns:
        The result; differentiable in the operands that are float arrays.
    """
    record = None
    if (records := _records.get()) is not None:
        record = Record()
        records.append(record)
    trace = _Trace(record, tactics.version())
    return _call(op, implementation, tuple(options.items()), trace, operands)


class _Trace(NamedTuple):
    """What a trace depends on besides its arguments, for JAX keeps traces."""

    record: Record | None
    tactics: Hashable


def _abstract(operands: tuple[Any, ...]) -> tuple[Any, ...]:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _call(op, implementation, options, trace, operands):
    make = _vmappable if trace.record is None else _make_vmappable
    return make(op, implementation, options, trace)(*operands)


def _call_fwd(op, implementation, options, trace, operands):
    return _call(op, implementation, options, trace, operands), operands


def _call_bwd(op, implementation, options, trace, operands, cotangent):
    del implementation, trace
    is_float = [_is_differentiable(operand) for operand in operands]

    def reference(*floats):
        remaining = iter(floats)
        merged = [
            next(remaining) if flag else operand
            for flag, operand in zip(is_float, operands, strict=True)
        ]
        return _on_canonical(op.reference)(*merged, **dict(options))

    floats = [x for flag, x in zip(is_float, operands, strict=True) if flag]
    gradients = iter(jax.vjp(reference, *floats)[1](cotangent))
    return (
        tuple(
            next(gradients) if flag else _no_gradient(operand)
            for flag, operand in zip(is_float, operands, strict=True)
        ),
    )


_call.defvjp(_call_fwd, _call_bwd)


def _no_gradient(operand: Any) -> Any:
    """Returns the cotangent of an operand that has none.

    JAX's own zeros would do for all but E8M0, where they are NaN and would spoil a
    gradient norm; its smallest value is as good as zero.
    """
    if not isinstance(operand, MXArray):
        return None
    smallest = lambda a: jax.lax.bitcast_convert_type(
        jnp.zeros(a.shape, jnp.uint8), a.dtype
    )
    return jax.tree.map(smallest, operand)


def _is_differentiable(operand: Any) -> bool:
    return isinstance(operand, jax.Array) and jnp.issubdtype(operand.dtype, jnp.inexact)


def _make_vmappable(op: Op, implementation: str | None, options: tuple, trace: _Trace):
    record = trace.record

    @jax.custom_batching.custom_vmap
    def run(*operands):
        backend, choice = select(op, implementation, dict(options), *operands)
        call = Call(op, backend, dict(options), _abstract(operands))
        tactic = tuned_tactic(call)
        tuned = {} if tactic is None else {"tactic": tactic}
        if record is not None:
            # Under vmap this is traced once for one element and once more folded; the
            # last trace is what runs.
            reason = f"{choice.reason}; tuned: {tactic=}" if tuned else choice.reason
            record.choice = dataclasses.replace(choice, reason=reason)
            record.call = call
        with jax.named_scope(f"{op.name}[{backend.name}]"):
            return backend.run(*operands, **dict(options), **tuned)

    @run.def_vmap
    def rule(axis_size, in_batched, *operands):
        batched = [any(jax.tree.leaves(b)) for b in in_batched]
        # A stack of prepared weights is in no kernel's layout.
        operands = [
            jax.vmap(to_canonical)(operand) if is_batched else operand
            for operand, is_batched in zip(operands, batched, strict=True)
        ]
        folded, unfold = op.fold(axis_size, batched, *operands)
        out = unfold(run(*folded))
        return out, jax.tree.map(lambda _: True, out)

    return run


_vmappable = functools.cache(_make_vmappable)

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
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from .._device import default_device
from .._mx_array import MXArray
from ..kernels._prepared import is_prepared, to_canonical


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
    """

    name: str
    unsupported: Callable[..., str | None]
    run: Callable[..., Any]
    reason: str
    prepare: Callable[..., tuple[Any, ...]] | None = None


def xla_backend(run: Callable[..., Any]) -> Backend:
    """Returns the pure-XLA backend: the last in every list, since it never refuses."""
    run = _on_canonical(run)
    return Backend("xla", lambda *operands, **options: None, run, "runs everywhere")


def _on_canonical(run: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *operands, **options: run(*to_canonical(operands), **options)


@dataclasses.dataclass(frozen=True)
class Op:
    """An operation with several backends.

    Attributes:
        name: The public function's name.
        backends: In order of preference; the last one supports everything.
        fold: The batching rule: `(axis_size, in_batched, *operands)` to folded
            operands and a function that unfolds the result.
        reference: Differentiated in place of the backend's kernel.
    """

    name: str
    backends: tuple[Backend, ...]
    fold: Callable[..., tuple[tuple[Any, ...], Callable[[Any], Any]]]
    reference: Callable[..., Any]


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


class _Record:
    """What one call of an op chose. A new one for each call, and compared by identity,
    so that JAX never takes a call that is recorded from its caches of traces."""

    choice: Choice | None = None


_records: contextvars.ContextVar[list[_Record] | None] = contextvars.ContextVar(
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
    records: list[_Record] = []
    token = _records.set(records)
    try:
        eqx.filter_eval_shape(function, *args, **kwargs)
    finally:
        _records.reset(token)
    choices = collections.Counter(r.choice for r in records if r.choice is not None)
    device = default_device()
    return Explanation(f"{device.platform} ({device.device_kind})", dict(choices))


def select(
    op: Op, implementation: str | None, options: Mapping[str, Any], *operands: Any
) -> tuple[Backend, Choice]:
    """Returns the backend that runs `operands`.

    Raises:
        ValueError: If `implementation` is unknown.
        NotImplementedError: If the named implementation cannot run these operands on
            this device.
    """
    label = _label(op, operands)
    names = [backend.name for backend in op.backends]
    if implementation is not None and implementation not in names:
        raise ValueError(
            f"{op.name}: unknown implementation {implementation!r}; expected one of "
            f"{names}, or None to choose."
        )
    passed_over = []
    for backend in op.backends:
        if implementation not in (None, backend.name):
            continue
        problem = backend.unsupported(*operands, **options)
        if problem is None:
            reason = backend.reason if implementation is None else "asked for by name"
            return backend, Choice(label, backend.name, reason, tuple(passed_over))
        passed_over.append((backend.name, problem))
    raise NotImplementedError(
        f"{label}: implementation {implementation!r} cannot run: {passed_over[0][1]}. "
        "Pass implementation=None to choose one that can."
    )


def prepare(op: Op, options: Mapping[str, Any], *operands: Any) -> tuple[Any, ...]:
    """Returns the operands with their weights as the backend that will run wants them.

    Args:
        op: The op.
        options: Its static arguments.
        *operands: As for `call`; all but the weights may be abstract.
    """
    for backend in op.backends:
        if backend.prepare is None:
            if backend.unsupported(*operands, **options) is None:
                return operands
            continue
        abstract = jax.eval_shape(backend.prepare, *operands)
        if backend.unsupported(*abstract, **options) is None:
            return eqx.filter_jit(backend.prepare)(*operands)
    raise AssertionError(f"{op.name}: no backend takes canonical weights")


def _describe(operand: Any) -> str:
    if operand is None:
        return "None"
    if isinstance(operand, MXArray):
        return f"MXArray({operand.dtype.name}[{','.join(map(str, operand.shape))}])"
    if is_prepared(operand):
        return repr(operand)
    return str(jax.typeof(operand))


def _label(op: Op, operands: tuple[Any, ...]) -> str:
    return f"{op.name}({', '.join(map(_describe, operands))})"


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
        record = _Record()
        records.append(record)
    return _call(op, implementation, tuple(options.items()), record, operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _call(op, implementation, options, record, operands):
    make = _vmappable if record is None else _make_vmappable
    return make(op, implementation, options, record)(*operands)


def _call_fwd(op, implementation, options, record, operands):
    return _call(op, implementation, options, record, operands), operands


def _call_bwd(op, implementation, options, record, operands, cotangent):
    del implementation, record
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


def _make_vmappable(
    op: Op, implementation: str | None, options: tuple, record: _Record | None
):
    @jax.custom_batching.custom_vmap
    def run(*operands):
        backend, choice = select(op, implementation, dict(options), *operands)
        if record is not None:
            # Under vmap this is traced once for one element and once more folded; the
            # last trace is what runs.
            record.choice = choice
        with jax.named_scope(f"{op.name}[{backend.name}]"):
            return backend.run(*operands, **dict(options))

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

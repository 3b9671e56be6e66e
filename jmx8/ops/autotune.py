"""Measures what the kernels can be told to run with, for the calls of one function."""

import dataclasses
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._device import default_device
from .._mx_array import MXArray, quantize
from ..kernels import tactics
from ..kernels._prepared import is_prepared
from ..kernels.tactics import Tactic
from . import _dispatch, _tactics


# One program makes so many calls, each after the one before, and runs so many times.
_CALLS = 10
_ROUNDS = 7

# Another order of summation changes the last bits of a sum, and now and then the code
# of an intermediate value that is quantized again: less than this, of a value and of
# the mean square together.
_TOLERANCE = 2**-5


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What was measured for one call.

    Attributes:
        call: The op with its operands' types, tokens rounded up to a power of two.
        implementation: The backend.
        tactic: The fastest tactic, now in the table; None if not even the default ran.
        default: The default tactic.
        seconds: Median time of a call, for each tactic that was measured.
        left_out: Why the others were not.
    """

    call: str
    implementation: str
    tactic: Tactic | None
    default: Tactic
    seconds: dict[Tactic, float]
    left_out: dict[Tactic, str]

    def __str__(self) -> str:
        head = f"{self.call} -> {self.implementation}"
        lines = [f"  left out {t}: {why}" for t, why in self.left_out.items()]
        if self.tactic is None:
            return "\n".join([f"{head}: nothing stored", *lines])
        micros = lambda tactic: f"{tactic} {self.seconds[tactic] * 1e6:.1f} µs"
        return "\n".join(
            [
                f"{head}: tactic {micros(self.tactic)}, the default "
                f"{micros(self.default)}, {len(self.seconds)} measured",
                *lines,
            ]
        )


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What `autotune` did.

    Attributes:
        device: Where it was measured.
        table: The file that the tactics are stored in; None if nothing was.
        tuned: The calls that have a choice.
        others: The calls that have none, each with its backend and the reason.
    """

    device: str
    table: pathlib.Path | None
    tuned: tuple[Tuned, ...]
    others: tuple[tuple[str, str, str], ...]

    def __str__(self) -> str:
        lines = [f"device: {self.device}"]
        if self.tuned:
            lines.append(
                f"measured: {_CALLS} calls in a row on the same random operands, in "
                f"one program; the median of {_ROUNDS} runs, for one call"
            )
        lines += map(str, self.tuned)
        lines += [f"{call} -> {name}: {reason}" for call, name, reason in self.others]
        if self.table is None:
            lines.append("nothing was stored")
        else:
            lines.append(f"stored in {self.table}, for functions traced from now on")
        return "\n".join(lines)


def autotune(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Tuning:
    """Finds the fastest tactic for each call of an op in `function(*args, **kwargs)`.

    The function is traced and not run. Each of its calls whose backend has several
    tactics is run by itself, on random operands on the default device, once with each
    tactic: tokens rounded up to a power of two, weights laid out as the backend wants
    them. The fastest that agrees with the default one is stored in a table in the
    per-user cache, `JMX8_CACHE_DIR`, by op, backend, device, library version and
    shapes. Every process that traces such a call from then on, with any number of
    tokens that rounds up to the same, runs it with that tactic; nothing is measured
    then. A function that was compiled before keeps what it has.

    Args:
        function: As for `explain`: the function itself and not `jax.jit(function)`.
        *args: Its arguments; `jax.ShapeDtypeStruct`s do in place of arrays.
        **kwargs: Its keyword arguments.

    Returns:
        A `Tuning`; `print` it.

    Raises:
        OSError: If the table cannot be written, with what to do.
    """
    records = _dispatch.trace(function, *args, **kwargs)
    calls = [_tactics.bucket(r.call) for r in records if r.call is not None]
    table, tuned, others = None, {}, {}
    for call in calls:
        key = _tactics.tactic_key(call)
        if key in tuned or key in others:
            continue
        if reason := _nothing_to_tune(call):
            others[key] = (str(call), call.backend.name, reason)
            continue
        tuned[key] = _tune(call)
        if (tactic := tuned[key].tactic) is not None:
            table = tactics.store({key: tactic})
    device = default_device()
    return Tuning(
        f"{device.platform} ({device.device_kind})",
        table,
        tuple(tuned.values()),
        tuple(others.values()),
    )


def _nothing_to_tune(call: _dispatch.Call) -> str | None:
    if call.backend.tactics is None:
        return "has no tactics"
    if any(0 in a.shape for a in jax.tree.leaves(call.operands)):
        return "has nothing to compute"
    return None


def _tune(call: _dispatch.Call) -> Tuned:
    """Chooses the parts of a tactic one after the other, the later ones by default."""
    assert call.backend.tactics is not None
    operands = _random_operands(call)
    parts = call.backend.tactics(*call.operands, **call.options)
    best = default = tuple(candidates[0] for candidates in parts)
    seconds: dict[Tactic, float] = {}
    left_out: dict[Tactic, str] = {}
    expected = _run(_program(call, default), operands)
    if isinstance(expected, str) or not jnp.all(jnp.isfinite(expected)):
        problem = expected if isinstance(expected, str) else "result is not finite"
        left_out[default] = problem
        return Tuned(str(call), call.backend.name, None, default, seconds, left_out)
    for i, candidates in enumerate(parts):
        programs = {}
        for part in candidates:
            tactic = (*best[:i], part, *best[i + 1 :])
            program = _program(call, tactic)
            out = _run(program, operands)
            problem = out if isinstance(out, str) else _difference(out, expected)
            if problem is None or tactic == best:
                programs[tactic] = program
            else:
                left_out[tactic] = problem
        seconds |= _measure(programs, operands)
        best = min(programs, key=lambda tactic: seconds[tactic])
    return Tuned(str(call), call.backend.name, best, default, seconds, left_out)


def _random_operands(call: _dispatch.Call) -> tuple[Any, ...]:
    """Returns operands of the call's types: integers are ids of different experts."""
    num_experts = next(a.shape[0] for a in call.operands if _tactics.is_weight(a))

    def make(key):
        keys = jax.random.split(key, len(call.operands))
        canonical = tuple(
            None if a is None else _random(key, a, num_experts)
            for key, a in zip(keys, call.operands, strict=True)
        )
        if not any(map(is_prepared, call.operands)):
            return canonical
        assert call.backend.prepare is not None
        return call.backend.prepare(*canonical)

    operands = jax.jit(make)(jax.random.key(0))
    assert jax.tree.structure(operands) == jax.tree.structure(call.operands)
    return operands


def _random(key: Array, like: Any, num_experts: int) -> Any:
    if isinstance(like, MXArray) or (is_prepared(like) and like.is_mx):
        # Of such a size that sums over k are about as large as the activations.
        w = jax.random.normal(key, like.shape, like.dtype) * like.shape[-1] ** -0.5
        return quantize(w)
    if jnp.issubdtype(like.dtype, jnp.integer):
        rows, top_k = like.shape
        order = jax.random.uniform(key, (rows, max(num_experts, top_k)))
        return jax.lax.top_k(order, top_k)[1].astype(like.dtype)
    return jax.random.normal(key, like.shape, like.dtype)


def _program(call: _dispatch.Call, tactic: Tactic) -> Callable[..., Array]:
    """Returns a program of some calls in a row, with the result of one."""

    def run(first, *others):
        out = None
        for _ in range(_CALLS):
            first = first if out is None else _after(out, first)
            out = call.backend.run(first, *others, **call.options, tactic=tactic)
        return out

    return jax.jit(run)


def _after(out: Array, x: Array) -> Array:
    """Returns `x`, such that what takes it waits for `out`, and is no repetition.

    An optimization barrier is not enough: XLA merges calls on its two sides.
    """
    x_first, out_first = (0,) * x.ndim, (0,) * out.ndim
    value = out[out_first].astype(x.dtype)
    value = jnp.where(jnp.isnan(value), value, x[x_first])
    return x.at[x_first].set(value)


def _run(program: Callable[..., Array], operands: tuple[Any, ...]) -> Array | str:
    """Returns the result, or what the kernel raised."""
    try:
        return jax.block_until_ready(program(*operands))
    except RuntimeError as error:  # of kernels, and of the libraries that launch them
        message = str(error).strip() or "no message"
        return f"{type(error).__name__}: {message.splitlines()[-1]}"


@jax.jit
def _is_close(out: Array, expected: Array) -> Array:
    out, expected = (a.astype(jnp.float32) for a in (out, expected))
    size = jnp.abs(expected) + jnp.sqrt(jnp.mean(expected**2))
    return jnp.all(jnp.abs(out - expected) <= _TOLERANCE * size)


def _difference(out: Array, expected: Array) -> str | None:
    if _is_close(out, expected):
        return None
    return "its result is not that of the default"


def _measure(
    programs: dict[Tactic, Callable[..., Array]], operands: tuple[Any, ...]
) -> dict[Tactic, float]:
    """Returns the median time of a call, of programs that have run before.

    They take turns, so that a clock that changes changes it for all.
    """
    times: dict[Tactic, list[float]] = {tactic: [] for tactic in programs}
    for _ in range(_ROUNDS):
        for tactic, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*operands))
            times[tactic].append((time.perf_counter() - start) / _CALLS)
    return {tactic: statistics.median(runs) for tactic, runs in times.items()}

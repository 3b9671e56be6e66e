"""The one place where a computation crosses from XLA into somebody else's kernel.

`Kernel` declares a TVM-FFI function by the names of its arguments. A call binds each
name to an operand, an output, scratch memory or a constant; only buffers cross the
bridge. jax-tvm-ffi 0.1.3 frees strings too early, leaks every attribute, reads past the
end where one is missing, and can express neither None nor a list, so constants are
bound into the function by a small compiled adapter, before it is registered.
"""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import DTypeLike

from . import _adapter


class Output(NamedTuple):
    """A buffer that the kernel writes and the call returns.

    Attributes:
        shape: Its shape.
        dtype: Its dtype.
        alias: Name of the operand whose buffer it shares, for kernels that work in
            place; None for a buffer of its own.
    """

    shape: tuple[int, ...]
    dtype: DTypeLike
    alias: str | None = None


class Workspace(NamedTuple):
    """Scratch memory that is passed to the kernel as uint8 and not returned."""

    num_bytes: int


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An external kernel.

    Attributes:
        name: "library.function"; the profiler and the HLO show "jmx8.<name>".
        load: Returns the `tvm_ffi.Function`. Called once, at the first call.
        arguments: Names of all positional arguments, in the function's order.
        platform: "gpu", where calls can be captured into CUDA graphs; "cpu" for
            functions on host memory.
    """

    name: str
    load: Callable[[], Any]
    arguments: tuple[str, ...]
    platform: Literal["gpu", "cpu"] = "gpu"

    def __call__(self, *, arena: int = 0, **bindings: Any) -> tuple[jax.Array, ...]:
        """Calls the kernel.

        Operands are trusted: whoever calls has validated their shapes and dtypes. A
        call is not differentiable and has no batching rule, both of which `ops` gives;
        on a mesh it runs on whole operands only, so inside `jax.shard_map`.

        Args:
            arena: Bytes of scratch behind the kernel's own allocations.
            **bindings: For each of `arguments` an array, an `Output`, a `Workspace`,
                None, a bool, int, float or str, a tuple of ints, or a tuple of arrays.

        Returns:
            The outputs, in the order of `arguments`.

        Raises:
            TypeError: If the names are not exactly `arguments`, or a value is of
                another type.
            RuntimeError: When it runs, if the kernel raises; with its message.
        """
        if set(bindings) != set(self.arguments):
            missing = [name for name in self.arguments if name not in bindings]
            surplus = [name for name in bindings if name not in self.arguments]
            raise TypeError(
                f"{self.name}: every argument must be bound, and no other; {missing=}, "
                f"{surplus=}."
            )
        call = _resolve(self, bindings, arena)
        target = _register(self, call.plan, bool(arena), call.plan_types)
        ranks = tuple(operand.ndim for operand in call.operands)
        run = _make_run(target, ranks, call.out_types, call.aliases)
        return tuple(run(*call.operands)[: call.num_outputs])


class _Call(NamedTuple):
    operands: list[jax.Array]
    out_types: tuple[jax.ShapeDtypeStruct, ...]
    aliases: tuple[tuple[int, int], ...]
    num_outputs: int
    plan: tuple[tuple[Any, ...], ...]
    plan_types: tuple[str, ...]


def _resolve(kernel: Kernel, bindings: dict[str, Any], arena: int) -> _Call:
    """Numbers the buffers: operands first, then outputs, then scratch memory."""
    bound = [(name, bindings[name]) for name in kernel.arguments]
    operands, place = [], {}
    for name, value in bound:
        is_list = isinstance(value, tuple) and not isinstance(value, Output | Workspace)
        arrays = value if is_list else (value,)
        if arrays and all(isinstance(a, jax.Array) for a in arrays):
            place[name] = range(len(operands), len(operands) + len(arrays))
            operands += arrays
    outputs = [name for name, value in bound if isinstance(value, Output)]
    workspaces = [name for name, value in bound if isinstance(value, Workspace)]
    for i, name in enumerate([*outputs, *workspaces], start=len(operands)):
        place[name] = range(i, i + 1)

    # The bridge takes the arena from the end and does not pass it.
    scratch = [bindings[name].num_bytes for name in workspaces] + [arena] * bool(arena)
    out_types = [
        *((bindings[name].shape, bindings[name].dtype) for name in outputs),
        *(((num_bytes,), jnp.uint8) for num_bytes in scratch),
    ]
    aliases = tuple(
        (place[alias].start, i)
        for i, name in enumerate(outputs)
        if (alias := bindings[name].alias) is not None
    )
    plan = tuple(_entry(kernel, name, value, place) for name, value in bound)
    types = tuple(repr(entry) for entry in plan)  # tells True from 1
    out_types = tuple(jax.ShapeDtypeStruct(*out_type) for out_type in out_types)
    return _Call(operands, out_types, aliases, len(outputs), plan, types)


def _entry(kernel: Kernel, name: str, value: Any, place: dict[str, range]) -> tuple:
    """Returns the argument as `_adapter.cc` reads it."""
    if name in place:
        kind = 2 if type(value) is tuple else 0
        return (kind, *place[name])
    is_ints = type(value) is tuple and all(type(i) is int for i in value)
    if value is None or type(value) in (bool, int, float, str) or is_ints:
        return (1, value)
    raise TypeError(
        f"{kernel.name}: {name} must be an array, Output, Workspace, None, bool, int, "
        f"float, str, or a tuple of ints or of arrays, got {value!r}."
    )


@functools.cache  # so that calls outside `jit` compile once
def _make_run(
    target: str,
    ranks: tuple[int, ...],
    out_types: tuple[jax.ShapeDtypeStruct, ...],
    aliases: tuple[tuple[int, int], ...],
) -> Callable[..., Any]:
    call = jax.ffi.ffi_call(target, out_types, input_output_aliases=dict(aliases))
    return guard(target, call, ranks, out_types)


def guard(
    name: str,
    call: Callable[..., Any],
    ranks: tuple[int, ...],
    out_types: tuple[jax.ShapeDtypeStruct, ...],
) -> Callable[..., Any]:
    """Returns a custom call such that no transformation of JAX can misread it.

    Args:
        name: What error messages call it.
        call: The custom call, of whole operands.
        ranks: Number of axes of each operand.
        out_types: What it returns.
    """

    def partition(mesh, operands, results):
        # XLA would gather the operands on every device and say nothing.
        for operand in operands:
            if not operand.sharding.is_fully_replicated:
                raise ValueError(
                    f"{name}: an operand of shape {operand.shape} is sharded as "
                    f"{operand.sharding}, and a kernel runs on whole operands. Call it "
                    "inside jax.shard_map, or replicate the operands."
                )
        whole = NamedSharding(mesh, PartitionSpec())
        replicated = lambda shapes: jax.tree.map(lambda _: whole, shapes)
        return mesh, call, replicated(results), replicated(operands)

    partitioned = custom_partitioning(lambda *operands: call(*operands))
    partitioned.def_partition(partition, sharding_rule=_unrelated(ranks, out_types))
    run = jax.custom_batching.custom_vmap(partitioned)

    @run.def_vmap
    def rule(axis_size, in_batched, *operands):
        raise NotImplementedError(
            f"{name}: an external kernel has no batching rule. Use the op of jmx8 that "
            "calls it, which folds the batch into its operands."
        )

    # Outside `jit` nothing would be partitioned, and so nothing refused.
    return jax.jit(run, inline=True)


def _unrelated(
    ranks: tuple[int, ...], out_types: tuple[jax.ShapeDtypeStruct, ...]
) -> str:
    """Returns the sharding rule that relates no axis to another."""
    names = itertools.count()
    axes = lambda rank: " ".join(f"a{next(names)}" for _ in range(rank)) or "..."
    out_ranks = (len(out_type.shape) for out_type in out_types)
    return " -> ".join(", ".join(map(axes, side)) for side in (ranks, out_ranks))


@functools.cache
def _register(
    kernel: Kernel, plan: tuple, has_arena: bool, plan_types: tuple[str, ...]
) -> str:
    """Registers the kernel with these constants and returns the target's name."""
    del plan_types  # part of the cache's key
    import jax_tvm_ffi

    digest = hashlib.sha256(repr(plan).encode()).hexdigest()[:8]
    target = f"jmx8.{kernel.name}.{digest}"
    if target in _registered:  # another kernel of the same name
        target = f"{target}.{len(_registered)}"
    jax_tvm_ffi.register_ffi_target(
        target,
        _adapter.bind(kernel.load(), plan),
        ["args", "rets"],
        platform=kernel.platform,
        allow_cuda_graph=kernel.platform == "gpu",
        # Lists of tensors and Python functions need tensors that own themselves.
        pass_owned_tensor=True,
        use_last_output_for_alloc_workspace=has_arena,
    )
    _registered.add(target)
    return target


_registered: set[str] = set()

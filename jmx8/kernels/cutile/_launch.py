"""Launches compiled cuTile kernels from a jitted computation.

`Kernel` declares one of FlashInfer's kernels by its parameters; a call binds them by
name and emits cuda-tile's XLA custom call with the compiled kernel inside. Neither
FlashInfer nor a compiler is needed for that: what a launch needs compiled (`Cubin`)
follows from the declaration, and is looked up among what was compiled before.
"""

import contextlib
import contextvars
import dataclasses
import functools
import hashlib
import struct
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import DTypeLike


class In(NamedTuple):
    """A parameter that is an array the kernel reads.

    Attributes:
        axes: A letter for each axis. "t": depends on the number of tokens or of
            experts, so that nothing is assumed of its size; "m": a width of the model,
            so that its being a multiple of 16 is compiled in.
        wide: Whether the kernel indexes it with 64 bits.
    """

    axes: str
    wide: bool = False


class Out(NamedTuple):
    """A parameter that is an array the kernel writes; attributes as of `In`.

    It is bound to an `Empty`, or to an array that is updated in place.
    """

    axes: str
    wide: bool = False


class Constant(NamedTuple):
    """A parameter whose value is compiled in; `kind` is its type."""

    kind: type


class Scalar(NamedTuple):
    """A parameter that is an int32 given at launch."""


class Unused(NamedTuple):
    """An array parameter that the kernel, with the constants we pass, never touches."""

    wide: bool = False


Parameter = In | Out | Constant | Scalar | Unused


class Empty(NamedTuple):
    """A buffer for the kernel to write, whatever it holds before."""

    shape: tuple[int, ...]
    dtype: DTypeLike


@dataclasses.dataclass(frozen=True)
class Cubin:
    """Everything that a compiled kernel depends on, compiler versions aside.

    Attributes:
        module: FlashInfer module that defines the kernel.
        function: Its name there.
        arch: As compilers call it: "sm_90".
        hints: Names and values of compiler hints.
        parameters: For each parameter ("array", dtype, index bits, divisors of the
            shape, divisors of the strides), ("constant", value) or ("scalar",).
    """

    module: str
    function: str
    arch: str
    hints: tuple[tuple[str, int], ...]
    parameters: tuple[tuple[Any, ...], ...]

    @property
    def name(self) -> str:
        """A file name for it."""
        identity = (self.module, self.hints, self.parameters)
        digest = hashlib.sha256(repr(identity).encode()).hexdigest()
        return f"{self.function.strip('_')}-{digest[:20]}"


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch, as `record` collects them: what a kernel was called with."""

    kernel: "Kernel"
    grid: tuple[int, int]
    cubin: Cubin
    arguments: dict[str, Any]


_recorded: contextvars.ContextVar[list[Launch] | None] = contextvars.ContextVar(
    "jmx8_cutile_launches", default=None
)


@contextlib.contextmanager
def record() -> Iterator[list[Launch]]:
    """Collects the launches of what is traced inside, and emits none of them."""
    launches: list[Launch] = []
    token = _recorded.set(launches)
    try:
        yield launches
    finally:
        _recorded.reset(token)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel of FlashInfer.

    Attributes:
        module: Name of its module in `flashinfer.fused_moe.cutile`.
        function: Its name there.
        parameters: All of its parameters in order.
    """

    module: str
    function: str
    parameters: dict[str, Parameter]

    def __call__(
        self,
        grid: tuple[int, int],
        target: "Target",
        *,
        hints: tuple[tuple[str, int], ...] = (),
        **arguments: Any,
    ) -> Any:
        """Launches the kernel.

        Args:
            grid: Thread blocks along x and y.
            target: What to compile for, and where to find what was compiled.
            hints: Names and values of compiler hints.
            **arguments: For each parameter that is used an array, an `Empty`, or a
                number.

        Returns:
            What the kernel writes, a tuple if that is more than one array, in the order
            of the parameters.
        """
        names = [n for n, p in self.parameters.items() if not isinstance(p, Unused)]
        if sorted(arguments) != sorted(names):
            raise TypeError(
                f"{self.function}: expected the arguments {names}, got "
                f"{list(arguments)}."
            )
        parameters = tuple(
            _describe(parameter, arguments.get(name))
            for name, parameter in self.parameters.items()
        )
        cubin = Cubin(self.module, self.function, target.arch, hints, parameters)
        launches = _recorded.get()
        if launches is None:
            results = _emit(self, grid, cubin, target.load(cubin), arguments)
        else:
            launches.append(Launch(self, grid, cubin, arguments))
            results = [jnp.zeros(t.shape, t.dtype) for t in _written(self, arguments)]
        return results[0] if len(results) == 1 else tuple(results)


@dataclasses.dataclass(frozen=True)
class Target:
    """What launches are compiled for.

    Attributes:
        arch: "sm_90", for example.
        load: Returns the bytes of a compiled kernel.
    """

    arch: str
    load: Callable[[Cubin], bytes]


def _describe(parameter: Parameter, argument: Any) -> tuple[Any, ...]:
    """Returns what the compiler is told about an argument."""
    if isinstance(parameter, Unused):
        # Stands for the array that `_emit` passes.
        return ("array", "int32", 64 if parameter.wide else 32, (1,), (1,))
    if isinstance(parameter, Scalar):
        return ("scalar",)
    if isinstance(parameter, Constant):
        if type(argument) is not parameter.kind:
            raise TypeError(f"expected a {parameter.kind.__name__}, got {argument!r}.")
        return ("constant", argument)
    shape, itemsize = argument.shape, jnp.dtype(argument.dtype).itemsize
    if len(shape) != len(parameter.axes):
        raise TypeError(f"expected axes {parameter.axes!r}, got {shape=}.")
    divisors = [
        16 if axis == "m" and size % 16 == 0 else 1
        for axis, size in zip(parameter.axes, shape, strict=True)
    ]
    # Rows are contiguous. In units of 16 bytes, as the tensor copy engine wants them.
    unit = max(1, 16 // itemsize)
    strides = [int(np.prod(shape[i + 1 :])) for i in range(len(shape))]
    stride_divisors = [unit if s % unit == 0 else 1 for s in strides[:-1]] + [1]
    return (
        "array",
        _kernel_dtype(argument.dtype),
        64 if parameter.wide else 32,
        tuple(divisors),
        tuple(stride_divisors),
    )


def _kernel_dtype(dtype: DTypeLike) -> str:
    # cuTile has E8M0 on Blackwell only; FlashInfer's kernels read the bytes elsewhere.
    name = jnp.dtype(dtype).name
    return "uint8" if name == "float8_e8m0fnu" else name


def _written(kernel: Kernel, arguments: dict[str, Any]) -> list[jax.ShapeDtypeStruct]:
    return [
        jax.ShapeDtypeStruct(arguments[name].shape, arguments[name].dtype)
        for name, parameter in kernel.parameters.items()
        if isinstance(parameter, Out)
    ]


def _emit(
    kernel: Kernel,
    grid: tuple[int, int],
    cubin: Cubin,
    code: bytes,
    arguments: dict[str, Any],
) -> list[jax.Array]:
    """Emits the custom call, in the form of cuda-tile 1.5 to 1.7."""
    _register()
    bound = [(p, arguments.get(name)) for name, p in kernel.parameters.items()]
    operands = [a for _, a in bound if isinstance(a, jax.Array)]
    numbers = [int(arguments[n]) for n, p in kernel.parameters.items() if p == Scalar()]
    out_types = _written(kernel, arguments)
    buffers, aliases = _number_buffers(bound, operands, len(out_types))
    widths = [
        64 if getattr(parameter, "wide", False) else 32
        for parameter in kernel.parameters.values()
        if not isinstance(parameter, Constant)
    ]
    attributes = {
        "buffer_ids": np.asarray(buffers, np.int32),
        "index_bitwidths": np.asarray(widths, np.int32),
        "scalar_packed": np.asarray([_pack(n) for n in numbers], np.uint64),
        "cubin_code": code,
        "cubin_id": np.frombuffer(hashlib.sha256(code).digest(), np.uint8),
        "function_name": cubin.function,
        "num_inputs": np.int32(len(operands)),
        "num_outputs": np.int32(len(out_types)),
        "grid_x": np.int32(grid[0]),
        "grid_y": np.int32(grid[1]),
        "grid_z": np.int32(1),
    }
    call = jax.ffi.ffi_call(
        "cutile_launch", tuple(out_types), input_output_aliases=aliases
    )
    with jax.named_scope(f"jmx8.cutile.{kernel.function.strip('_')}"):
        return list(call(*operands, **attributes))


def _number_buffers(
    bound: list[tuple[Parameter, Any]], operands: list[jax.Array], num_results: int
) -> tuple[list[int], dict[int, int]]:
    """Returns the buffer of each parameter that has one, and which results alias.

    Operands come first, then results, then scalars.
    """
    operand, result = 0, len(operands)
    scalar = result + num_results
    spare = next((i for i, a in enumerate(operands) if a.ndim == 1), None)
    buffers, aliases = [], {}
    for parameter, argument in bound:
        if isinstance(parameter, Constant):
            continue
        if isinstance(parameter, Unused):
            buffers.append(spare)
        elif isinstance(parameter, Scalar):
            buffers.append(scalar)
            scalar += 1
        elif isinstance(argument, Empty):
            buffers.append(result)
            result += 1
        else:
            buffers.append(operand)
            if isinstance(parameter, Out):
                aliases[operand] = result - len(operands)
                result += 1
            operand += 1
    return buffers, aliases


def _pack(number: int) -> int:
    return int.from_bytes(struct.pack("<i", number), "little")


@functools.cache
def _register() -> None:
    import cuda.tile._cext

    cext: Any = cuda.tile._cext  # whose stub lacks what we need

    jax.ffi.register_ffi_type(
        "cutile_launch",
        {
            "type_id": cext.xla_ffi_get_call_type_id(),
            "type_info": cext.xla_ffi_get_call_type_info(),
        },
        platform="CUDA",
    )
    handler = cext.xla_ffi_get_call_handler()
    jax.ffi.register_ffi_target(
        "cutile_launch",
        {"instantiate": handler, "execute": handler},
        platform="CUDA",
    )

"""Which kernels a model needs, so that they can be compiled before it runs."""

import functools
import itertools
import pathlib
from collections.abc import Callable, Iterable

from .._buildable import Buildable
from ..xla_activation import Activation
from . import _backend, _cubins, dense, moe
from ._launch import Cubin


def moe_cubins(
    arch: str,
    num_experts: int,
    top_k: int,
    hidden_size: int,
    intermediate_size: int,
    activation: Activation = "silu",
    *,
    max_tokens: int = 8192,
) -> tuple[Cubin, ...]:
    """Returns the kernels that an MoE layer runs for up to `max_tokens` tokens.

    Args:
        arch: A compute capability: "9.0".
        num_experts: Experts on one device.
        top_k: Experts of a token.
        hidden_size: Width of the tokens.
        intermediate_size: Width between the two matmuls.
        activation: Between them.
        max_tokens: Most tokens of a call.
    """
    required = lambda tokens: moe.required_cubins(
        _arch_name(arch),
        (tokens, top_k),
        num_experts,
        hidden_size,
        intermediate_size,
        activation,
    )
    return _over_sizes(required, max_tokens)


def dense_cubins(
    arch: str, n: int, k: int, *, max_rows: int = 8192
) -> tuple[Cubin, ...]:
    """Returns the kernels that `x @ w.T` runs for `w` `[n, k]` and up to `max_rows`."""
    required = lambda rows: dense.required_cubins(_arch_name(arch), rows, n, k)
    return _over_sizes(required, max_rows)


def compile_ahead(cubins: Iterable[Cubin]) -> int:
    """Compiles what is not in the cache and returns how many kernels that were.

    Raises:
        RuntimeError: If kernels cannot be compiled here; with the reason.
    """
    cubins = tuple(cubins)
    if not _cubins.missing(cubins):
        return 0
    if problem := _cubins.why_not_compile():
        raise RuntimeError(
            f"cuTile kernels cannot be compiled here, because {problem}."
        )
    return len(_cubins.compile_missing(cubins))


def buildable(name: str, cubins: Callable[[str], Iterable[Cubin]]) -> Buildable:
    """Returns what `jmx8 build-kernels` builds for a model.

    Args:
        name: What it is asked for by.
        cubins: From an architecture to the kernels, for example a `partial` of
            `moe_cubins`.
    """

    def find(arch: str) -> pathlib.Path | None:
        is_built = not _cubins.missing(cubins(arch))
        return _cubins.folder(_arch_name(arch)) if is_built else None

    def build(arch: str, jobs: int | None) -> pathlib.Path:
        del jobs  # one compiler at a time
        compile_ahead(cubins(arch))
        return _cubins.folder(_arch_name(arch))

    return Buildable(name, tuple(_backend.ARCHES), find, build)


def _arch_name(arch: str) -> str:
    names = {
        f"{major}.{minor}": name for (major, minor), name in _backend.ARCHES.items()
    }
    plain = arch.rstrip("af")  # "9.0a": of no matter to this compiler
    if plain not in names:
        raise ValueError(
            f"arch: FlashInfer's cuTile kernels are for {list(names)}, got {arch!r}."
        )
    return names[plain]


def _over_sizes(
    required: Callable[[int], tuple[Cubin, ...]], most: int
) -> tuple[Cubin, ...]:
    """Returns what any size from 1 to `most` requires.

    Kernels change at a few sizes only, so that ranges whose ends agree are taken to
    agree in between, once they lie between two powers of two.
    """

    @functools.cache
    def between(low: int, high: int) -> frozenset[Cubin]:
        ends = frozenset(required(low)), frozenset(required(high))
        if high - low <= 1 or ends[0] == ends[1]:
            return ends[0] | ends[1]
        middle = (low + high) // 2
        return between(low, middle) | between(middle, high)

    powers = [1 << i for i in range(most.bit_length())]
    edges = sorted({*powers, most})
    ranges = [between(low, high) for low, high in itertools.pairwise(edges)]
    found = frozenset().union(required(1), *ranges)
    return tuple(sorted(found, key=lambda cubin: cubin.name))

"""`jmx8 build-kernels`: compiles kernels ahead, for machines with no compiler."""

import functools
import itertools
import pathlib
import time
from collections.abc import Iterator, Sequence

from ..checkpoint.folder import open_folder
from ..kernels._buildable import Buildable
from ..kernels.cutile import ahead
from ..kernels.flashinfer import modules
from ..kernels.flashinfer.modules import arch_of, parse_arch
from ..kernels.sm90 import library
from ..models import Qwen3Config
from ._console import err, out


BUILDABLES = (library.BUILDABLE, *modules.BUILDABLES)


def build_kernels(
    arch: str,
    names: Sequence[str] = (),
    jobs: int | None = None,
    buildables: Sequence[Buildable] = BUILDABLES,
    model: pathlib.Path | None = None,
) -> int:
    """Builds what is not built yet, and prints where each is and how long it took.

    Args:
        arch: What to build for, e.g. "10.0a"; the suffix may be left out.
        names: What to build; what jmx8's ops use on that device, if empty.
        jobs: How many compilers run at a time.
        buildables: What there is to build.
        model: Checkpoint folder of a model whose sizes to build cuTile kernels for.

    Returns:
        The exit code: 1 if something could not be built. The rest still is.

    Raises:
        ValueError: If the architecture or a name is not one, or there is nothing to
            build for that architecture.
    """
    capability = parse_arch(arch)
    arch = arch_of(capability)
    if model is not None:
        buildables = (*buildables, _cutile(model))
    there = {b.name: b for b in buildables if capability in b.capabilities}
    if unknown := [name for name in names if name not in there]:
        raise ValueError(
            f"{', '.join(unknown)} cannot be built for {arch}; expected any of "
            f"{', '.join(there) or 'nothing: no kernel is for this architecture'}."
        )
    wanted = [there[name] for name in names] or [
        buildable for buildable in there.values() if buildable.by_default
    ]
    if not wanted:
        raise ValueError(
            f"no op of jmx8 uses a kernel that is built for {arch} whatever the model; "
            "cuTile's, for 8.9, 9.0 and 12.x, need --model FOLDER."
        )
    width = max(len(buildable.name) for buildable in wanted)
    return max([_build(buildable, arch, jobs, width) for buildable in wanted])


def _cutile(folder: pathlib.Path) -> Buildable:
    """Returns the cuTile kernels of a model: they are compiled for its sizes."""
    config = Qwen3Config.from_hf(open_folder(folder).config)

    @functools.cache
    def cubins(arch: str) -> tuple[ahead.Cubin, ...]:
        shapes = sorted(set(_linear_shapes(config)))
        found = [ahead.dense_cubins(arch, n, k) for n, k in shapes]
        if config.num_experts:
            layer = (
                config.num_experts,
                config.num_experts_per_tok,
                config.hidden_size,
                config.moe_intermediate_size,
            )
            found.append(ahead.moe_cubins(arch, *layer))
        return tuple(dict.fromkeys(itertools.chain.from_iterable(found)))

    return ahead.buildable("cutile", cubins)


def _linear_shapes(config: Qwen3Config) -> Iterator[tuple[int, int]]:
    """Yields `[n, k]` of the model's linear layers that are converted."""
    hidden, head = config.hidden_size, config.head_dim
    yield config.num_attention_heads * head, hidden
    yield config.num_key_value_heads * head, hidden
    yield hidden, config.num_attention_heads * head
    if not config.num_experts or config.mlp_only_layers:
        yield config.intermediate_size, hidden
        yield hidden, config.intermediate_size


def _build(buildable: Buildable, arch: str, jobs: int | None, width: int) -> int:
    label = f"{buildable.name:<{width}}  {arch}"
    if (path := buildable.find(arch)) is not None:
        out.print(f"{label}  already built  {path}", markup=False)
        return 0
    start = time.perf_counter()
    try:
        path = buildable.build(arch, jobs)
    except RuntimeError as error:
        err.print(f"{label}  not built: {error}", style="red", markup=False)
        return 1
    seconds = time.perf_counter() - start
    out.print(f"{label}  built in {seconds:.0f} s  {path}", markup=False)
    return 0

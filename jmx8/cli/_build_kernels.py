"""`jmx8 build-kernels`: compiles kernels ahead, for machines with no compiler."""

import time
from collections.abc import Sequence

from ..kernels._buildable import Buildable
from ..kernels.flashinfer.modules import arch_of, BUILDABLES, parse_arch
from ._console import err, out


def build_kernels(
    arch: str,
    names: Sequence[str] = (),
    jobs: int | None = None,
    buildables: Sequence[Buildable] = BUILDABLES,
) -> int:
    """Builds what is not built yet, and prints where each is and how long it took.

    Args:
        arch: What to build for, e.g. "10.0a"; the suffix may be left out.
        names: What to build; what jmx8's ops use on that device, if empty.
        jobs: How many compilers run at a time.
        buildables: What there is to build.

    Returns:
        The exit code: 1 if something could not be built. The rest still is.

    Raises:
        ValueError: If the architecture or a name is not one, or there is nothing to
            build for that architecture.
    """
    capability = parse_arch(arch)
    arch = arch_of(capability)
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
        raise ValueError(f"no op of jmx8 uses a kernel that is built for {arch}.")
    width = max(len(buildable.name) for buildable in wanted)
    return max([_build(buildable, arch, jobs, width) for buildable in wanted])


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

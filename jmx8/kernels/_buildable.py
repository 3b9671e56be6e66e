"""What `jmx8 build-kernels` can make ahead, on a machine without a GPU."""

import dataclasses
import pathlib
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Buildable:
    """Something that is compiled once for each architecture, and kept.

    Attributes:
        name: What it is asked for by.
        capabilities: The compute capabilities that it can be built for.
        find: From an architecture such as "10.0a" to where it is, None if not built.
        build: From an architecture and a number of compilers at a time (None leaves it
            to the build) to where it is. Raises RuntimeError with the reason.
        by_default: Whether it is built when no name is given.
    """

    name: str
    capabilities: tuple[tuple[int, int], ...]
    find: Callable[[str], pathlib.Path | None]
    build: Callable[[str, int | None], pathlib.Path]
    by_default: bool = True

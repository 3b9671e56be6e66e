"""What a tree of another framework is, taken apart for conversion."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ._kernel_axes import KernelAxes


# By path, the axes that a layer contracts and its name, or why a leaf is kept.
Known = Mapping[str, tuple[KernelAxes, str] | str]


@dataclass(frozen=True)
class Unpacked:
    """A tree without the boxes of the framework that it comes from.

    Attributes:
        tree: The tree, with plain arrays.
        known: What the layers say about their leaves.
        repack: Takes a tree of converted arrays and the axes that each of them was
            converted along, by path, and returns one of the original kind.
    """

    tree: Any
    known: Known
    repack: Callable[[Any, Mapping[str, KernelAxes | int]], Any]

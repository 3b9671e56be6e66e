"""What the hooks of Linen and NNX layers share."""

from typing import Any

import numpy as np

from ..ops.folded import FoldedKernel


class StandIn:
    """A layer with some of its attributes replaced, for one call of its method."""

    def __init__(self, layer: Any, **replaced: Any):
        self.__dict__.update(replaced, _layer=layer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


def promote(layer_promote: Any, arrays: tuple, dtype: Any) -> tuple[Any, Any, Any]:
    """Promotes input, kernel and bias as a layer does, without touching the kernel.

    Args:
        layer_promote: Takes a tuple of three arrays and the dtype.
        arrays: Input, `FoldedKernel`, and bias or None.
        dtype: The layer's own, or None.

    Returns:
        The three, of the same dtype.
    """
    inputs, kernel, bias = arrays
    # Only its dtype takes part.
    empty = np.zeros((), kernel.dtype)
    inputs, empty, bias = layer_promote((inputs, empty, bias), dtype=dtype)
    view = FoldedKernel(kernel.array, kernel.axes, kernel.shape, empty.dtype)
    return inputs, view, bias


def refuse_custom(layer: str, name: str, function: Any, *usual: Any) -> None:
    """Refuses a layer that was given a product of its own.

    Raises:
        TypeError: If `function` is none of the usual ones.
    """
    if not any(function is known for known in usual):
        raise TypeError(
            f"{layer}: has an MXArray as its kernel and a {name} of its own, "
            f"{function!r}. Keep the kernel with `skip`, or leave {name} out."
        )

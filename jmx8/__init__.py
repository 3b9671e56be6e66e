"""MXFP8 inference for JAX."""

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from ._api import *  # noqa: F403
else:
    from . import _lazy

    __getattr__, __dir__ = _lazy.offer(__name__)

"""What the default device is, read when a function is traced."""

from typing import Any, Literal

import jax

from ._types import Activations


def default_device() -> Any:
    """Returns the `jax.Device` that computations run on unless told otherwise."""
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if device is None or isinstance(device, str):
        return jax.local_devices(backend=device)[0]
    return device


def compute_capability() -> tuple[int, int] | None:
    """Returns e.g. `(9, 0)` on an NVIDIA H200, None on anything but an NVIDIA GPU."""
    device = default_device()
    version = getattr(device, "compute_capability", None)
    if device.platform != "gpu" or version is None or not version[0].isdigit():
        return None
    major, _, minor = version.partition(".")
    return int(major), int(minor or 0)


def resolve_activations(activations: Activations) -> Literal["bf16", "mxfp8"]:
    """Returns what "auto" means on the default device; other values as they are.

    Tensor cores multiply MXFP8 by MXFP8 from compute capability 10.0 on. Elsewhere
    quantizing the activations would cost accuracy and gain nothing.
    """
    if activations != "auto":
        return activations
    capability = compute_capability()
    return "mxfp8" if capability is not None and capability >= (10, 0) else "bf16"

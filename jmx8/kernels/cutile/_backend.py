"""What the backends of both ops have in common: where and whether they run."""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp

from ... import _device
from ..._mx_array import MXArray
from . import _cubins
from ._launch import Cubin, Target


# Compute capabilities and what compilers call them.
ARCHES = {(8, 9): "sm_89", (9, 0): "sm_90", (12, 0): "sm_120", (12, 1): "sm_121"}


def why_not_here() -> str | None:
    """Returns why no kernel of ours runs on the default device, or None."""
    capability = _device.compute_capability()
    if capability not in ARCHES:
        device = _device.default_device()
        found = device.device_kind
        if capability is not None:
            found = ".".join(map(str, capability))
        return (
            "FlashInfer's cuTile kernels need compute capability 8.9, 9.0, 12.0 or "
            f"12.1, and this device is {found}"
        )
    return _cubins.why_not_launch()


def why_not_built(cubins: Iterable[Cubin]) -> str | None:
    """Returns why some of the kernels are neither compiled nor can be, or None."""
    missing = _cubins.missing(cubins)
    if not missing or (problem := _cubins.why_not_compile()) is None:
        return None
    arch = next(c for c, name in ARCHES.items() if name == missing[0].arch)
    return (
        f"{len(missing)} of its kernels are not compiled for this device "
        f"({_cubins.summary(missing)}) and cannot be compiled here, because {problem}; "
        f"`jmx8 build-kernels --arch {arch[0]}.{arch[1]} --model FOLDER` compiles them "
        "on a machine that has jmx8[build-cutile]"
    )


def target() -> Target:
    """Returns the target for the default device."""
    capability = _device.compute_capability()
    assert capability is not None, "refused by why_not_here"
    return target_of(ARCHES[capability])


@functools.cache
def target_of(arch: str) -> Target:
    """Returns the target for an architecture, with its compiled kernels' folder."""
    return Target(arch, _cubins.load)


def abstract_weights(*shape: int) -> MXArray:
    """Returns weights that have a shape and no memory."""
    scales_shape = (*shape[:-1], shape[-1] // 32)
    return jax.eval_shape(
        lambda: MXArray(
            jnp.zeros(shape, jnp.float8_e4m3fn),
            jnp.zeros(scales_shape, jnp.float8_e8m0fnu),
        )
    )

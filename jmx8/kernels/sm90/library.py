"""The compiled library: whether it can be used here, and loading it."""

import functools
import logging
import pathlib
from typing import Any

from ... import _device
from .._adapter import adapter_unavailable
from .._buildable import Buildable
from . import _build


_log = logging.getLogger("jmx8")

_CAPABILITY = (9, 0)
_AHEAD = f"`jmx8 build-kernels --arch {_build.ARCH} --module sm90`"


def why_not_here() -> str | None:
    """Returns why the library cannot run on the default device, None if it can.

    None, too, if it is not built but can be, which `function` then does.
    """
    capability = _device.compute_capability()
    if capability != _CAPABILITY:
        found = "not an NVIDIA GPU"
        if capability is not None:
            found = f"of {'.'.join(map(str, capability))}"
        return (
            "jmx8's own kernels are compiled for compute capability 9.0 alone, and "
            f"this device is {found}"
        )
    if problem := adapter_unavailable():
        return problem
    # Looking for it takes a millisecond, and each trace of an op asks.
    if load.cache_info().currsize or _build.find() is not None:
        return None
    problem = _build.unbuildable()
    return problem and (
        f"jmx8's own kernels are not built ({problem}); build them ahead with {_AHEAD}"
    )


def function(name: str) -> Any:
    """Returns a function of `csrc/exports.cu` as a `tvm_ffi.Function`.

    Raises:
        RuntimeError: If the library is not built and cannot be, with the reason.
    """
    return load()[name]


@functools.cache
def load() -> Any:
    """Returns the library as a `tvm_ffi.Module`; builds it first if it must.

    Raises:
        RuntimeError: If it is not built and cannot be, with the reason.
    """
    path = _build.find()
    if path is None:
        _log.warning(
            "building jmx8's own kernels, once; it takes minutes. %s builds ahead.",
            _AHEAD,
        )
        path = _build.build()
    import tvm_ffi

    return tvm_ffi.load_module(str(path))


def diagnose() -> dict[str, Any]:
    """Returns where the library is or what it lacks.

    The keys are "path", "is_prebuilt", "problem", and "seconds" and "nvcc" of its
    build; what does not apply is None. "prebuilt_problem" says why the one that the
    wheel brought is not used.
    """
    path = _build.find()
    facts = {} if path is None else _build.record(path)
    return {
        "path": path and str(path),
        "is_prebuilt": path == _build.PREBUILT,
        "problem": _build.unbuildable() if path is None else None,
        "seconds": facts.get("seconds"),
        "nvcc": facts.get("nvcc"),
        "prebuilt_problem": _build.prebuilt_problem(),
    }


def _find(arch: str) -> pathlib.Path | None:
    assert arch == _build.ARCH
    return _build.find()


def _build_for(arch: str, jobs: int | None) -> pathlib.Path:
    assert arch == _build.ARCH
    return _build.build(jobs)


BUILDABLE = Buildable("sm90", (_CAPABILITY,), _find, _build_for)

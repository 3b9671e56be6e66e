"""Builds and loads the compiled adapter, `_adapter.cc`."""

import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import pathlib
import shutil
import subprocess
from collections.abc import Sequence
from typing import Any

from ._cache import cache_folder, make_once


_SOURCE = pathlib.Path(__file__).with_name("_adapter.cc")


def bind(function: Any, plan: Sequence[Sequence[Any]]) -> Any:
    """Returns a `tvm_ffi.Function` of buffers that calls `function` as `plan` says.

    Args:
        function: `tvm_ffi.Function`.
        plan: Its arguments, as `_adapter.cc` reads them.

    Raises:
        RuntimeError: If the adapter is not built yet and cannot be.
    """
    import tvm_ffi

    return load()["bind"](function, tvm_ffi.convert(plan))


def adapter_path() -> pathlib.Path:
    """Returns where the adapter for this source and this tvm-ffi is or will be."""
    version = importlib.metadata.version("apache-tvm-ffi")
    key = _SOURCE.read_bytes() + version.encode()
    digest = hashlib.sha256(key).hexdigest()[:16]
    return cache_folder("adapter") / f"adapter-{digest}.so"


def bridge_missing() -> str | None:
    """Returns which package of the bridge is missing, None if none is."""
    for package in ("jax_tvm_ffi", "tvm_ffi"):
        # Looked for, not imported: importing takes its time.
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed: `pip install jmx8[cuda]`"
    return None


def adapter_unavailable() -> str | None:
    """Returns why the adapter is not there and cannot be built, or None."""
    if problem := bridge_missing():
        return problem
    path = adapter_path()
    if path.exists() or _compiler() is not None:
        return None
    return f"the FFI adapter is not built ({path}) and there is no C++ compiler"


@functools.cache
def load() -> Any:
    """Returns the adapter's module, compiled first if it must be."""
    import tvm_ffi

    return tvm_ffi.load_module(str(make_once(adapter_path(), _compile)))


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def _compile(out: pathlib.Path) -> None:
    import tvm_ffi

    compiler = _compiler()
    if compiler is None:
        raise RuntimeError(
            "the FFI adapter must be compiled once, and there is no C++ compiler: "
            "install g++ or set CXX, or set JMX8_CACHE_DIR to a folder where "
            "`jmx8 build-kernels` ran."
        )
    includes = [f"-I{folder}" for folder in tvm_ffi.libinfo.include_paths()]
    flags = ["-std=c++17", "-O2", "-shared", "-fPIC", "-fvisibility=hidden"]
    command = [compiler, *flags, *includes, str(_SOURCE), "-o", str(out)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(
            f"the FFI adapter does not compile: {' '.join(command)}\n{result.stderr}"
        )

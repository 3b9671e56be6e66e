"""Finds compiled kernels in the per-user cache, and has missing ones compiled.

Compiling needs FlashInfer, torch and tileiras and happens in a process of its own, so
that a process that computes imports none of them.
"""

import collections
import functools
import importlib.util
import os
import pathlib
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable

from .. import _cache
from ..flashinfer import _version
from ._launch import Cubin


# The compiler that the tiles were chosen for. Others work, some more slowly.
TUNED_COMPILER = "13.3.36"


def folder(arch: str) -> pathlib.Path:
    """Returns where the compiled kernels for `arch` are kept."""
    cuda_tile = _version.installed_version("cuda-tile")
    versions = f"flashinfer-{_version.TESTED}-cuda-tile-{cuda_tile}"
    return _cache.cache_folder("cutile", versions, arch)


def path_of(cubin: Cubin, compiler: str) -> pathlib.Path:
    """Returns the file for what `compiler` made of `cubin`."""
    return folder(cubin.arch) / f"{cubin.name}.tileiras-{compiler}.cubin"


def find(cubin: Cubin) -> pathlib.Path | None:
    """Returns the compiled kernel, preferably by the compiler that tiles are for."""
    tuned = path_of(cubin, TUNED_COMPILER)
    if tuned.exists():
        return tuned
    pattern = f"{cubin.name}.tileiras-*.cubin"
    return max(folder(cubin.arch).glob(pattern), default=None)


def missing(cubins: Iterable[Cubin]) -> list[Cubin]:
    """Returns those that are not in the cache, each once."""
    return [cubin for cubin in dict.fromkeys(cubins) if find(cubin) is None]


def why_not_launch() -> str | None:
    """Returns why compiled kernels cannot be launched here, or None."""
    if _version.installed_version("cuda-tile") is None:
        return "cuda-tile, which launches the kernels, is not installed"
    return None


def why_not_compile() -> str | None:
    """Returns why kernels cannot be compiled here, or None."""
    if problem := _version.version_problem():
        return problem
    for package in ("torch", "cuda.tile"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    if _tileiras() is None:
        return (
            "tileiras, the compiler, is not installed: `pip install jmx8[build-cutile]`"
        )
    return None


def _tileiras() -> str | None:
    """Returns the compiler's path: as a package, on the PATH, or in CUDA_HOME."""
    has_package = _version.installed_version("nvidia-cuda-tileiras") is not None
    if has_package and importlib.util.find_spec("nvidia.cu13"):
        folders = importlib.import_module("nvidia.cu13").__path__
        if found := shutil.which("tileiras", path=os.path.join(folders[0], "bin")):
            return found
    cuda_home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    search = os.pathsep.join([os.environ.get("PATH", ""), f"{cuda_home}/bin"])
    return shutil.which("tileiras", path=search)


@functools.cache
def compiler_version() -> str:
    """Returns the version of the installed compiler: "13.3.36"."""
    command = [str(_tileiras()), "--version"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    match = re.search(r"V(\d+\.\d+\.\d+)", text)
    if match is None:
        raise RuntimeError(f"{command} printed no version, but {text!r}.")
    return match[1]


def compile_missing(cubins: Iterable[Cubin]) -> list[Cubin]:
    """Compiles what is not in the cache, in a subprocess.

    Returns:
        What was compiled.

    Raises:
        RuntimeError: If that failed; with the compiler's message.
    """
    wanted = missing(cubins)
    if not wanted:
        return []
    with tempfile.TemporaryDirectory() as scratch:
        request = pathlib.Path(scratch, "cubins")
        request.write_bytes(pickle.dumps(wanted))
        command = [sys.executable, "-m", "jmx8.kernels.cutile.build", str(request)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(
            f"compiling {len(wanted)} cuTile kernels failed; `{' '.join(command)}` "
            f"said:\n{result.stderr.strip()[-4000:]}"
        )
    return wanted


@functools.cache
def _read(path: pathlib.Path) -> bytes:
    return path.read_bytes()


def load(cubin: Cubin) -> bytes:
    """Returns the compiled kernel, which is compiled first if it is missing."""
    if find(cubin) is None:
        compile_missing([cubin])
    path = find(cubin)
    if path is None:
        raise FileNotFoundError(f"{cubin.name} was not compiled.")
    return _read(path)


def summary(cubins: Iterable[Cubin]) -> str:
    """Returns e.g. "2 of sorted_grouped, 1 of combine"."""
    counts = collections.Counter(cubin.function.strip("_") for cubin in cubins)
    return ", ".join(f"{count} of {name}" for name, count in counts.items())

"""Compiles the library of `csrc`, and finds one that is compiled.

The wheel's build hook runs this, too, where neither jax nor jmx8 is installed.
"""

import concurrent.futures
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import tempfile
import time
from typing import Any

from .. import _toolchain
from .._cache import cache_folder, make_once, write_whole


ARCH = "9.0a"
PREBUILT = pathlib.Path(__file__).with_name("_prebuilt") / "sm90.so"

_CSRC = pathlib.Path(__file__).with_name("csrc")
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "--expt-relaxed-constexpr",
    "-cudart=static",
    "-Xptxas=-v",  # what `record` says of each kernel
)
# The first whose runtime has cudaGetDriverEntryPointByVersion.
_OLDEST_NVCC = (12, 5)
# What nvcc includes unasked, and a wheel of its own has.
_OWN_HEADERS = ("crt/host_config.h",)


def sources() -> list[pathlib.Path]:
    """Returns all files that the library is made of."""
    return sorted(p for p in _CSRC.iterdir() if p.suffix in (".cu", ".cuh", ".h"))


def sources_digest() -> str:
    """Returns what changes with every source and flag."""
    digest = hashlib.sha256(repr(_FLAGS).encode())
    for path in sources():
        digest.update(f"\n{path.name}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def record(path: pathlib.Path) -> dict[str, Any]:
    """Returns what a built library's build noted: its versions, "seconds", "kernels".

    "kernels" has the "registers" and the "spilled" bytes of each, by mangled name.
    """
    return json.loads(path.with_suffix(".json").read_text())


def find() -> pathlib.Path | None:
    """Returns the library, None if it must be built first.

    It is the one that the wheel brought if it fits, the one in the cache that nvcc has
    built here, or one that another nvcc has if none can here.
    """
    if PREBUILT.exists() and prebuilt_problem() is None:
        return PREBUILT
    if _tvm_ffi_version() is None:
        return None
    if (version := nvcc_version()) is not None:
        path = _cached_path(version)
        if path.exists():
            return path
    if unbuildable() is None:
        return None
    found = _cached_path("*")
    built = found.parent.glob(found.name)
    return max(built, key=lambda path: path.stat().st_mtime, default=None)


def prebuilt_problem() -> str | None:
    """Returns why the library that the wheel brought, if any, is not used."""
    if not PREBUILT.exists():
        return None
    facts, installed = record(PREBUILT), _tvm_ffi_version()
    if facts["sources"] != sources_digest():
        return f"{PREBUILT} was built from other sources"
    # Its C interface, all that the library uses, is kept within a minor version.
    minor = lambda version: version and version.split(".")[:2]
    if minor(facts["tvm_ffi"]) != minor(installed):
        return f"{PREBUILT} is for tvm-ffi {facts['tvm_ffi']}, and there is {installed}"
    return None


def unbuildable() -> str | None:
    """Returns what is missing to build the library, None if nothing is."""
    if problem := missing_toolkit():
        return problem
    if _tvm_ffi_version() is None:
        return "tvm_ffi is not installed: `pip install jmx8[cuda]`"
    return None


def missing_toolkit() -> str | None:
    """Returns what the CUDA toolkit here lacks for a build, None if nothing."""
    if problem := _toolchain.missing_compiler():
        return problem
    home, version = _toolchain.cuda_home(), nvcc_version()
    if home is None or version is None:
        return f"{home}/bin/nvcc does not tell its version"
    if tuple(map(int, version.split(".")[:2])) < _OLDEST_NVCC:
        return (
            f"nvcc must be {'.'.join(map(str, _OLDEST_NVCC))} or newer, and "
            f"{home}/bin/nvcc is {version}: set CUDA_HOME, or `pip install jmx8[build]`"
        )
    if missing := _toolchain.missing_headers(_headers(), home):
        return (
            f"{', '.join(missing)} is neither in the CUDA toolkit {home} nor in an "
            "installed package: `pip install jmx8[build]`"
        )
    return None


def nvcc_version() -> str | None:
    """Returns the version of the nvcc that would be used, None if there is none."""
    home = _toolchain.cuda_home()
    return home and _ask_version(home / "bin/nvcc")


@functools.cache
def _ask_version(nvcc: pathlib.Path) -> str | None:
    result = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
    match = re.search(r"release \S+ V([\d.]+)", result.stdout)
    return match and match[1]


def _headers() -> tuple[str, ...]:
    """Returns the headers of the CUDA toolkit that the sources include."""
    text = "\n".join(path.read_text() for path in sources())
    included = re.findall(r"^#include <((?!tvm/)[\w/]+\.h|cuda/\w+)>", text, re.M)
    return (*_OWN_HEADERS, *sorted(set(included)))


def _tvm_ffi_version() -> str | None:
    try:
        return importlib.metadata.version("apache-tvm-ffi")
    except importlib.metadata.PackageNotFoundError:
        return None


def _cached_path(nvcc: str) -> pathlib.Path:
    name = f"sm90-{sources_digest()}-tvmffi{_tvm_ffi_version()}-nvcc{nvcc}.so"
    return cache_folder("sm90", ARCH) / name


def build(jobs: int | None = None) -> pathlib.Path:
    """Builds the library into the cache, unless it is there, and returns where it is.

    Args:
        jobs: How many compilers run at a time; as many as there are cores if None.

    Raises:
        RuntimeError: If it cannot be built, with what is missing or nvcc's words.
    """
    version = nvcc_version()
    if (problem := unbuildable()) or version is None:
        raise RuntimeError(f"jmx8's kernels for {ARCH} cannot be built: {problem}.")
    target = _cached_path(version)
    return make_once(target, lambda path: _build(path, target, version, jobs))


def _build(
    path: pathlib.Path, target: pathlib.Path, version: str, jobs: int | None
) -> None:
    start = time.perf_counter()
    units = [source for source in sources() if source.suffix == ".cu"]
    with tempfile.TemporaryDirectory() as folder:
        objects = [pathlib.Path(folder, f"{unit.stem}.o") for unit in units]
        workers = jobs or len(os.sched_getaffinity(0))
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            logs = list(pool.map(_compile, units, objects))
        libraries = [f"-L{path}" for path in _toolchain.wheel_folders("lib")]
        _nvcc("-shared", *map(str, objects), *libraries, "-o", str(path))
    facts = {
        "arch": ARCH,
        "sources": sources_digest(),
        "nvcc": version,
        "tvm_ffi": _tvm_ffi_version(),
        "seconds": round(time.perf_counter() - start, 1),
        "kernels": {k: v for log in logs for k, v in parse_usage(log).items()},
    }
    # Before the library, so that there is none without it.
    write_whole(target.with_suffix(".json"), json.dumps(facts, indent=1).encode())


def _compile(unit: pathlib.Path, out: pathlib.Path) -> str:
    import tvm_ffi

    includes = [f"-isystem={path}" for path in tvm_ffi.libinfo.include_paths()]
    # Wheels come last, so that a toolkit's own headers are not mixed with others.
    includes += [f"-isystem={path}" for path in _toolchain.wheel_folders("include")]
    return _nvcc("-c", str(unit), *includes, "-o", str(out))


def _nvcc(*arguments: str) -> str:
    """Runs nvcc and returns what it printed."""
    nvcc = str(_toolchain.cuda_home()) + "/bin/nvcc"
    command = [nvcc, "-ccbin", str(_toolchain.compiler()), *_FLAGS, *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(
            f"jmx8's kernels for {ARCH} do not compile: {' '.join(command)}\n"
            f"{result.stdout}{result.stderr}"
        )
    return result.stdout + result.stderr


def parse_usage(log: str) -> dict[str, dict[str, int | bool]]:
    """Returns what ptxas says of each kernel that it assembled, by mangled name.

    "registers" a thread, "spilled" bytes, and whether "serialized": whether it made the
    asynchronous multiplications wait for each other, as it does for code that it does
    not understand.
    """
    serialized = set(re.findall(r"serialized due to .* function '(\w+)'", log))
    kernels = {}
    parts = re.split(r"Compiling entry function '(\w+)'", log)
    for name, text in zip(parts[1::2], parts[2::2], strict=True):
        spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
        registers = re.search(r"Used (\d+) registers", text)
        if spilled is None or registers is None:
            raise RuntimeError(f"ptxas does not say what {name} takes:\n{text}")
        kernels[name] = {
            "registers": int(registers[1]),
            "spilled": int(spilled[1]) + int(spilled[2]),
            "serialized": name in serialized,
        }
    return kernels

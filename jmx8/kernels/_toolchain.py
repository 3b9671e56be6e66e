"""Where the compiler, the headers and the libraries are that kernels are built with.

A CUDA toolkit in a container often has the compiler and the runtime alone. What it
lacks is in NVIDIA's wheels, which all unpack into folders of the package `nvidia`.
"""

import importlib.util
import os
import pathlib
import shutil
import subprocess
import sysconfig
import tempfile


# Wheels for CUDA 13 that have what FlashInfer includes and a small toolkit lacks.
_WHEELS = {
    "cublas": "nvidia-cublas",
    "curand": "nvidia-curand",
    "nvrtc": "nvidia-cuda-nvrtc",
}


def wheel_with(header: str) -> str | None:
    """Returns the package that has a header of the toolkit, None if unknown."""
    return next((w for prefix, w in _WHEELS.items() if header.startswith(prefix)), None)


def wheel_folders(name: str) -> list[pathlib.Path]:
    """Returns the folders `nvidia/*/name` of NVIDIA's wheels."""
    spec = importlib.util.find_spec("nvidia")
    roots = [] if spec is None else spec.submodule_search_locations or []
    return sorted(
        path for root in roots for path in pathlib.Path(root).glob(f"*/{name}")
    )


_DEFAULT_HOME = "/usr/local/cuda"


def cuda_home() -> pathlib.Path | None:
    """Returns the toolkit to compile with, None if there is none.

    It is the first that has a compiler and the runtime's headers of `CUDA_HOME`,
    `CUDA_PATH`, what the nvcc on the `PATH` belongs to, `/usr/local/cuda`, and NVIDIA's
    wheels.
    """
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if nvcc := shutil.which("nvcc"):
        candidates.append(str(pathlib.Path(nvcc).resolve().parents[1]))
    candidates.append(_DEFAULT_HOME)
    candidates += [str(folder.parent) for folder in wheel_folders("bin")]
    for candidate in filter(None, candidates):
        root = pathlib.Path(candidate)
        if (root / "bin/nvcc").exists() and (root / "include/cuda_runtime.h").exists():
            return root
    return None


def search_path() -> str:
    """Returns a `PATH` with the scripts of this Python environment, ninja among them.

    They are not on the `PATH` of a Python that is started by its full name.
    """
    return os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])


def compiler() -> str | None:
    """Returns the C++ compiler that nvcc is to work with, None if there is none."""
    return shutil.which(os.environ.get("CXX", "c++"))


def missing_compiler() -> str | None:
    """Returns which compiler of CUDA C++ is missing, None if none is."""
    if cuda_home() is None:
        return (
            "there is no CUDA toolkit with nvcc: set CUDA_HOME, or "
            "`pip install jmx8[build]`"
        )
    if compiler() is None:
        return "there is no C++ compiler: install g++, or set CXX"
    return None


def missing_tool() -> str | None:
    """Returns what FlashInfer's build lacks beside headers, None if nothing."""
    if problem := missing_compiler():
        return problem
    if shutil.which("ninja", path=search_path()) is None:
        return "ninja is missing: `pip install ninja`"
    if importlib.util.find_spec("torch") is None:
        return "FlashInfer's build needs torch, of any kind: `pip install torch`"
    return None


def missing_headers(names: tuple[str, ...], home: pathlib.Path) -> list[str]:
    """Returns those headers that neither the toolkit nor a wheel has."""
    folders = [home / "include", pathlib.Path("/usr/include")]
    folders += wheel_folders("include")
    return [n for n in names if not any((folder / n).exists() for folder in folders)]


def linker_finds(library: str, *flags: str) -> bool:
    """Tells whether `-l<library>` resolves."""
    compiler = os.environ.get("CXX", "c++")
    with tempfile.TemporaryDirectory() as folder:
        source = pathlib.Path(folder, "empty.cc")
        source.touch()
        command = [compiler, "-shared", str(source), "-o", f"{folder}/empty.so"]
        run = subprocess.run([*command, *flags, f"-l{library}"], capture_output=True)
    return run.returncode == 0

"""FlashInfer's compiled modules: which there are, where they are, and loading them.

A module is a shared library of TVM-FFI functions. One that is built needs neither
FlashInfer nor torch; building one needs both, and happens in a process of its own.
"""

import ctypes
import dataclasses
import functools
import importlib
import importlib.util
import json
import logging
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from .. import _toolchain
from .._adapter import adapter_unavailable, bridge_missing
from .._buildable import Buildable
from .._cache import cache_folder
from . import cubins
from ._version import installed_version, TESTED, version_problem


_log = logging.getLogger("jmx8")

Capability = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Module:
    """One of FlashInfer's compiled modules.

    Attributes:
        name: What FlashInfer calls it, which is also the name of its file.
        generator: The function of FlashInfer that describes its build, as
            `package.module:function`.
        capabilities: The compute capabilities that it has code for.
        arguments: What the generator is called with.
        headers: Of the CUDA toolkit's, those that a small toolkit may lack.
        cubins: Whether it fetches its kernels one by one when they first run.
    """

    name: str
    generator: str
    capabilities: tuple[Capability, ...]
    arguments: tuple[Any, ...] = ()
    headers: tuple[str, ...] = ()
    cubins: bool = False


_BLACKWELL = ((10, 0), (10, 3), (11, 0), (12, 0), (12, 1))
_EVERYWHERE = ((8, 0), (8, 6), (8, 9), (9, 0), *_BLACKWELL)
_CURAND = ("curand_kernel.h",)
_CUBLAS_CURAND = ("cublasLt.h", "cublas_v2.h", *_CURAND)
_MOE_HEADERS = (*_CUBLAS_CURAND, "nvrtc.h")

# Below compute capability 10.0 its kernels compile to nothing, and return without an
# error or a result.
QUANTIZATION = Module(
    "mxfp8_quantization_sm100",
    "flashinfer.jit.fp8_quantization:gen_mxfp8_quantization_sm100_module",
    _BLACKWELL,
    headers=_CUBLAS_CURAND,
)
GEMM = Module(
    "mxfp8_gemm_cutlass",
    "flashinfer.jit.gemm.core:gen_gemm_sm100_module_cutlass_mxfp8",
    ((10, 0), (10, 3), (11, 0)),
    headers=_CURAND,
)
GEMM_SM120 = Module(
    "mxfp8_gemm_cutlass_sm120",
    "flashinfer.jit.gemm.core:gen_gemm_sm120_module_cutlass_mxfp8",
    ((12, 0), (12, 1)),
    headers=_CURAND,
)
CUTLASS_MOE_SM100 = Module(
    "fused_moe_100",
    "flashinfer.jit.fused_moe:gen_cutlass_fused_moe_sm100_module",
    ((10, 0),),
    headers=_MOE_HEADERS,
)
CUTLASS_MOE_SM103 = Module(
    "fused_moe_103",
    "flashinfer.jit.fused_moe:gen_cutlass_fused_moe_sm103_module",
    ((10, 3),),
    headers=_MOE_HEADERS,
)
TRTLLM_MOE = Module(
    "fused_moe_trtllm_sm100",
    "flashinfer.jit.fused_moe:gen_trtllm_gen_fused_moe_sm100_module",
    ((10, 0), (10, 3)),
    headers=_CUBLAS_CURAND,
    cubins=True,
)
NORM = Module(
    "norm",
    "flashinfer.jit.norm:gen_norm_module",
    _EVERYWHERE,
    headers=_CUBLAS_CURAND,
)
SILU_AND_MUL = Module(
    "silu_and_mul",
    "flashinfer.jit.activation:gen_act_and_mul_module",
    _EVERYWHERE,
    arguments=("silu",),
)
TOPK = Module(
    "topk", "flashinfer.jit.topk:gen_topk_module", _EVERYWHERE, headers=_CURAND
)
ROPE = Module("rope", "flashinfer.jit.rope:gen_rope_module", _EVERYWHERE)

# What jmx8's ops call, and what only its tests and benchmarks do.
OPS = (
    QUANTIZATION,
    GEMM,
    GEMM_SM120,
    CUTLASS_MOE_SM100,
    CUTLASS_MOE_SM103,
    TRTLLM_MOE,
)
MODULES = (*OPS, NORM, SILU_AND_MUL, TOPK, ROPE)


def arch_of(capability: Capability) -> str:
    """Returns the architecture that is compiled for a device, e.g. "10.0a"."""
    major, minor = capability
    suffix = "f" if capability == (12, 0) else "a" if major >= 9 else ""
    return f"{major}.{minor}{suffix}"


def _dotted(capability: Capability) -> str:
    return ".".join(map(str, capability))


def parse_arch(text: str) -> Capability:
    """Returns the compute capability of an architecture such as "10.0a" or "10.0".

    Raises:
        ValueError: If it is not one.
    """
    match = re.fullmatch(r"(\d+)\.(\d+)[af]?", text)
    if match is None:
        raise ValueError(f"{text!r} is not an architecture; expected one like 10.0a.")
    return int(match[1]), int(match[2])


def cached_path(module: Module, arch: str) -> pathlib.Path:
    """Returns where jmx8 keeps the module when it has built it."""
    return cache_folder("flashinfer", TESTED, arch, f"{module.name}.so")


def find(module: Module, arch: str) -> pathlib.Path | None:
    """Returns the module built for `arch`: jmx8's own, or else one of FlashInfer's."""
    return next(_built(module, arch), None)


def _built(module: Module, arch: str) -> Iterator[pathlib.Path]:
    path = cached_path(module, arch)
    if path.exists():
        yield path
    file = f"{module.name}/{module.name}.so"
    spec = importlib.util.find_spec("flashinfer")
    if spec is not None and spec.origin and installed_version() == TESTED:
        path = pathlib.Path(spec.origin).parent / "data/aot" / file
        if path.exists():
            yield path
    for architectures, folder in _jit_cache():
        path = folder / file
        if path.exists() and any(_runs_on(a, arch) for a in architectures):
            yield path
    # FlashInfer names the folder after all architectures that it was built for.
    target = arch.replace(".", "")
    for folder in sorted(cubins.flashinfer_cache().glob(f"{TESTED}/*{target}*")):
        path = folder / "cached_ops" / file
        if target in folder.name.split("_") and _is_finished(path):
            yield path


def _is_finished(path: pathlib.Path) -> bool:
    """Tells whether ninja finished a file, which the linker writes in place."""
    log = path.parent / ".ninja_log"
    return path.exists() and log.exists() and f"{path.name}\t" in log.read_text()


def jit_cache_problem() -> str | None:
    """Returns why the package flashinfer-jit-cache is not used, None if it is."""
    version = installed_version("flashinfer-jit-cache")
    if version is None:
        return "flashinfer-jit-cache is not installed"
    if version.partition("+")[0] != TESTED:
        return f"flashinfer-jit-cache is {version}, which must be {TESTED}"
    return None


@functools.cache
def _jit_cache() -> tuple[tuple[frozenset[str], pathlib.Path], ...]:
    """Returns the folders of flashinfer-jit-cache, with what they are built for."""
    if jit_cache_problem() is not None:
        return ()
    package = importlib.import_module("flashinfer_jit_cache")
    return tuple(
        (frozenset(provider.cuda_architectures), pathlib.Path(provider.jit_cache_dir))
        for provider in package.get_jit_cache_providers()
        if provider.version == package.__version__
    )


def _runs_on(binary: str, arch: str) -> bool:
    """Tells whether code for e.g. "sm100f" runs on a device that is e.g. "10.3a"."""
    major, minor = parse_arch(arch)
    match = re.fullmatch(r"sm(\d+)(\d)([af]?)", binary)
    if match is None or int(match[1]) != major:
        return False
    # What has the suffix "a" runs on that very device, all else on later ones too.
    return int(match[2]) == minor or (match[3] != "a" and int(match[2]) < minor)


def unavailable(module: Module, capability: Capability | None) -> str | None:
    """Returns why the module cannot be loaded for a device, None if it can.

    Args:
        module: The module.
        capability: The device's compute capability, None if it is not an NVIDIA GPU.

    Returns:
        A clause that says what to do. None if the module is built, and also if `load`
        can build it here.
    """
    if capability not in module.capabilities:
        here = "not an NVIDIA GPU" if capability is None else _dotted(capability)
        there = ", ".join(map(_dotted, module.capabilities))
        return (
            f"FlashInfer's {module.name} is for compute capability {there}; "
            f"this device is {here}"
        )
    if problem := bridge_missing():
        return problem
    arch = arch_of(capability)
    if find(module, arch) is not None:
        if module.cubins and not cubins.has_cubins():
            folder = cubins.cubin_folder()
            return f"there are no cubins in {folder}: {cubins.HOW_TO_FETCH}"
        return adapter_unavailable()
    problem = _cannot_build(module)
    return problem and (
        f"FlashInfer's {module.name} is not built for {arch} ({problem}); build it "
        f"ahead with `jmx8 build-kernels --arch {arch} --module {module.name}`"
    )


def _cannot_build(module: Module) -> str | None:
    if problem := version_problem() or _toolchain.missing_tool():
        return problem
    if module.cubins and not cubins.has_cubins():
        # Fetching thousands of files is not for a first call to do.
        return f"its headers and cubins are not in {cubins.cubin_folder()}"
    return None


@functools.cache
def load(module: Module, capability: Capability | None) -> Any:
    """Returns the module as a `tvm_ffi.Module`; builds it first if it must.

    Raises:
        RuntimeError: If it is not built and cannot be, with the reason.
    """
    if problem := unavailable(module, capability):
        raise RuntimeError(f"{problem}.")
    assert capability is not None
    arch = arch_of(capability)
    path = find(module, arch) or _build_now(module, arch)
    import tvm_ffi  # pyright: ignore[reportMissingImports]

    if module.cubins:
        # It calls the driver, and is linked with it only if the driver was there.
        ctypes.CDLL("libcuda.so.1", mode=ctypes.RTLD_GLOBAL)
    preload_libraries(path)
    loaded = tvm_ffi.load_module(str(path))
    if module.cubins:
        cubins.serve_cubins(path)
    return loaded


def preload_libraries(path: pathlib.Path) -> None:
    """Opens what a library needs and the loader does not find, from NVIDIA's wheels.

    Raises:
        OSError: If a library is nowhere, or the file is not a library.
    """
    while True:
        try:
            ctypes.CDLL(str(path))
            return
        except OSError as error:
            message = str(error)
            missing = re.match(r"(\S+): cannot open shared object file", message)
            folders = _toolchain.wheel_folders("lib")
            found = [
                f / missing[1] for f in folders if missing and (f / missing[1]).exists()
            ]
            if not found:
                raise
        # The loader now knows it by its name. It fails with another one, or not at all.
        ctypes.CDLL(str(found[0]), mode=ctypes.RTLD_GLOBAL)


def _build_now(module: Module, arch: str) -> pathlib.Path:
    _log.warning(
        "building FlashInfer's %s for %s, once; it takes minutes. "
        "`jmx8 build-kernels --arch %s` builds ahead.",
        *(module.name, arch, arch),
    )
    return build(module, arch)


def build(module: Module, arch: str, jobs: int | None = None) -> pathlib.Path:
    """Builds a module into jmx8's cache, in a process that imports FlashInfer.

    Args:
        module: The module.
        arch: The architecture, e.g. "10.0a".
        jobs: How many compilers run at a time; ninja decides if None.

    Raises:
        RuntimeError: If it cannot be built, with the reason. What the compiler printed
            went to stderr.
    """
    command = [sys.executable, "-m", "jmx8.kernels.flashinfer.build", module.name, arch]
    command += [] if jobs is None else [str(jobs)]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if run.returncode != 0:
        reason = run.stdout.strip() or "see what the build printed"
        raise RuntimeError(f"cannot build FlashInfer's {module.name}: {reason}")
    return cached_path(module, arch)


def diagnose(capability: Capability) -> list[dict[str, Any]]:
    """Returns, for each module that a device can use, where it is or what it lacks.

    Each has the keys "module", "arch", "path", "problem", and "seconds" and "nvcc" of
    its build; what does not apply is None.
    """
    arch = arch_of(capability)
    rows = []
    for module in MODULES:
        if capability not in module.capabilities:
            continue
        path = find(module, arch)
        record = path.with_suffix(".json") if path else None
        facts = json.loads(record.read_text()) if record and record.exists() else {}
        rows.append(
            {
                "module": module.name,
                "arch": arch,
                "path": path and str(path),
                "problem": unavailable(module, capability),
                "seconds": facts.get("seconds"),
                "nvcc": facts.get("nvcc"),
            }
        )
    return rows


def _buildable(module: Module) -> Buildable:
    return Buildable(
        name=module.name,
        capabilities=module.capabilities,
        find=functools.partial(find, module),
        build=functools.partial(build, module),
        # It comes with thousands of files from the network, and the MoE that the
        # ops prefer does without it.
        by_default=module in OPS and not module.cubins,
    )


BUILDABLES = tuple(_buildable(module) for module in MODULES)

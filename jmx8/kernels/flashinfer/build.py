"""Builds one of FlashInfer's modules: `python -m jmx8.kernels.flashinfer.build`.

The only file that imports FlashInfer, and with it torch. It runs in a process of its
own, since FlashInfer reads its configuration from the environment when it is imported.
The reason of a failure goes to stdout, what the tools print to stderr.
"""

import concurrent.futures
import importlib
import itertools
import json
import os
import pathlib
import re
import shutil
import sys
import tempfile
import time
from typing import Any

from .. import _toolchain
from .._cache import cache_folder, make_once, write_whole
from ._version import TESTED, version_problem
from .cubins import cubin_folder, HOW_TO_FETCH
from .modules import cached_path, Module, MODULES


class BuildError(Exception):
    """A build cannot succeed; the message says what is missing and who has it."""


def main(name: str, arch: str, jobs: str | None = None) -> None:
    """Builds module `name` for `arch` into the cache, unless it is there."""
    module = next(m for m in MODULES if m.name == name)
    path = cached_path(module, arch)
    try:
        with tempfile.TemporaryDirectory() as folder:
            make = lambda p: _build(module, arch, jobs, pathlib.Path(folder), p)
            make_once(path, make)
    except BuildError as error:
        print(error)
        sys.exit(1)


def _build(
    module: Module,
    arch: str,
    jobs: str | None,
    folder: pathlib.Path,
    target: pathlib.Path,
) -> None:
    if problem := version_problem() or _toolchain.missing_tool():
        raise BuildError(problem)
    home = _toolchain.cuda_home()
    assert home is not None
    _check_headers(module, home)
    _set_environment(arch, jobs, home, folder)

    from flashinfer.jit.cpp_ext import get_cuda_version  # pyright: ignore

    start = time.perf_counter()
    if module.cubins:
        _check_artifacts(module)
    spec = _generate(module)
    _compile(module, arch, spec)
    if module.cubins:
        _fetch_cubins()
    shutil.copyfile(spec.jit_library_path, target)
    facts = {
        "flashinfer": TESTED,
        "arch": arch,
        "nvcc": str(get_cuda_version()),
        "seconds": round(time.perf_counter() - start, 1),
    }
    write_whole(
        cached_path(module, arch).with_suffix(".json"), json.dumps(facts).encode()
    )
    # Objects are kept until here, so that a build that was stopped goes on.
    shutil.rmtree(spec.build_dir)


def _check_headers(module: Module, home: pathlib.Path) -> None:
    missing = _toolchain.missing_headers(module.headers, home)
    if missing:
        wheels = {_toolchain.wheel_with(header) for header in missing}
        raise BuildError(
            f"{', '.join(missing)} is neither in the CUDA toolkit {home} nor in an "
            f"installed package: `pip install {' '.join(sorted(map(str, wheels)))}`, "
            "or jmx8[build], which has all that there is"
        )


def _set_environment(
    arch: str, jobs: str | None, home: pathlib.Path, folder: pathlib.Path
) -> None:
    """Sets what FlashInfer reads; what the user has set for its flags stays in it."""
    os.environ["PATH"] = _toolchain.search_path()
    os.environ["CUDA_HOME"] = str(home)
    os.environ["FLASHINFER_CUDA_ARCH_LIST"] = arch
    os.environ["FLASHINFER_CUBIN_DIR"] = str(cubin_folder())
    os.environ["FLASHINFER_WORKSPACE_BASE"] = str(cache_folder("flashinfer", "build"))
    if jobs is not None:
        os.environ["MAX_JOBS"] = jobs
    # Wheels come last, so that a toolkit's own headers are not mixed with others.
    includes = [f"-isystem {path}" for path in _toolchain.wheel_folders("include")]
    links = _supply_libraries(folder, home)
    for variable, added in (
        ("FLASHINFER_EXTRA_CFLAGS", includes),
        ("FLASHINFER_EXTRA_CUDAFLAGS", includes),
        ("FLASHINFER_EXTRA_LDFLAGS", links),
    ):
        os.environ[variable] = " ".join([os.environ.get(variable, ""), *added])


def _supply_libraries(folder: pathlib.Path, home: pathlib.Path) -> list[str]:
    """Returns linker flags; fills a folder with what the linker does not find."""
    flags = [f"-L{home / 'lib64'}", f"-L{home / 'lib64/stubs'}"]
    for name in ("cudart", "nvrtc"):
        # Wheels have the libraries without the names that a linker looks for.
        wheels = [p.glob(f"lib{name}.so.*") for p in _toolchain.wheel_folders("lib")]
        library = next(itertools.chain.from_iterable(wheels), None)
        if library is not None and not _toolchain.linker_finds(name, *flags):
            (folder / f"lib{name}.so").symlink_to(library)
    if not _toolchain.linker_finds("cuda", *flags):
        # FlashInfer names it for every module, whether it calls the driver or not. An
        # empty archive leaves no trace in what is linked.
        (folder / "libcuda.a").write_bytes(b"!<arch>\n")
    return [f"-L{folder}"]


def _generate(module: Module) -> Any:
    package, _, function = module.generator.partition(":")
    return getattr(importlib.import_module(package), function)(*module.arguments)


def _compile(module: Module, arch: str, spec: Any) -> None:
    try:
        spec.build()
    except RuntimeError as error:
        # FlashInfer puts everything that ninja printed into the message.
        print(error, file=sys.stderr)
        reason = f"the compilation for {arch} failed, see ninja's output above"
        header = re.search(r"fatal error: (\S+): No such file", str(error))
        if header is not None:
            wheel = _toolchain.wheel_with(header[1])
            reason = f"the header {header[1]} is missing" + (
                f": `pip install {wheel}`" if wheel else ", see ninja's output above"
            )
        raise BuildError(reason) from error


def _artifact(file: str) -> str:
    from flashinfer.artifacts import ArtifactPath, safe_urljoin  # pyright: ignore

    return safe_urljoin(ArtifactPath.TRTLLM_GEN_BMM, file)


def _check_artifacts(module: Module) -> None:
    """Fails at once if headers are missing and cannot be fetched, not after minutes."""
    from flashinfer.jit import cubin_loader, fused_moe  # pyright: ignore

    files = ["checksums.txt", "include/flashinferMetaInfo.h"]
    exports = "include/trtllmGen_bmm_export"
    files += [f"{exports}/{header}" for header in fused_moe.BMM_EXPORT_HEADERS]
    folder = cubin_folder()
    missing = [f for f in files if not (folder / _artifact(f)).exists()]
    if not missing:
        return
    path = folder / _artifact(missing[0])
    source = cubin_loader.FLASHINFER_CUBINS_REPOSITORY
    if not os.environ.get("FLASHINFER_NO_DOWNLOAD"):
        path.parent.mkdir(parents=True, exist_ok=True)
        url = cubin_loader.safe_urljoin(source, _artifact(missing[0]))
        if cubin_loader.download_file(url, str(path), retries=1, timeout=5):
            return
    raise BuildError(
        f"{path} is missing, which {module.name} is built with, and was not fetched "
        f"from {source}: {HOW_TO_FETCH}"
    )


def _fetch_cubins() -> None:
    """Fetches every cubin that the module can ask for, through FlashInfer's loader."""
    from flashinfer.artifacts import CheckSumHash  # pyright: ignore
    from flashinfer.jit.cubin_loader import get_artifact  # pyright: ignore

    manifest = get_artifact(_artifact("checksums.txt"), CheckSumHash.TRTLLM_GEN_BMM)
    lines = [line.split() for line in manifest.decode().splitlines()]
    wanted = [(name, sha256) for sha256, name in lines if name.endswith(".cubin")]
    fetch = lambda entry: get_artifact(_artifact(entry[0]), entry[1])
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for (name, _), data in zip(wanted, pool.map(fetch, wanted), strict=True):
            if not data:
                raise BuildError(f"{name} was not fetched: {HOW_TO_FETCH}")


if __name__ == "__main__":
    main(*sys.argv[1:])

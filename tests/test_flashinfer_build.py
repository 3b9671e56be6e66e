"""Builds FlashInfer's smallest module, and fails in all the ways that builds do."""

import dataclasses
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import textwrap
import time

import pytest

from jmx8.cli._build_kernels import build_kernels
from jmx8.kernels import _toolchain
from jmx8.kernels.flashinfer import build, modules
from jmx8.kernels.flashinfer._version import installed_version, version_problem


if installed_version() is None or _toolchain.missing_tool() is not None:
    reason = f"cannot build: {version_problem() or _toolchain.missing_tool()}"
    pytest.skip(reason, allow_module_level=True)


def run(arguments: list[str], **environment: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {name: str(value) for name, value in environment.items()},
        capture_output=True,
        text=True,
    )


def run_code(code: str, **environment: object) -> subprocess.CompletedProcess:
    return run(["-c", textwrap.dedent(code)], **environment)


def run_build(module: modules.Module, arch: str, **environment: object):
    command = ["-m", "jmx8.kernels.flashinfer.build", module.name, arch]
    return run(command, **environment)


def test_flashinfer_is_the_version_that_jmx8_is_for():
    assert version_problem() is None


_GENERATE_ALL = """
    import json
    from jmx8.kernels.flashinfer import build
    from jmx8.kernels.flashinfer.modules import MODULES

    specs = {m.name: build._generate(m).name for m in MODULES if not m.cubins}
    print(json.dumps(specs))
"""


def test_every_generator_makes_the_module_of_that_name(tmp_path):
    process = run_code(
        _GENERATE_ALL,
        FLASHINFER_WORKSPACE_BASE=tmp_path,
        FLASHINFER_CUDA_ARCH_LIST="10.0a 10.3a 12.0f",
    )
    assert process.returncode == 0, process.stderr
    specs = json.loads(process.stdout.splitlines()[-1])
    assert len(specs) == 9
    assert all(name == generated for name, generated in specs.items())


_LOAD = """
    import sys

    sys.modules["torch"] = None  # tvm_ffi imports it if it can; jmx8 never does.
    from jmx8.kernels.flashinfer.modules import load, SILU_AND_MUL

    print(load(SILU_AND_MUL, (9, 0))["silu_and_mul"])
    assert load(SILU_AND_MUL, (9, 0)) is load(SILU_AND_MUL, (9, 0))
    assert "flashinfer" not in sys.modules
"""


def test_built_ahead_and_loaded_without_torch_and_flashinfer(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("JMX8_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("FLASHINFER_WORKSPACE_BASE", str(tmp_path / "flashinfer-home"))
    # Flags of the user's are added to, and not replaced.
    monkeypatch.setenv("FLASHINFER_EXTRA_CUDAFLAGS", "-DJMX8_TEST")
    name = modules.SILU_AND_MUL.name
    assert build_kernels("9.0", [name]) == 0, capsys.readouterr().err
    path = modules.cached_path(modules.SILU_AND_MUL, "9.0a")
    assert "9.0a  built in" in capsys.readouterr().out
    facts = json.loads(path.with_suffix(".json").read_text())
    assert facts["seconds"] > 0
    assert facts["arch"] == "9.0a"
    assert list(tmp_path.rglob("*.o")) == []

    assert build_kernels("9.0", [name]) == 0
    assert f"already built  {path}" in capsys.readouterr().out
    process = run_code(_LOAD)
    assert process.returncode == 0, process.stderr
    assert "ffi.Function" in process.stdout


def test_what_the_compiler_says_reaches_the_user(tmp_path):
    process = run_build(
        modules.SILU_AND_MUL,
        "9.0a",
        JMX8_CACHE_DIR=tmp_path,
        FLASHINFER_EXTRA_CUDAFLAGS="-include curand_of_nobody.h",
    )
    assert process.returncode == 1
    assert "fatal error: curand_of_nobody.h" in process.stderr
    assert process.stdout == (
        "the header curand_of_nobody.h is missing: `pip install nvidia-curand`\n"
    )
    assert list(tmp_path.rglob("*.so")) == []


def test_missing_headers_are_named_before_anything_is_compiled():
    module = dataclasses.replace(
        modules.NORM, headers=("cublas_of_nobody.h", "cuda_runtime.h", "nvrtc_no.h")
    )
    home = _toolchain.cuda_home()
    assert home is not None
    with pytest.raises(build.BuildError) as caught:
        build._check_headers(module, home)
    assert "cublas_of_nobody.h, nvrtc_no.h is neither in the CUDA" in str(caught.value)
    assert "`pip install nvidia-cublas nvidia-cuda-nvrtc`" in str(caught.value)


def test_headers_of_wheels_are_found(tmp_path, monkeypatch):
    folder = tmp_path / "nvidia/cu13/include"
    folder.mkdir(parents=True)
    (folder / "cublas_of_somebody.h").touch()
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    home = pathlib.Path("/nowhere")
    assert _toolchain.missing_headers(("cublas_of_somebody.h",), home) == []


def test_libraries_that_the_linker_lacks_are_supplied(tmp_path, monkeypatch):
    library = tmp_path / "nvidia/cu13/lib/libnvrtc.so.13"
    library.parent.mkdir(parents=True)
    (source := tmp_path / "empty.c").touch()
    subprocess.run(["cc", "-shared", str(source), "-o", str(library)], check=True)
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    (folder := tmp_path / "links").mkdir()
    flags = build._supply_libraries(folder, pathlib.Path("/nowhere"))
    assert _toolchain.linker_finds("nvrtc", *flags)
    assert _toolchain.linker_finds("cuda", *flags)
    assert not _toolchain.linker_finds("jmx8_nowhere", *flags)


@pytest.mark.parametrize("flag", [{}, {"FLASHINFER_NO_DOWNLOAD": 1}])
def test_without_network_trtllm_fails_at_once_and_says_what_to_fetch(flag, tmp_path):
    # Its headers would be missed first where no wheel has them.
    wheel = tmp_path / "wheel/nvidia/cu13/include"
    wheel.mkdir(parents=True)
    for header in modules.TRTLLM_MOE.headers:
        (wheel / header).touch()
    start = time.monotonic()
    process = run_build(
        modules.TRTLLM_MOE,
        "10.0a",
        PYTHONPATH=tmp_path / "wheel",
        JMX8_CACHE_DIR=tmp_path / "cache",
        FLASHINFER_CUBIN_DIR=tmp_path / "cubins",
        FLASHINFER_CUBINS_REPOSITORY="http://127.0.0.1:9/",
        **flag,
    )
    assert time.monotonic() - start < 40
    assert process.returncode == 1
    assert process.stdout.count("\n") == 1
    assert f"{tmp_path / 'cubins'}" in process.stdout
    assert "checksums.txt is missing" in process.stdout
    for what in ("flashinfer download-cubin", "http://127.0.0.1:9/"):
        assert what in process.stdout


_FETCH = """
    import hashlib, pathlib
    from flashinfer.artifacts import CheckSumHash
    from jmx8.kernels.flashinfer import build, modules

    manifest = pathlib.Path({manifest!r}).read_bytes()
    CheckSumHash.TRTLLM_GEN_BMM = hashlib.sha256(manifest).hexdigest()
    build._check_artifacts(modules.TRTLLM_MOE)
    build._fetch_cubins()
"""


def test_trtllm_cubins_are_fetched_by_flashinfers_loader(tmp_path):
    where = run_code(
        """
        from jmx8.kernels.flashinfer.build import _artifact
        print(_artifact(""))
        """,
        FLASHINFER_WORKSPACE_BASE=tmp_path,
    ).stdout.splitlines()[-1]
    published = tmp_path / "published" / where
    published.mkdir(parents=True)
    (published / "one.cubin").write_bytes(b"\x7fELF one")
    digest = hashlib.sha256(b"\x7fELF one").hexdigest()
    manifest = published / "checksums.txt"
    manifest.write_text(f"{digest} one.cubin\n{digest} include/some.h\n")
    environment = {
        "FLASHINFER_WORKSPACE_BASE": tmp_path,
        "FLASHINFER_CUBIN_DIR": tmp_path / "cubins",
        "FLASHINFER_CUBINS_REPOSITORY": tmp_path / "published",
    }
    code = _FETCH.format(manifest=str(manifest))
    process = run_code(code, **environment)
    assert process.returncode == 0, process.stderr
    fetched = tmp_path / "cubins" / where / "one.cubin"
    assert fetched.read_bytes() == b"\x7fELF one"

    fetched.unlink()
    (published / "one.cubin").write_bytes(b"\x7fELF another")
    process = run_code(code.replace("build._check_artifacts", "print"), **environment)
    assert process.returncode == 1
    assert "one.cubin was not fetched" in process.stderr

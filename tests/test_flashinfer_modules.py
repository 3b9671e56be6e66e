"""Finding, refusing and loading FlashInfer's modules, with stand-ins for its files."""

import ctypes
import hashlib
import importlib.util
import pathlib
import shutil
import subprocess
import sys

import pytest

from jmx8.cli._build_kernels import build_kernels
from jmx8.kernels import _toolchain
from jmx8.kernels._buildable import Buildable
from jmx8.kernels.flashinfer import cubins, modules
from jmx8.kernels.flashinfer._version import TESTED, version_problem
from jmx8.kernels.flashinfer.modules import find, GEMM, QUANTIZATION, TRTLLM_MOE


SM100 = (10, 0)
needs_compiler = pytest.mark.skipif(
    shutil.which("cc") is None, reason="needs a C compiler"
)


def put(path: pathlib.Path, text: str = "") -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


class Machine:
    """A machine where jmx8's and FlashInfer's folders are empty."""

    def __init__(self, root: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
        self.root, self.site = root, root / "site"
        self._monkeypatch = monkeypatch
        self.site.mkdir()
        for name in ("flashinfer", "flashinfer_jit_cache", "nvidia"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.syspath_prepend(str(self.site))
        monkeypatch.setenv("JMX8_CACHE_DIR", str(root / "cache"))
        monkeypatch.setenv("FLASHINFER_WORKSPACE_BASE", str(root))
        monkeypatch.delenv("FLASHINFER_CUBIN_DIR", raising=False)
        modules._jit_cache.cache_clear()
        self.cubins = root / ".cache/flashinfer/cubins"

    def install(self, package: str, version: str, code: str = "") -> pathlib.Path:
        """Puts a package with metadata in front of whatever is installed."""
        folder = f"{package.replace('-', '_')}-{version}.dist-info"
        put(
            self.site / folder / "METADATA",
            f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n",
        )
        name = package.removesuffix("-python").replace("-", "_")
        return put(self.site / name / "__init__.py", code).parent

    def install_jit_cache(self, version: str, *architectures: str) -> pathlib.Path:
        folder = self.site / "jit"
        code = f"""
import types
__version__ = {version!r}
def get_jit_cache_providers():
    return [types.SimpleNamespace(version=__version__, jit_cache_dir={str(folder)!r},
                                  cuda_architectures={architectures!r})]
"""
        self.install("flashinfer-jit-cache", version, code)
        return put(folder / f"{GEMM.name}/{GEMM.name}.so")

    def remove_compiler(self) -> None:
        self._monkeypatch.delenv("CXX", raising=False)
        for variable in ("CUDA_HOME", "CUDA_PATH", "PATH"):
            self._monkeypatch.setenv(variable, "")
        self._monkeypatch.setattr(_toolchain, "_DEFAULT_HOME", str(self.root))
        self._monkeypatch.setattr(_toolchain, "wheel_folders", lambda name: [])


@pytest.fixture
def machine(tmp_path, monkeypatch):
    yield Machine(tmp_path, monkeypatch)
    modules._jit_cache.cache_clear()


def test_find_prefers_ours_then_flashinfers_packages_then_its_builds(machine):
    file = f"{GEMM.name}/{GEMM.name}.so"
    ours = put(machine.root / f"cache/flashinfer/{TESTED}/10.0a/{GEMM.name}.so")
    aot = put(machine.install("flashinfer-python", TESTED) / "data/aot" / file)
    jit_cache = machine.install_jit_cache(f"{TESTED}+cu130", "sm90a", "sm100a")
    builds = machine.root / f".cache/flashinfer/{TESTED}/100a_90a/cached_ops"
    built = put(builds / file)
    put(built.parent / ".ninja_log", f"1\t2\t3\t{built}\tabc\n")
    for expected in (ours, aot, jit_cache, built):
        assert find(GEMM, "10.0a") == expected
        expected.unlink()
    assert find(GEMM, "10.0a") is None


def test_a_build_that_ninja_has_not_finished_is_not_used(machine):
    folder = machine.root / f".cache/flashinfer/{TESTED}/100a/cached_ops/{GEMM.name}"
    put(folder / f"{GEMM.name}.so", "half")
    assert find(GEMM, "10.0a") is None
    put(folder / ".ninja_log", f"1\t2\t3\t{folder}/main.o\tabc\n")
    assert find(GEMM, "10.0a") is None


def test_builds_of_flashinfer_for_other_architectures_are_not_used(machine):
    folder = machine.root / f".cache/flashinfer/{TESTED}/103a_110a/cached_ops"
    path = put(folder / GEMM.name / f"{GEMM.name}.so")
    put(path.parent / ".ninja_log", f"1\t2\t3\t{path}\tabc\n")
    assert find(GEMM, "10.0a") is None
    assert find(GEMM, "10.3a") == path


@pytest.mark.parametrize(
    ("architecture", "arch", "runs"),
    [
        ("sm100a", "10.0a", True),
        ("sm100a", "10.3a", False),
        ("sm100f", "10.3a", True),
        ("sm103f", "10.0a", False),
        ("sm100f", "11.0a", False),
        ("sm120f", "12.1a", True),
        ("sm80", "8.9", True),
        ("unknown", "10.0a", False),
    ],
)
def test_jit_cache_is_used_on_devices_that_run_its_code(
    architecture, arch, runs, machine
):
    path = machine.install_jit_cache(TESTED, architecture)
    assert find(GEMM, arch) == (path if runs else None)


def test_jit_cache_of_another_version_is_not_used(machine):
    machine.install_jit_cache("0.7.1+cu130", "sm100a")
    assert find(GEMM, "10.0a") is None
    assert modules.jit_cache_problem() == (
        f"flashinfer-jit-cache is 0.7.1+cu130, which must be {TESTED}"
    )


def test_flashinfer_of_another_version_is_refused_by_name(machine):
    folder = machine.install("flashinfer-python", "0.9.0")
    put(folder / f"data/aot/{GEMM.name}/{GEMM.name}.so")
    assert find(GEMM, "10.0a") is None
    pytest.importorskip("tvm_ffi")
    problem = modules.unavailable(GEMM, SM100)
    assert problem is not None
    assert "FlashInfer 0.9.0 is installed" in problem
    assert f"pip install flashinfer-python=={TESTED}" in problem


def test_what_jmx8_built_outlives_another_version_of_flashinfer(machine):
    pytest.importorskip("tvm_ffi")
    machine.install("flashinfer-python", "0.9.0")
    put(modules.cached_path(GEMM, "10.0a"))
    assert modules.unavailable(GEMM, SM100) is None


@pytest.mark.parametrize("capability", [(9, 0), (8, 9), None])
def test_no_device_below_sm100_gets_the_quantizer_that_writes_nothing(
    capability, machine
):
    for arch in ("8.9", "9.0a", "10.0a"):
        put(modules.cached_path(QUANTIZATION, arch))
    problem = modules.unavailable(QUANTIZATION, capability)
    assert problem is not None
    assert "is for compute capability 10.0, 10.3, 11.0, 12.0, 12.1" in problem
    with pytest.raises(RuntimeError, match="is for compute capability"):
        modules.load(QUANTIZATION, capability)


def test_without_a_compiler_the_reason_says_how_to_build_elsewhere(machine):
    pytest.importorskip("tvm_ffi")
    machine.install("flashinfer-python", TESTED)
    machine.remove_compiler()
    problem = modules.unavailable(GEMM, SM100)
    assert problem is not None
    assert "there is no CUDA toolkit with nvcc" in problem
    assert "`jmx8 build-kernels --arch 10.0a --module mxfp8_gemm_cutlass`" in problem
    with pytest.raises(RuntimeError, match="no CUDA toolkit"):
        modules.load(GEMM, SM100)


@pytest.mark.parametrize("package", ["tvm_ffi", "jax_tvm_ffi"])
def test_without_the_bridge_the_reason_says_so(machine, monkeypatch, package):
    put(modules.cached_path(GEMM, "10.0a"))
    find_spec = importlib.util.find_spec
    missing = lambda name: None if name == package else find_spec(name)
    monkeypatch.setattr(importlib.util, "find_spec", missing)
    problem = modules.unavailable(GEMM, SM100)
    assert problem is not None and "pip install jmx8[cuda]" in problem
    assert problem.startswith(("tvm_ffi is not", "jax_tvm_ffi is not"))


def test_without_a_compiler_for_the_adapter_the_reason_says_so(machine):
    pytest.importorskip("jax_tvm_ffi")
    put(modules.cached_path(GEMM, "10.0a"))
    machine.remove_compiler()
    problem = modules.unavailable(GEMM, SM100)
    assert problem is not None and "there is no C++ compiler" in problem


def test_trtllm_needs_cubins_whether_it_is_built_or_not(machine):
    pytest.importorskip("tvm_ffi")
    put(modules.cached_path(TRTLLM_MOE, "10.0a"))
    problem = modules.unavailable(TRTLLM_MOE, SM100)
    assert problem is not None
    assert f"there are no cubins in {machine.cubins}" in problem
    assert "flashinfer download-cubin" in problem
    put(machine.cubins / "abc/batched_gemm-1-2/Bmm_sm100f.cubin")
    assert modules.unavailable(TRTLLM_MOE, SM100) is None


@pytest.mark.parametrize(
    ("capability", "arch"),
    [((8, 9), "8.9"), ((9, 0), "9.0a"), ((10, 3), "10.3a"), ((12, 0), "12.0f")],
)
def test_architectures(capability, arch):
    assert modules.arch_of(capability) == arch
    assert modules.parse_arch(arch) == capability
    assert modules.parse_arch(arch.rstrip("af")) == capability


@pytest.mark.parametrize("text", ["", "sm100", "10", "10.0b", "10.0a 9.0a"])
def test_bad_architecture(text):
    with pytest.raises(ValueError, match=r"expected one like 10\.0a"):
        modules.parse_arch(text)


def test_diagnose_tells_where_and_how_long(machine):
    path = put(modules.cached_path(GEMM, "10.0a"))
    put(path.with_suffix(".json"), '{"seconds": 600.5, "nvcc": "13.0"}')
    rows = {row["module"]: row for row in modules.diagnose(SM100)}
    assert rows[GEMM.name]["path"] == str(path)
    assert (rows[GEMM.name]["seconds"], rows[GEMM.name]["nvcc"]) == (600.5, "13.0")
    assert rows[QUANTIZATION.name]["path"] is None
    assert modules.GEMM_SM120.name not in rows


def test_missing_flashinfer_is_a_reason(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    assert version_problem() == (
        f"FlashInfer is not installed: `pip install flashinfer-python=={TESTED}`"
    )


# Shared libraries.


def compile_library(path: pathlib.Path, code: str, *flags: str) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    source = put(path.with_suffix(".c"), code)
    command = ["cc", "-shared", "-fPIC", str(source), "-o", str(path), *flags]
    subprocess.run(command, check=True)
    return path


@needs_compiler
def test_libraries_of_nvidias_wheels_are_found(machine):
    name = "libjmx8_needed.so.13"
    needed = compile_library(
        machine.site / "nvidia/cu13/lib" / name,
        "int answer(void) { return 42; }",
        f"-Wl,-soname,{name}",
    )
    user = compile_library(
        machine.root / "user.so",
        "int answer(void); int ask(void) { return answer(); }",
        str(needed),
    )
    with pytest.raises(OSError, match=name):
        ctypes.CDLL(str(user))
    modules.preload_libraries(user)
    assert ctypes.CDLL(str(user)).ask() == 42


@needs_compiler
def test_library_that_is_nowhere_is_named(machine):
    name = "libjmx8_nowhere.so.1"
    code = "int nowhere(void) { return 1; }"
    needed = compile_library(machine.root / name, code, f"-Wl,-soname,{name}")
    user = compile_library(
        machine.root / "user.so",
        "int nowhere(void); int ask(void) { return nowhere(); }",
        str(needed),
    )
    with pytest.raises(OSError, match=name):
        modules.preload_libraries(user)


_CUBIN_USER = """
#include <string.h>
static void (*callback)(const char*, const char*);
static char current[64];
static int current_size = -1;
void FlashInferSetCubinCallback(void (*f)(const char*, const char*)) { callback = f; }
void FlashInferSetCurrentCubin(const char* data, int size) {
  memcpy(current, data, size);
  current_size = size;
}
int ask(const char* name, const char* sha256, char* out) {
  callback(name, sha256);
  memcpy(out, current, current_size);
  return current_size;
}
"""


@needs_compiler
def test_cubins_are_served_if_their_checksum_is_right(machine, caplog):
    library = compile_library(machine.root / "cubins.so", _CUBIN_USER)
    data = b"\x7fELF\0\0binary\0"
    (machine.cubins / "a").mkdir(parents=True)
    (machine.cubins / "a/right.cubin").write_bytes(data)
    (machine.cubins / "a/wrong.cubin").write_bytes(data + b"!")
    cubins.serve_cubins(library)
    buffer = ctypes.create_string_buffer(64)

    def ask(name: str) -> bytes:
        digest = hashlib.sha256(data).hexdigest().encode()
        size = ctypes.CDLL(str(library)).ask(name.encode(), digest, buffer)
        return buffer.raw[:size]

    assert ask("a/right.cubin") == data
    assert caplog.text == ""
    # Nothing, and not the cubin before.
    assert ask("a/wrong.cubin") == b""
    assert "has SHA-256" in caplog.text
    assert ask("a/missing.cubin") == b""
    assert "flashinfer download-cubin" in caplog.text


# The command.


class Fake:
    """Something to build that is not, until it is."""

    def __init__(self, name: str, *, fails: bool = False, by_default: bool = True):
        self.built: list[tuple[str, int | None]] = []
        self._fails = fails
        self.buildable = Buildable(
            name, (SM100, (12, 0)), self._find, self._build, by_default
        )

    def _find(self, arch):
        return pathlib.Path("/there") if self.built else None

    def _build(self, arch, jobs):
        if self._fails:
            raise RuntimeError("a [header] is missing")
        self.built.append((arch, jobs))
        return pathlib.Path("/there")


def test_build_kernels_builds_once_and_goes_on_after_a_failure(capsys):
    first, broken = Fake("first"), Fake("broken", fails=True)
    last, rare = Fake("last"), Fake("rare", by_default=False)
    everything = [fake.buildable for fake in (first, broken, last, rare)]
    assert build_kernels("10.0", jobs=3, buildables=everything) == 1
    output = capsys.readouterr()
    assert first.built == last.built == [("10.0a", 3)]
    assert rare.built == []
    assert "first   10.0a  built in 0 s  /there" in output.out
    assert "broken  10.0a  not built: a [header] is missing" in output.err
    assert build_kernels("10.0a", ["first"], buildables=everything) == 0
    assert "already built" in capsys.readouterr().out
    assert build_kernels("12.0", ["rare"], buildables=everything) == 0
    assert rare.built == [("12.0f", None)]


def test_build_kernels_names_what_there_is():
    everything = [Fake("first").buildable]
    with pytest.raises(ValueError, match=r"frist cannot be built.*any of first"):
        build_kernels("10.0a", ["frist"], buildables=everything)
    with pytest.raises(ValueError, match=r"no op of jmx8 uses a kernel.*for 9\.0a"):
        build_kernels("9.0a", buildables=everything)

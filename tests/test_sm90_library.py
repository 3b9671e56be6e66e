"""Building and finding the Hopper kernels' library, where nvcc takes no time."""

import json
import pathlib
import shutil
import subprocess
import sys
import textwrap

import pytest

from jmx8 import _device
from jmx8.cli._build_kernels import build_kernels
from jmx8.cli._doctor import _library_answer
from jmx8.kernels import _toolchain
from jmx8.kernels.sm90 import _build, library


needs_bridge = pytest.mark.skipif(
    library.adapter_unavailable() is not None, reason=f"{library.adapter_unavailable()}"
)


_NVCC = """
    #!{python}
    import pathlib, sys, time

    arguments = sys.argv[1:]
    if arguments == ["--version"]:
        print("Cuda compilation tools, release {release}, V{release}.88")
        sys.exit()
    with open({log!r}, "a") as log:
        log.write(" ".join(arguments) + "\\n")
    source = next((a for a in arguments if a.endswith(".cu")), None)
    if source and "#error" in pathlib.Path(source).read_text():
        sys.exit("fatal error: it is Sunday")
    time.sleep(0.3)
    if source:
        print("Compiling entry function '_Z4copyPf' for 'sm_90a'")
        print("0 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads")
        print("Used 24 registers")
    pathlib.Path(arguments[arguments.index("-o") + 1]).write_text("built")
"""


class Place:
    """A cache, sources, and a CUDA toolkit that is the only one there is."""

    def __init__(self, folder: pathlib.Path, monkeypatch):
        self.cache, self.home = folder / "cache", folder / "cuda"
        self.csrc, self.log = folder / "csrc", folder / "log"
        self._monkeypatch = monkeypatch
        monkeypatch.setenv("JMX8_CACHE_DIR", str(self.cache))
        monkeypatch.setenv("CUDA_HOME", str(self.home))
        monkeypatch.delenv("CUDA_PATH", raising=False)
        monkeypatch.setattr(_toolchain, "_DEFAULT_HOME", str(folder / "nowhere"))
        monkeypatch.setattr(_toolchain, "wheel_folders", lambda name: [])
        monkeypatch.setattr(_toolchain, "compiler", lambda: "/usr/bin/g++")
        monkeypatch.setattr(_build, "_CSRC", self.csrc)
        monkeypatch.setattr(_build, "_tvm_ffi_version", lambda: "0.1.15")
        monkeypatch.setattr(_build, "PREBUILT", folder / "_prebuilt/sm90.so")
        (self.home / "include/crt").mkdir(parents=True)
        (self.home / "include/crt/host_config.h").touch()
        (self.home / "include/cuda_runtime.h").touch()
        self.csrc.mkdir()
        (self.csrc / "copy.cu").write_text("#include <cuda_runtime.h>\n")
        self.set_nvcc("13.0")

    def set_nvcc(self, release: str):
        nvcc = self.home / "bin/nvcc"
        nvcc.parent.mkdir(exist_ok=True)
        text = textwrap.dedent(_NVCC).lstrip()
        values = {"python": sys.executable, "release": release, "log": str(self.log)}
        nvcc.write_text(text.format(**values))
        nvcc.chmod(0o755)
        _build._ask_version.cache_clear()

    def remove_nvcc(self):
        self._monkeypatch.setenv("PATH", "")
        shutil.rmtree(self.home)
        _build._ask_version.cache_clear()

    def bring_prebuilt(self):
        """Puts what is built into the wheel, and empties the cache."""
        built = _build.build()
        _build.PREBUILT.parent.mkdir()
        for suffix in (".so", ".json"):
            target = _build.PREBUILT.with_suffix(suffix)
            shutil.copyfile(built.with_suffix(suffix), target)
        shutil.rmtree(self.cache)


@pytest.fixture
def place(tmp_path, monkeypatch):
    yield Place(tmp_path, monkeypatch)
    _build._ask_version.cache_clear()


def test_built_once_and_recorded(place):
    assert _build.find() is None and _build.unbuildable() is None
    path = _build.build(jobs=1)
    assert path.is_relative_to(place.cache) and path.read_text() == "built"
    assert _build.find() == path == _build.build()
    lines = place.log.read_text().splitlines()
    assert [line.split()[-1] for line in lines][1] != str(path)  # whole or not at all
    assert len(lines) == 2 and "sm_90a" in lines[0] and " -shared " in lines[1]
    facts = _build.record(path)
    assert facts["nvcc"] == "13.0.88" and facts["seconds"] > 0.5
    usage = {"registers": 24, "spilled": 12, "serialized": False}
    assert facts["kernels"] == {"_Z4copyPf": usage}


def test_serialized_multiplications_are_recorded():
    log = """
    ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are
     serialized due to insufficient register resources in the function '_Z4slowPf'
    ptxas info    : Compiling entry function '_Z4slowPf' for 'sm_90a'
        0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
    ptxas info    : Used 90 registers
    ptxas info    : Compiling entry function '_Z4copyPf' for 'sm_90a'
        0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
    ptxas info    : Used 24 registers
    """.replace("are\n    ", "are")
    serialized = {k: v["serialized"] for k, v in _build.parse_usage(log).items()}
    assert serialized == {"_Z4slowPf": True, "_Z4copyPf": False}


def test_built_again_for_other_sources_flags_and_versions(place, monkeypatch):
    def change_source():
        (place.csrc / "copy.cu").write_text("#include <cuda_runtime.h>\n//")

    paths = [_build.build()]
    for change in (
        change_source,
        lambda: (place.csrc / "new.cuh").touch(),
        lambda: monkeypatch.setattr(_build, "_FLAGS", (*_build._FLAGS, "-g")),
        lambda: monkeypatch.setattr(_build, "_tvm_ffi_version", lambda: "0.1.16"),
        lambda: place.set_nvcc("13.1"),
    ):
        change()
        assert _build.find() is None
        paths.append(_build.build())
    assert len(set(paths)) == 6


_BUILD = """
    import pathlib
    from jmx8.kernels.sm90 import _build

    _build._CSRC = pathlib.Path({csrc!r})
    _build._tvm_ffi_version = lambda: "0.1.15"
    print(_build.build().read_text())
"""


@needs_bridge
def test_many_processes_build_it_once(place):
    code = textwrap.dedent(_BUILD.format(csrc=str(place.csrc)))
    command = [sys.executable, "-c", code]
    start = lambda: subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    outputs = [process.communicate()[0] for process in [start(), start(), start()]]
    assert outputs == ["built\n"] * 3
    assert len(place.log.read_text().splitlines()) == 2


def test_failed_build_tells_what_the_compiler_said_and_leaves_nothing(place):
    (place.csrc / "copy.cu").write_text("#error\n")
    with pytest.raises(RuntimeError, match=r"(?s)not compile: .*nvcc.*it is Sunday"):
        _build.build()
    assert list(place.cache.rglob("*.so")) == []


def doctor() -> str:
    return _library_answer(library.diagnose())


def on(monkeypatch, capability):
    monkeypatch.setattr(_device, "compute_capability", lambda: capability)
    monkeypatch.setattr(library, "adapter_unavailable", lambda: None)


def test_what_is_missing_is_named(place, monkeypatch):
    on(monkeypatch, (9, 0))
    assert library.why_not_here() is None
    (place.csrc / "copy.cu").write_text("#include <cuda_nobody.h>\n")
    missing = f"cuda_nobody.h is neither in the CUDA toolkit {place.home}"
    assert missing in str(library.why_not_here())
    place.set_nvcc("12.4")
    assert "nvcc must be 12.5 or newer, and" in str(library.why_not_here())
    monkeypatch.setattr(_toolchain, "compiler", lambda: None)
    assert "there is no C++ compiler: install g++" in str(library.why_not_here())
    place.remove_nvcc()
    assert library.why_not_here() == (
        "jmx8's own kernels are not built (there is no CUDA toolkit with nvcc: set "
        "CUDA_HOME, or `pip install jmx8[build]`); build them ahead with "
        "`jmx8 build-kernels --arch 9.0a --module sm90`"
    )
    with pytest.raises(RuntimeError, match="cannot be built: there is no CUDA toolkit"):
        _build.build()
    assert "no: there is no CUDA toolkit" in doctor()


def test_without_nvcc_what_another_built_is_used(place, monkeypatch):
    on(monkeypatch, (9, 0))
    path = _build.build()
    place.remove_nvcc()
    assert _build.find() == path
    assert library.why_not_here() is None


@pytest.mark.parametrize(
    ("capability", "words"),
    [
        ((8, 0), "of 8.0"),
        ((8, 9), "of 8.9"),
        ((10, 0), "of 10.0"),
        ((12, 0), "of 12.0"),
        (None, "not an NVIDIA GPU"),
    ],
)
def test_other_devices_do_not_get_them(capability, words, place, monkeypatch):
    _build.build()
    on(monkeypatch, capability)
    assert library.why_not_here() == (
        "jmx8's own kernels are compiled for compute capability 9.0 alone, and this "
        f"device is {words}"
    )


def test_prebuilt_is_used_where_it_fits_and_only_there(place, monkeypatch):
    place.bring_prebuilt()
    assert _build.find() == _build.PREBUILT
    assert doctor().startswith("from the wheel, built in 1 s")
    monkeypatch.setattr(_build, "_tvm_ffi_version", lambda: "0.1.99")
    assert _build.find() == _build.PREBUILT
    monkeypatch.setattr(_build, "_tvm_ffi_version", lambda: "0.2.0")
    assert _build.find() is None
    assert "sm90.so is for tvm-ffi 0.1.15, and there is 0.2.0" in doctor()
    monkeypatch.setattr(_build, "_tvm_ffi_version", lambda: "0.1.15")
    (place.csrc / "copy.cu").write_text("#include <cuda_runtime.h>\n//")
    assert _build.find() is None
    text = doctor()
    assert "compiled at the first call; " in text
    assert "sm90.so was built from other sources" in text


def test_build_kernels_builds_it_ahead_and_doctor_says_how_long_it_took(place, capsys):
    assert build_kernels("9.0", ["sm90"]) == 0
    path = _build.find()
    assert f"sm90  9.0a  built in 1 s  {path}" in capsys.readouterr().out
    assert build_kernels("9.0") == 0
    assert f"already built  {path}" in capsys.readouterr().out
    assert json.loads(json.dumps(library.diagnose()))["path"] == str(path)
    assert doctor() == f"built in 1 s by nvcc 13.0.88, {path}"
    with pytest.raises(ValueError, match=r"sm90 cannot be built for 10\.0a"):
        build_kernels("10.0", ["sm90"])

"""Checks that imports inside jmx8 only point down the stack."""

import ast
import pathlib
import subprocess
import sys

import pytest


ROOT = pathlib.Path(__file__).parents[1] / "jmx8"
LAYERS = [
    "_lazy",
    "_mxfp8",
    "_options",
    "_text",
    "_types",
    "_device",
    "_numerics",
    "_mx_array",
    "_kernel_axes",
    "_unpacked",
    "kernels",
    "ops",
    "nn",
    "transform",
    "flax",
    "convert",
    "models",
    "generation",
    "checkpoint",
    "_api",
    "cli",
]
# Optional dependencies, which only some files may import, and only inside functions;
# and the interface libraries, which only the command line may.
CONFINED = {
    "flashinfer": ("kernels/flashinfer/build", "kernels/cutile/build"),
    "torch": ("kernels/flashinfer/build", "kernels/cutile/build"),
    "jax_tvm_ffi": ("kernels",),
    "tvm_ffi": ("kernels",),
    "cuda": ("kernels/cutile",),
    "transformers": (),
    "flax": ("flax", "models"),
    "optax": (),
    "safetensors": (),
    "rich": ("cli",),
    "typer": ("cli",),
    "tokenizers": ("cli",),
}


def imported_names(path: pathlib.Path):
    """Yields absolute dotted names of everything that the module imports."""
    package = ["jmx8", *path.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *(node.module or "").split(".")]
            yield from (".".join([*module, alias.name]) for alias in node.names)


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: p.name)
def test_imports_point_down(path):
    here = path.relative_to(ROOT)
    layer = here.parts[0].removesuffix(".py")
    for name in imported_names(path):
        top, *rest = (part for part in name.split(".") if part)
        if top in CONFINED:
            allowed = any(here.as_posix().startswith(p) for p in CONFINED[top])
            assert allowed, f"{here} imports {name}"
        if top == "jmx8" and rest and layer in LAYERS and rest[0] in LAYERS:
            assert LAYERS.index(rest[0]) <= LAYERS.index(layer), f"{here}: {name}"


def test_import_needs_no_optional_dependency():
    code = "import sys, jmx8; jmx8.load; jmx8.checkpoint.load; loaded = sys.modules; "
    code += f"print('jax' in loaded, [m for m in {[*CONFINED]} if m in loaded])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.stdout.strip() == "True []", out.stderr


@pytest.mark.parametrize("package", ["jmx8", "jmx8.checkpoint"])
def test_a_package_offers_the_names_of_its_api(package):
    """In a process of its own, before anything of the package is imported."""
    code = """if True:
        import importlib, sys
        package = importlib.import_module(sys.argv[1])
        before = set(vars(package))
        try:
            package.absent
        except AttributeError as error:
            print(error)
        names = set(dir(package))
        everything = {}
        exec(f"from {sys.argv[1]} import *", everything)
        api = importlib.import_module(f"{sys.argv[1]}._api")
        public = {name for name in vars(api) if not name.startswith("_")}
        assert public and public <= names and public <= everything.keys()
        assert not public & before
        assert all(getattr(package, name) is getattr(api, name) for name in public)
        # A submodule of the same name would take a name's place when it is imported.
        for name in public:
            module = sys.modules.get(f"{sys.argv[1]}.{name}")
            assert module is None or module is getattr(api, name), name
    """
    command = [sys.executable, "-c", code, package]
    out = subprocess.run(command, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert out.stdout == f"module {package!r} has no attribute 'absent'\n"

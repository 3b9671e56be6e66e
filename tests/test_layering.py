"""Checks that imports inside jmx8 only point down the stack."""

import ast
import pathlib
import subprocess
import sys

import pytest


ROOT = pathlib.Path(__file__).parents[1] / "jmx8"
LAYERS = [
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
    code = f"import sys, jmx8; print([m for m in {[*CONFINED]} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.stdout.strip() == "[]", out.stderr

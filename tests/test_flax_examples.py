import pathlib
import runpy

import jax
import pytest

from jmx8.convert._walk import walk

from .flax_helpers import count_calls, is_mx


EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize(
    "name, function, converted",
    [("flax_linen", "apply", "params"), ("flax_nnx", "run", "model")],
)
def test_example_runs_and_widens_no_weight(name, function, converted, capsys):
    path = EXAMPLES / f"{name}.py"
    assert len(path.read_text().splitlines()) < 60
    # Flax's norms promote bfloat16 to float32.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        _run(path, function, converted, capsys)


def _run(path, function, converted, capsys):
    made = runpy.run_path(str(path))
    assert "tensors converted to MXFP8" in capsys.readouterr().out

    args = made[converted], made["tokens"]
    weights = [leaf for leaf in walk(made[converted]) if is_mx(leaf.value)]
    assert count_calls(made[function], *args) == len(weights) > 0


def test_all_examples_of_flax_are_run():
    names = {path.stem for path in EXAMPLES.glob("flax_*.py")}
    assert names == {"flax_linen", "flax_nnx"}

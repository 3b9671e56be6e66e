"""The examples run; those of Flax are run by `test_flax_examples`."""

import pathlib
import runpy

import jax
import pytest

import jmx8

from .convert_helpers import is_mx
from .jaxprs import float_shapes


EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize(
    "name, arguments",
    [("equinox_module", ["x"]), ("plain_dict", ["converted", "tokens"])],
)
def test_example_runs_and_widens_no_weight(name, arguments, capsys):
    path = EXAMPLES / f"{name}.py"
    assert len(path.read_text().splitlines()) < 60
    made = runpy.run_path(str(path))
    assert "converted to MXFP8" in capsys.readouterr().out

    args = [made[argument] for argument in arguments]
    leaves = jax.tree.leaves(made["converted"], is_leaf=is_mx)
    weights = [leaf for leaf in leaves if is_mx(leaf)]
    # As stored or transposed, stacked or one layer of a stack.
    matrix = lambda shape: tuple(sorted(shape[-2:]))
    made_floats = {*map(matrix, float_shapes(made["function"], *args))}
    assert made_floats and made_floats.isdisjoint(matrix(w.shape) for w in weights)
    assert jmx8.explain(made["function"], *args).choices


def test_all_examples_are_run():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    names = {name for name in names if not name.startswith("flax_")}
    assert names == {"equinox_module", "plain_dict"}

import pathlib
import subprocess
import sys

import pytest


EXAMPLES = sorted((pathlib.Path(__file__).parents[1] / "examples").glob("flax_*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path):
    assert len(path.read_text().splitlines()) < 60
    command = [sys.executable, "-W", "error", str(path)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "tensors converted to MXFP8" in done.stdout


def test_there_is_one_for_each_of_flax_apis():
    assert [path.stem for path in EXAMPLES] == ["flax_linen", "flax_nnx"]

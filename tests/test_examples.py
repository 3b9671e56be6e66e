"""The examples run; those of Flax are run by `test_flax_examples`."""

import pathlib
import subprocess
import sys

import pytest


EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
OURS = sorted({*EXAMPLES.glob("*.py")} - {*EXAMPLES.glob("flax_*.py")})


@pytest.mark.parametrize("example", OURS, ids=lambda path: path.stem)
def test_example_runs(example):
    assert len(example.read_text().splitlines()) < 60
    command = [sys.executable, "-W", "error", str(example)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "mx_matmul" in result.stdout


def test_there_are_examples():
    assert len(OURS) == 2

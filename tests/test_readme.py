"""The README's Python runs as it stands; its shell commands are run by `.ci/run`."""

import re
import subprocess
import sys
from pathlib import Path

import pytest


README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("code", BLOCKS, ids=lambda code: code.splitlines()[0])
def test_code_block_runs(code):
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_first_example_is_short():
    assert BLOCKS and len(BLOCKS[0].splitlines()) <= 30

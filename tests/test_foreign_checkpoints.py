"""Checkpoints of other packages' quantizers are read to what those packages say."""

import functools
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch

from jmx8._mx_array import dequantize, MXArray
from jmx8.checkpoint import CheckpointError, load, open_folder
from jmx8.checkpoint._load import _leaves
from jmx8.checkpoint.formats import COMPRESSED_TENSORS, MODELOPT, TORCHAO

from .foreign_checkpoints import KEPT


pytestmark = pytest.mark.cpu  # what is written and read has nothing to do with devices

FORMATS = {
    "modelopt": MODELOPT,
    "compressed-tensors": COMPRESSED_TENSORS,
    "torchao": TORCHAO,
}
SUFFIXES = {"torchao": ("._weight_qdata", "._weight_scale")}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Returns the folder that a tool has written."""

    @functools.cache
    def write(tool):
        package = tool.replace("-", "_")
        pytest.importorskip(package, reason=f"{package} writes this checkpoint")
        folder = tmp_path_factory.mktemp(tool) / "checkpoint"
        result = subprocess.run(
            [sys.executable, "-m", "tests.foreign_checkpoints", tool, str(folder)],
            cwd=pathlib.Path(__file__).parents[1],
            env=os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, result.stderr[-2000:]
        return folder

    return write


@pytest.mark.parametrize("tool", FORMATS)
def test_what_a_quantizer_wrote_is_read_bit_for_bit(written, tool):
    folder = written(tool)
    assert open_folder(folder).format is FORMATS[tool]
    leaves = _leaves(load(folder))
    expected = safetensors.torch.load_file(folder / "expected" / "weights.safetensors")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    elements, scales = SUFFIXES.get(tool, (".weight", ".weight_scale"))
    assert (
        len(expected) == 13
    )  # seven linear layers twice, without the one that is kept
    for name, values in expected.items():
        leaf = leaves.pop(name.removeprefix("model.").replace(".", "/"))
        assert isinstance(leaf, MXArray)
        np.testing.assert_array_equal(dequantize(leaf), values.numpy())
        module = name.removesuffix(".weight")
        for array, stored in (
            (leaf.elements, tensors[module + elements]),
            (leaf.scales, tensors[module + scales]),
        ):
            stored = stored.view(torch.uint8).numpy()
            np.testing.assert_array_equal(np.asarray(array).view(np.uint8), stored)
    assert KEPT.removeprefix("model.").replace(".", "/") + "/weight" in leaves
    assert not any(isinstance(leaf, MXArray) for leaf in leaves.values())


def test_scales_that_torchao_swizzled_are_refused(written):
    folder = written("torchao") / "swizzled"
    with pytest.raises(CheckpointError, match="swizzled for a kernel") as info:
        load(folder)
    assert len(info.value.problems) == 2  # of two layers

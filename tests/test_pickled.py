"""Pickled weights are never opened; the message says how to convert them."""

import os
import pathlib
import pickle
import subprocess
import sys

import pytest
import torch

from jmx8.checkpoint import CheckpointError, load, open_folder

from . import hf


class Payload:
    """What a hostile pickle holds: unpickled, it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def test_the_command_in_the_message_converts(tmp_path):
    model = hf.random_hf_model(**hf.DENSE)
    model.save_pretrained(tmp_path / "a folder")
    folder = tmp_path / "a folder"
    expected = load(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds no") as info:
        load(folder)
    message = str(info.value)
    assert "pytorch_model.bin is a pickle" in message
    command = message.partition("If you trust it: ")[2]
    path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, shell=True, check=True, env=env, timeout=300)
    assert str(load(folder)) == str(expected)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "x.pth", "x.ckpt"])
def test_a_pickle_is_not_opened(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(pickle.dumps(Payload(tmp_path / "pwned")))
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(CheckpointError, match=f"{name} is a pickle"):
            open_folder(path)
    # Not under another name either.
    (tmp_path / name).rename(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        open_folder(tmp_path)
    assert not (tmp_path / "pwned").exists()


def test_a_zip_of_torch_is_recognized(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    torch.save({"x": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"looks like a file of torch\.save"):
        open_folder(tmp_path)

import json
import os
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from jmx8.checkpoint.errors import CheckpointError, parse_json_object
from jmx8.checkpoint.folder import open_folder
from jmx8.checkpoint.reader import DTYPES, SafetensorsFile


def bits(array):
    return np.ascontiguousarray(array).view(np.uint8)


@pytest.fixture
def file(tmp_path):
    """A file of every kind of shape, and the torch tensors that went into it."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "stack": torch.randn(3, 4, 5, generator=generator, dtype=torch.bfloat16),
        "matrix": torch.randn(7, 6, generator=generator),
        "vector": torch.randn(9, generator=generator).half(),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
    }
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    return SafetensorsFile(path), tensors


def test_tensors_are_read_as_they_were_saved(file):
    reader, tensors = file
    assert set(reader.tensors) == set(tensors)
    assert reader.metadata == {"format": "pt"}
    for name, tensor in tensors.items():
        array = reader.read(name)
        assert array.shape == tuple(tensor.shape)
        np.testing.assert_array_equal(array.astype(np.float64), tensor.double().numpy())


def test_rows_of_a_stack_are_counted_through_its_leading_axes(file):
    reader, tensors = file
    matrix = tensors["stack"].reshape(12, 5).double().numpy()
    rows = reader.read_rows("stack", 3, 10)
    np.testing.assert_array_equal(rows.astype(np.float64), matrix[3:10])
    assert reader.read_rows("stack", 5, 5).shape == (0, 5)


@pytest.mark.parametrize("bounds", [(-1, 2), (0, 13), (3, 2)])
def test_rows_outside_the_tensor_are_refused(file, bounds):
    with pytest.raises(ValueError, match="rows must lie in"):
        file[0].read_rows("stack", *bounds)


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_every_dtype_keeps_its_bytes(tmp_path, name):
    data = np.arange(64, dtype=np.uint8).tobytes()
    shape = [8, 8 // DTYPES[name].itemsize]
    header = {"x": {"dtype": name, "shape": shape, "data_offsets": [0, 64]}}
    array = SafetensorsFile(write(tmp_path / "x.safetensors", header, data)).read("x")
    assert array.dtype == DTYPES[name]
    assert array.shape == tuple(shape)
    assert array.tobytes() == data


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e8m0fnu])
def test_float8_that_torch_saved_is_read(tmp_path, dtype):
    codes = torch.arange(256, dtype=torch.uint8)
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"x": codes.view(dtype)}, path)
    array = SafetensorsFile(path).read("x")
    assert array.dtype == np.dtype(getattr(ml_dtypes, str(dtype).split(".")[1]))
    np.testing.assert_array_equal(bits(array), codes.numpy())


def write(path, header, data=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def entry(shape: Any = (2, 2), begin: Any = 0, end: Any = 16, dtype: Any = "F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


TWICE = b'{"x": %(entry)s, "x": %(entry)s}' % {b"entry": json.dumps(entry()).encode()}


@pytest.mark.parametrize(
    "header, data, message",
    [
        (b"[]", b"", "must hold a JSON object"),
        (b"{", b"", "not valid JSON"),
        (b"\xff\xfe{}", b"", "not valid JSON"),
        (b'{"a":' * 200_000, b"", "not valid JSON"),
        (TWICE, bytes(16), "key 'x' appears twice"),
        ({"x": entry()}, bytes(15), "x: its data ends at byte .* truncated"),
        ({"x": entry()}, bytes(17), "1 bytes at the end belong to no tensor"),
        ({"x": entry(end=12)}, bytes(16), r"x: F32 of shape \[2, 2\] takes 16 bytes"),
        ({"x": entry(shape=(4, 2))}, bytes(16), "x: .*takes 32 bytes, data_offsets"),
        ({"x": entry(begin=-16, end=0)}, bytes(16), "x: data_offsets must be"),
        ({"x": entry(begin=16, end=0)}, bytes(16), "x: data_offsets must be"),
        ({"x": entry(end=16.0)}, bytes(16), "x: data_offsets must be"),
        ({"x": entry(shape=(-2, -2))}, bytes(16), "x: shape must be a list"),
        ({"x": entry(shape=(0, 2**62), end=0)}, b"", "x: shape must be a list"),
        ({"x": entry(shape=(True, 4))}, bytes(16), "x: shape must be a list"),
        ({"x": entry(shape=[1] * 16 + [4])}, bytes(16), "x: shape must be a list of"),
        ({"x": entry(dtype="F4")}, bytes(16), "x: unknown dtype 'F4'"),
        ({"x": entry(dtype=["F32"])}, bytes(16), "x: unknown dtype"),
        ({"x": 1}, bytes(16), "x: header must give dtype, shape and data_offsets"),
        ({"x": entry() | {"y": 1}}, bytes(16), "x: header must give"),
        (
            {"x": entry(), "y": entry(begin=8, end=24)},
            bytes(24),
            "y: its data overlaps that of x",
        ),
        (
            {"x": entry(), "y": entry(begin=20, end=36)},
            bytes(36),
            "y: 4 bytes before its data belong to no tensor",
        ),
        (
            {"x": entry(shape=(2**30, 2**15), end=2**47)},
            bytes(16),
            "x: its data ends at byte",
        ),
        ({"__metadata__": {"a": 1}}, b"", "__metadata__ must map names to strings"),
    ],
)
def test_a_wrong_header_is_one_line_naming_file_and_tensor(
    tmp_path, header, data, message
):
    path = write(tmp_path / "model.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as info:
        SafetensorsFile(path)
    assert str(info.value).startswith(str(path))
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "0 bytes, shorter than the length field"),
        (b"\0" * 7, "7 bytes, shorter than the length field"),
        ((100).to_bytes(8, "little") + b"{}", "claims 100 bytes where at most 2"),
        (b"\xff" * 8 + b"{}", "claims 18446744073709551615 bytes where at most 2"),
        (b"<!DOCTYPE html><html></html>", "not a safetensors file"),
    ],
)
def test_a_file_that_is_not_safetensors_is_one_line(tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as info:
        SafetensorsFile(path)
    assert "\n" not in str(info.value)


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(CheckpointError, match="No such file"):
        SafetensorsFile(tmp_path / "model.safetensors")


def test_a_file_that_shrinks_after_opening_is_an_error(file):
    reader, _ = file
    info = reader.tensors["matrix"]
    with reader.path.open("r+b") as handle:
        handle.truncate(info.offset + info.nbytes - 1)
    with pytest.raises(CheckpointError, match="matrix: the file ends inside"):
        reader.read("matrix")


def test_names_from_a_file_cannot_break_the_line(tmp_path):
    path = write(tmp_path / "x.safetensors", {"a\n\x1b[31mb": 1})
    with pytest.raises(CheckpointError) as info:
        SafetensorsFile(path)
    assert r"a\n\x1b[31mb" in str(info.value)


def test_a_long_list_of_problems_is_cut_in_the_message_only():
    error = CheckpointError([f"problem {i}" for i in range(250)])
    assert len(error.problems) == 250
    assert str(error).splitlines()[-1] == "... and 150 more problems"


def test_json_keys_may_not_repeat_at_any_depth():
    with pytest.raises(CheckpointError, match="key 'b' appears twice"):
        parse_json_object(b'{"a": {"b": 1, "b": 2}}', "here")


TWO = "2.safetensors"


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of two shards."""
    (tmp_path / "config.json").write_text("{}")
    ones = np.ones((2, 2), np.float32)
    safetensors.numpy.save_file({"a": ones, "b": 2 * ones}, tmp_path / "1.safetensors")
    safetensors.numpy.save_file({"c": 3 * ones}, tmp_path / "2.safetensors")
    write_index(tmp_path, {"a": "1.safetensors", "b": "1.safetensors"} | {"c": TWO})
    return tmp_path


def write_index(path, weight_map):
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))


def test_an_index_gathers_its_shards(folder):
    (folder / "3.safetensors").write_bytes(b"not named by the index, not looked at")
    sources = open_folder(folder).sources
    assert list(sources) == ["a", "b", "c"]
    assert {name: s.file.read(name)[0, 0] for name, s in sources.items()} == {
        "a": 1,
        "b": 2,
        "c": 3,
    }


def test_the_download_cache_of_hugging_face_is_read(folder, tmp_path_factory):
    cache = tmp_path_factory.mktemp("models--a--b")
    (cache / "snapshots" / "0123").mkdir(parents=True)
    folder.rename(cache / "blobs")
    for file in (cache / "blobs").iterdir():
        link = cache / "snapshots" / "0123" / file.name
        link.symlink_to(f"../../blobs/{file.name}")
    assert list(open_folder(cache / "snapshots" / "0123").sources) == ["a", "b", "c"]


def test_a_link_to_a_folder_is_that_folder(folder, tmp_path_factory):
    link = tmp_path_factory.mktemp("elsewhere") / "link"
    link.symlink_to(folder)
    assert list(open_folder(link).sources) == ["a", "b", "c"]


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors.index.json", "2.safetensors"]
)
def test_a_link_that_leads_out_of_the_folder_is_refused(folder, tmp_path_factory, name):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / name
    (folder / name).rename(elsewhere)
    (folder / name).symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match="link that leads out of the folder") as e:
        open_folder(folder)
    assert len(e.value.problems) == 1 and str(folder / name) in str(e.value)
    # Neither does a folder called blobs help that is itself a link.
    snapshot = tmp_path_factory.mktemp("cache") / "snapshots" / "0"
    snapshot.parent.mkdir()
    folder.rename(snapshot)
    (snapshot / name).unlink()
    (snapshot.parents[1] / "blobs").symlink_to(elsewhere.parent)
    (snapshot / name).symlink_to(f"../../blobs/{name}")
    with pytest.raises(CheckpointError, match="link that leads out of the folder"):
        open_folder(snapshot)


@pytest.mark.parametrize("name", ["config.json", TWO, "model.safetensors.index.json"])
def test_a_pipe_is_not_waited_for(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match="not a regular file"):
        open_folder(folder)


def test_a_file_without_an_index_is_read(folder):
    (folder / "model.safetensors.index.json").unlink()
    (folder / TWO).unlink()
    assert list(open_folder(folder).sources) == ["a", "b"]
    (folder / "1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds no \*\.safetensors file"):
        open_folder(folder)


def test_files_without_an_index_are_read_together(folder):
    (folder / "model.safetensors.index.json").unlink()
    assert list(open_folder(folder).sources) == ["a", "b", "c"]
    (folder / "3.safetensors").write_bytes((folder / TWO).read_bytes())
    with pytest.raises(CheckpointError, match=r"3.safetensors: c: is in 2.safetensors"):
        open_folder(folder)


def test_a_set_of_shards_without_an_index_must_be_whole(folder):
    (folder / "model.safetensors.index.json").unlink()
    for i in (1, 2):
        new = folder / f"model-0000{i}-of-00003.safetensors"
        (folder / f"{i}.safetensors").rename(new)
    with pytest.raises(CheckpointError, match="missing shard"):
        open_folder(folder)
    ones = np.ones(1, np.float32)
    third = folder / "model-00003-of-00003.safetensors"
    safetensors.numpy.save_file({"d": ones}, third)
    # A copy of everything in another file, as some repositories have it.
    safetensors.numpy.save_file({"a": ones}, folder / "consolidated.safetensors")
    assert list(open_folder(folder).sources) == ["a", "b", "c", "d"]
    (folder / "other-00001-of-00001.safetensors").write_bytes(third.read_bytes())
    with pytest.raises(CheckpointError, match="holds 2 sets of shards"):
        open_folder(folder)


def test_an_empty_set_of_shards_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "x-00000-of-00000.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="missing shard"):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        *("/etc/passwd", "../1.safetensors", "sub/1.safetensors", "..", "", None),
        *("a\\b", "a\0b", "\ud800.safetensors", "long" * 64),
    ],
)
def test_an_index_names_files_of_its_folder_only(folder, name):
    write_index(folder, {"a": name})
    with pytest.raises(CheckpointError, match=r"a: .* is not the plain name of a file"):
        open_folder(folder)


def test_index_and_shards_must_agree_both_ways(folder):
    (folder / "bad.safetensors").write_bytes(b"")
    write_index(
        folder,
        {"a": "1.safetensors", "b": TWO, "x": TWO, "c": "3.safetensors"}
        | {"d": "bad.safetensors"},
    )
    with pytest.raises(CheckpointError) as info:
        open_folder(folder)
    problems = "\n".join(info.value.problems)
    assert len(info.value.problems) == 6
    assert f"{folder / '3.safetensors'}: missing shard" in problems
    assert f"{folder / 'bad.safetensors'}: not a safetensors file" in problems
    assert f"{folder / TWO}: b: not in this file" in problems
    assert f"{folder / TWO}: x: not in this file" in problems
    assert f"{folder / '1.safetensors'}: b: " in problems
    assert f"{folder / TWO}: c: " in problems


@pytest.mark.parametrize("content", ["", "[]", "{", '{"weight_map": {}}', "{}"])
def test_a_malformed_index_is_one_line(folder, content):
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"index\.json") as info:
        open_folder(folder)
    assert "\n" not in str(info.value)


def test_config_must_be_there_and_be_json(folder):
    (folder / "config.json").write_text("{'a': 1}")
    with pytest.raises(CheckpointError, match=r"config\.json: not valid JSON"):
        open_folder(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: No such file"):
        open_folder(folder)


def test_the_folder_must_exist(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        open_folder(tmp_path / "nowhere")

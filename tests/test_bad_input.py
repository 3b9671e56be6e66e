"""Every broken checkpoint is refused in lines that name the file and the tensor."""

import json

import jax.numpy as jnp
import pytest
import torch

from jmx8.checkpoint import CheckpointError, load, SafetensorsFile

from .checkpoints import DENSE, MOE, random_tensors, write_checkpoint


GATE = "model.layers.0.mlp.gate_proj.weight"
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.fixture
def folder(tmp_path):
    """A dense checkpoint in one file."""
    return write_checkpoint(tmp_path, DENSE, random_tensors(DENSE))


@pytest.fixture
def shards(tmp_path):
    """A mixture of experts in three files."""
    return write_checkpoint(tmp_path, MOE, random_tensors(MOE), num_shards=3)


def problems(folder, **kwargs):
    """Returns the problems of a checkpoint, each of which is one line."""
    with pytest.raises(CheckpointError) as info:
        load(folder, **kwargs)
    assert str(info.value).splitlines() == list(info.value.problems)
    return list(info.value.problems)


def problem(folder, **kwargs):
    (line,) = problems(folder, **kwargs)
    return line


@pytest.fixture
def no_reads(monkeypatch):
    """Fails the test if any weight is read."""

    def read_rows(self, name, start, stop):
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(SafetensorsFile, "read_rows", read_rows)


@pytest.mark.usefixtures("no_reads")
@pytest.mark.parametrize("keep", [0.99, 0.5, 0.01, 0.0])
def test_a_truncated_file(folder, keep):
    file = folder / "model.safetensors"
    with file.open("r+b") as handle:
        handle.truncate(int(keep * file.stat().st_size))
    line = problem(folder)
    assert line.startswith(f"{file}: ")
    assert "truncated" in line or "shorter" in line
    if keep == 0.99:
        assert "weight: its data ends at byte" in line


def rewrite_header(file, edit):
    """Applies `edit` to the header of a file and leaves the data as it is."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


@pytest.mark.usefixtures("no_reads")
@pytest.mark.parametrize(
    "edit, message",
    [
        (
            lambda entry: entry["data_offsets"].__setitem__(1, 10**12),
            "takes 10240 bytes",
        ),
        (
            lambda entry: entry["data_offsets"].__setitem__(0, -8),
            "must be [begin, end]",
        ),
        (lambda entry: entry["shape"].__setitem__(0, 8), "takes 1024 bytes"),
        (lambda entry: entry.update(dtype="F32"), "takes 20480 bytes"),
        (lambda entry: entry.update(dtype="BF17"), "unknown dtype 'BF17'"),
        (lambda entry: entry.update(data_offsets=[0, 10240]), "overlaps"),
    ],
)
def test_a_header_that_lies(folder, edit, message):
    file = folder / "model.safetensors"
    rewrite_header(file, lambda header: edit(header[GATE]))
    line = problem(folder)
    assert line.startswith(f"{file}: ")
    assert message in line
    assert GATE in line


@pytest.mark.usefixtures("no_reads")
@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b", ".."])
def test_an_index_that_names_files_elsewhere(shards, name):
    index = shards / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][EXPERT] = name
    index.write_text(json.dumps(content))
    line = problem(shards)
    assert line == (
        f"{index}: {EXPERT}: {name!r} is not the plain name of a file in this folder"
    )


@pytest.mark.usefixtures("no_reads")
def test_a_missing_shard(shards):
    (shards / "model-00002-of-00003.safetensors").unlink()
    line = problem(shards)
    assert line.startswith(
        f"{shards / 'model-00002-of-00003.safetensors'}: missing shard"
    )


@pytest.mark.parametrize("dtype", ["mxfp8", "bfloat16", "float32"])
@pytest.mark.parametrize(
    "name", [GATE, "model.embed_tokens.weight", "model.norm.weight"]
)
@pytest.mark.parametrize(
    "value, found", [("nan", "1 NaN and 0 infinite"), ("-inf", "0 NaN and 1 infinite")]
)
def test_weights_that_are_not_finite(tmp_path, dtype, name, value, found):
    tensors = random_tensors(DENSE)
    tensors[name].view(-1)[7] = float(value)
    write_checkpoint(tmp_path, DENSE, tensors)
    line = problem(tmp_path, dtype=dtype)
    assert line.startswith(f"{tmp_path / 'model.safetensors'}: {name}: ")
    assert f"must be finite, found {found} in rows 0 to " in line


def test_a_weight_of_one_expert_that_is_not_finite(tmp_path):
    tensors = random_tensors(MOE)
    tensors[EXPERT][47, 63] = float("nan")
    write_checkpoint(tmp_path, MOE, tensors, num_shards=2)
    line = problem(tmp_path)
    assert f"{EXPERT}: weights must be finite" in line


def test_a_weight_that_bfloat16_cannot_hold(tmp_path):
    tensors = random_tensors(DENSE, torch.float32)
    tensors["model.norm.weight"][3] = 3.4e38
    write_checkpoint(tmp_path, DENSE, tensors)
    assert "model.norm.weight: weights must be finite, found bfloat16 overflow" in (
        problem(tmp_path)
    )
    assert load(tmp_path, dtype="float32").norm.weight[3] == jnp.float32(3.4e38)


@pytest.mark.usefixtures("no_reads")
@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.float64, torch.int8])
def test_weights_of_another_dtype(tmp_path, dtype):
    tensors = random_tensors(DENSE)
    tensors[GATE] = tensors[GATE].to(dtype)
    write_checkpoint(tmp_path, DENSE, tensors)
    name = str(dtype).removeprefix("torch.")
    assert problem(tmp_path) == (
        f"{tmp_path / 'model.safetensors'}: {GATE}: dtype must be bfloat16, float16 or "
        f"float32, or float8_e4m3fn with scales, got {name}"
    )


@pytest.mark.usefixtures("no_reads")
def test_everything_that_does_not_fit_is_listed_at_once(tmp_path):
    tensors = random_tensors(MOE)
    del tensors["model.layers.1.mlp.experts.2.gate_proj.weight"]
    del tensors["model.norm.weight"]
    tensors["model.layers.1.mlp.experts.4.gate_proj.weight"] = torch.zeros(48, 64)
    tensors["model.layers.2.input_layernorm.weight"] = torch.zeros(64)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(10)
    tensors[EXPERT] = tensors[EXPERT].T.contiguous()
    tensors[GATE] = tensors[GATE].to(torch.int8)
    write_checkpoint(tmp_path, MOE, tensors)
    file = tmp_path / "model.safetensors"
    prefix = "model.layers.1.mlp.experts"
    assert set(problems(tmp_path)) == {
        f"{tmp_path}: {prefix}.2.gate_proj.weight: missing, layers/1/mlp/experts/w13 "
        "needs it",
        f"{tmp_path}: model.norm.weight: missing, norm/weight needs it",
        f"{file}: {prefix}.4.gate_proj.weight: unknown, the model has no place for it",
        f"{file}: model.layers.2.input_layernorm.weight: unknown, the model has no "
        "place for it",
        f"{file}: model.layers.0.self_attn.rotary_emb.inv_freq: unknown, the model has "
        "no place for it",
        f"{file}: {EXPERT}: shape must be [48, 64] by config.json, got [64, 48]",
        f"{file}: {GATE}: dtype must be bfloat16, float16 or float32, or "
        "float8_e4m3fn with scales, got int8",
    }


@pytest.mark.usefixtures("no_reads")
def test_a_checkpoint_of_the_wrong_config(tmp_path):
    write_checkpoint(tmp_path, MOE, random_tensors(DENSE))
    found = problems(tmp_path)
    assert len(found) > 10
    assert any(f"{EXPERT}: missing" in line for line in found)


NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4"}


def write_config(folder, config):
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"model_type": "llama"},
            "model_type 'llama' is not supported; supported: qwen3",
        ),
        ({"model_type": None}, "model_type is missing; supported: qwen3, qwen3_moe"),
        ({"model_type": ["qwen3"]}, "model_type ['qwen3'] is not supported"),
        ({"architectures": ["LlamaForCausalLM"]}, "architectures must be"),
        ({"hidden_size": "64"}, "hidden_size must be an integer"),
        ({"unheard_of": 1}, "unheard_of"),
        ({"quantization_config": []}, "quantization_config must be an object"),
        ({"quantization_config": {"quant_method": "awq"}}, "'awq' is not read"),
        ({"quantization_config": {"quant_method": ["a"]}}, "['a'] is not read"),
        (
            {"quantization_config": {"quant_method": "fp8"}},
            "fp8 with weight_block_size",
        ),
        ({"quantization_config": NVFP4}, "quant_algo 'NVFP4' is not read"),
        ({"quantization_config": {"ignore": "lm_head"}}, "ignore must be a list of"),
        ({"quantization_config": {"ignore": [1]}}, "ignore must be a list of strings"),
        ({"quantization_config": {"ignore": ["re:("]}}, "is not a regular expression"),
    ],
)
@pytest.mark.usefixtures("no_reads")
def test_a_config_that_is_not_understood(folder, change, message):
    write_config(folder, DENSE | change)
    line = problem(folder)
    assert line.startswith(f"{folder / 'config.json'}: ")
    assert message in line


@pytest.mark.usefixtures("no_reads")
@pytest.mark.parametrize(
    "field",
    [
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
        *("num_attention_heads", "rms_norm_eps", "max_position_embeddings"),
        *("rope_theta", "num_experts", "num_experts_per_tok", "moe_intermediate_size"),
    ],
)
def test_a_config_without_a_needed_field(shards, field):
    write_config(shards, {key: value for key, value in MOE.items() if key != field})
    assert problem(shards) == f"{shards / 'config.json'}: {field} is missing."


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 1, "a": 2}', "\x00"])
def test_a_config_that_is_not_json(folder, content):
    (folder / "config.json").write_text(content)
    assert problem(folder).startswith(f"{folder / 'config.json'}")


def test_a_folder_that_is_none(tmp_path):
    assert problem(tmp_path / "absent") == f"{tmp_path / 'absent'}: no such folder"
    (tmp_path / "file").write_text("")
    line = problem(tmp_path / "file")
    assert line == f"{tmp_path / 'file'}: needs a folder, got a file"
    assert "config.json: No such file" in problem(tmp_path)


def test_nothing_is_written(shards):
    before = {path: path.stat().st_mtime_ns for path in shards.iterdir()}
    (shards / "model-00001-of-00003.safetensors").rename(shards / "moved")
    problem(shards)
    (shards / "moved").rename(shards / "model-00001-of-00003.safetensors")
    load(shards)
    assert before == {path: path.stat().st_mtime_ns for path in shards.iterdir()}

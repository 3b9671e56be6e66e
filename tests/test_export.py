"""Writing of MXFP8 checkpoints: their content. Interruptions are in test_output.py."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmx8.checkpoint.output
from jmx8 import CheckpointError, load
from jmx8._mx_array import quantize
from jmx8.checkpoint import open_folder, quantize_checkpoint
from jmx8.checkpoint.formats import FP8_BLOCKS, WRITABLE

from .mx_checkpoints import (
    BF16,
    DENSE,
    E4M3,
    E8M0,
    MOE,
    mx_bytes,
    random_weights,
    stored,
    write_folder,
)


DENSE = DENSE | {"head_dim": 32}
CONFIGS = {"dense": DENSE, "moe": MOE | {"head_dim": 32, "moe_intermediate_size": 64}}


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


def read_all(folder):
    """Returns every tensor of a folder by name."""
    sources = open_folder(folder).sources
    return {name: s.file.read(name) for name, s in sources.items()}


def assert_same(actual, expected):
    """Compares tensors by name: dtypes, shapes and bytes."""
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (x.dtype, x.shape), name
        np.testing.assert_array_equal(as_bytes(actual[name]), as_bytes(x), name)


def as_bytes(x):
    return np.ascontiguousarray(x).reshape(-1).view(np.uint8)


def wide_enough(tensors):
    """Returns which linear layers have columns that engines take."""
    return {n for n, x in tensors.items() if "_proj" in n and x.shape[-1] % 32 == 0}


def expected_output(tensors, form):
    """Returns what a format holds of bfloat16 tensors, `quantize` of each by itself."""
    converted = wide_enough(tensors)
    result = {n: x for n, x in tensors.items() if n not in converted}
    return result | stored({name: tensors[name] for name in converted}, form)


@pytest.mark.parametrize(
    "config, form",
    [
        (CONFIGS["dense"], WRITABLE["mxfp8"]),
        (CONFIGS["dense"], WRITABLE["compressed-tensors"]),
        (CONFIGS["moe"], WRITABLE["modelopt"]),
    ],
)
def test_each_layer_is_quantize_of_its_tensor(tmp_path, config, form, monkeypatch):
    monkeypatch.setattr(jmx8.checkpoint.output, "CHUNK_BYTES", 640)  # a few rows
    tensors = random_weights(config)
    source = write_folder(tmp_path / "in", config, tensors, num_shards=3)
    report = quantize_checkpoint(
        source, tmp_path / "out", format=form.name, shard_bytes=40_000
    )
    assert_same(read_all(tmp_path / "out"), expected_output(tensors, form))
    converted = {row.path for row in report.converted}
    assert converted == {
        name.removeprefix("model.").replace(".", "/") for name in wide_enough(tensors)
    }
    assert "layers/0/mlp/down_proj/weight" in {row.path for row in report.kept}
    assert report.bytes_before == sum(x.nbytes for x in tensors.values())
    stored_bytes = sum(x.nbytes for x in read_all(tmp_path / "out").values())
    assert report.bytes_after == stored_bytes


def test_the_model_is_that_of_the_source(tmp_path, config):
    source = write_folder(tmp_path / "in", config, random_weights(config))
    quantize_checkpoint(source, tmp_path / "out")
    skip = "re:/down_proj/" if config is DENSE else "layers/0/mlp/down_proj"
    expected = load(source, skip=skip)
    model = load(tmp_path / "out")
    assert jax.tree.structure(model) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(model), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(as_bytes(np.asarray(x)), as_bytes(np.asarray(y)))


# What engines expect of each format: the name of scales, and where modules are listed.
LAYOUTS = {
    "modelopt": ("weight_scale", ["ignore"]),
    "compressed-tensors": ("weight_scale", ["ignore"]),
    "mxfp8": ("weight_scale_inv", ["modules_to_not_convert", "ignored_layers"]),
}
KEPT = ["lm_head", *(f"model.layers.{i}.mlp.down_proj" for i in (0, 1))]
GROUP = {
    "num_bits": 8,
    "type": "float",
    "strategy": "group",
    "group_size": 32,
    "symmetric": True,
    "scale_dtype": "torch.uint8",
    "zp_dtype": "torch.uint8",
}
METHODS = {
    "modelopt": {"quant_method": "modelopt", "quant_algo": "MXFP8"},
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "mxfp8-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": GROUP | {"dynamic": False},
                "input_activations": GROUP | {"dynamic": True},
            }
        },
    },
    "mxfp8": {
        "quant_method": "mxfp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [1, 32],
        "scale_fmt": "ue8m0",
    },
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_names_dtypes_shapes_and_config_are_those_engines_read(tmp_path, name):
    source = write_folder(tmp_path / "in", DENSE, random_weights(DENSE))
    quantize_checkpoint(source, tmp_path / "out", format=name)
    scale, lists = LAYOUTS[name]
    tensors = read_all(tmp_path / "out")
    module = "model.layers.0.self_attn.q_proj"
    assert tensors[f"{module}.weight"].dtype == E4M3
    assert tensors[f"{module}.weight"].shape == (128, 64)
    assert tensors[f"{module}.{scale}"].dtype == np.uint8
    assert tensors[f"{module}.{scale}"].shape == (128, 2)
    written = json.loads((tmp_path / "out/config.json").read_text())
    quantization = written.pop("quantization_config")
    assert written == DENSE
    assert {key: quantization[key] for key in METHODS[name]} == METHODS[name]
    assert all(quantization[key] == KEPT for key in lists)
    side_file = tmp_path / "out/hf_quant_config.json"
    assert side_file.exists() == (name == "modelopt")
    if name == "modelopt":
        assert json.loads(side_file.read_text())["quantization"] == {
            "quant_algo": "MXFP8",
            "kv_cache_quant_algo": None,
            "group_size": 32,
            "exclude_modules": KEPT,
        }


@functools.cache
def stored_moe(name):
    return stored(random_weights(CONFIGS["moe"]), WRITABLE[name])


@pytest.mark.parametrize("first", WRITABLE)
@pytest.mark.parametrize("second", WRITABLE)
def test_there_and_back_is_byte_identical(tmp_path, first, second):
    config = CONFIGS["moe"]
    tensors = stored_moe(first)
    quantization = WRITABLE[first].quantization_config(["lm_head"])
    source = write_folder(
        tmp_path / "a", config | {"quantization_config": quantization}, tensors
    )
    quantize_checkpoint(source, tmp_path / "b", format=second)
    assert_same(read_all(tmp_path / "b"), stored_moe(second))
    quantize_checkpoint(tmp_path / "b", tmp_path / "c", format=first)
    assert_same(read_all(tmp_path / "c"), tensors)


@pytest.mark.parametrize("name", WRITABLE)
def test_every_code_survives(tmp_path, name):
    codes = np.arange(256, dtype=np.uint8)
    elements = np.tile(codes[:, None], (1, 32)).view(E4M3)
    module = "model.layers.0.self_attn.q_proj.weight"
    tensors = {module: elements, f"{module}_scale_inv": codes[:, None].view(E8M0)}
    source = write_folder(tmp_path / "a", {"model_type": "other"}, tensors)
    quantize_checkpoint(source, tmp_path / "b", format=name, verify=True)
    scale = WRITABLE[name].scale_name(module)
    assert_same(read_all(tmp_path / "b"), {module: elements, scale: codes[:, None]})


def test_blocks_of_fp8_keep_their_elements_and_repeat_their_scales(tmp_path):
    random = np.random.default_rng(0)
    weight = random.standard_normal((200, 320), np.float32).astype(E4M3)
    scales = np.exp2(random.integers(-9, 9, (2, 3))).astype(np.float32)
    module = "model.layers.0.mlp.up_proj.weight"
    blocks = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config = {"quantization_config": blocks}
    tensors = {module: weight, FP8_BLOCKS.scale_name(module): scales}
    source = write_folder(tmp_path / "a", config, tensors)
    quantize_checkpoint(source, tmp_path / "b", format="mxfp8")
    codes = (np.log2(scales) + 127).astype(np.uint8)
    codes = np.repeat(np.repeat(codes, 128, 0)[:200], 4, 1)[:, :10]
    scale = WRITABLE["mxfp8"].scale_name(module)
    assert_same(read_all(tmp_path / "b"), {module: weight, scale: codes})
    tensors[FP8_BLOCKS.scale_name(module)] = scales * np.float32(1.5)
    write_folder(tmp_path / "odd", config, tensors)
    with pytest.raises(CheckpointError, match="not a power of two"):
        quantize_checkpoint(tmp_path / "odd", tmp_path / "c")
    quantize_checkpoint(tmp_path / "odd", tmp_path / "c", requantize=True)
    wide = weight.astype(np.float32)
    wide *= np.repeat(np.repeat(scales * 1.5, 128, 0)[:200], 128, 1)[:, :320]
    elements, codes = mx_bytes(quantize(jnp.asarray(wide)), 320)
    expected = {module: elements, f"{module}_scale": codes}
    assert_same(read_all(tmp_path / "c"), expected)


@pytest.mark.parametrize("transposed", [False, True])
def test_stacked_experts_are_written_one_by_one(tmp_path, transposed):
    config = CONFIGS["moe"]
    tensors = random_weights(config)
    experts = "model.layers.1.mlp.experts"
    stack = lambda name: np.stack(
        [tensors[f"{experts}.{e}.{name}.weight"] for e in range(4)]
    )
    gate_up = np.concatenate([stack("gate_proj"), stack("up_proj")], 1)
    stacks = {f"{experts}.gate_up_proj": gate_up}
    stacks[f"{experts}.down_proj"] = stack("down_proj")
    if transposed:
        stacks = {
            name: np.ascontiguousarray(x.swapaxes(1, 2)) for name, x in stacks.items()
        }
    fused = {name: x for name, x in tensors.items() if experts not in name} | stacks
    source = write_folder(tmp_path / "in", config, fused)
    quantize_checkpoint(source, tmp_path / "out", shard_bytes=30_000, verify=True)
    expected = expected_output(tensors, WRITABLE["modelopt"])
    assert_same(read_all(tmp_path / "out"), expected)
    # Kept, they stay as they are.
    quantize_checkpoint(source, tmp_path / "kept", skip="*/experts")
    kept = read_all(tmp_path / "kept")
    assert all(
        np.array_equal(as_bytes(kept[n]), as_bytes(x)) for n, x in stacks.items()
    )
    listed = json.loads((tmp_path / "kept/config.json").read_text())
    assert experts in listed["quantization_config"]["ignore"]


def test_unknown_models_are_converted_by_name_and_shape(tmp_path):
    linear = np.ones((32, 64), BF16)
    tensors = {
        "model.layers.0.mixer.in_proj.weight": linear,
        "model.layers.0.mixer.conv1d.weight": np.ones((32, 1, 4), BF16),
        "model.layers.0.mixer.A_log": np.ones((32, 64), BF16),
        "model.layers.0.mlp.experts.gate_up_proj": np.ones((2, 64, 32), BF16),
        "model.layers.0.linear_attn.in_proj_a.weight": linear,
        "model.visual.blocks.0.attn.qkv.weight": linear,
        "model.layers.0.attn.bias_mask": np.ones((4, 4), np.bool_),
        "model.layers.0.attn.steps": np.ones((), np.int64),
        "mtp.0.eh_proj.weight": linear,
        "transformer.h.0.attn.c_attn.weight": linear,
    }
    source = write_folder(tmp_path / "in", {"model_type": "other"}, tensors)
    report = quantize_checkpoint(source, tmp_path / "out")
    assert [row.path for row in report.converted] == ["layers/0/mixer/in_proj/weight"]
    assert (
        "stack of experts, which is taken apart only for model_type qwen2_moe and "
        "qwen3_moe (layers/*/mlp/experts/gate_up_proj)"
    ) in report.summary()
    written = read_all(tmp_path / "out")
    for name, x in tensors.items():
        if "mixer.in_proj" not in name:
            assert np.array_equal(as_bytes(written[name]), as_bytes(x))
    everything = quantize_checkpoint(source, tmp_path / "all", only="*/qkv")
    assert [row.path for row in everything.converted] == [
        "visual/blocks/0/attn/qkv/weight"
    ]


def test_the_choice_is_the_callers_and_the_checkpoints(tmp_path):
    listed = {"quantization_config": {"modules_to_not_convert": ["layers.0.mlp"]}}
    config = DENSE | listed
    source = write_folder(tmp_path / "in", config, random_weights(config))
    report = quantize_checkpoint(source, tmp_path / "out", skip="*/k_proj")
    reasons = {row.path: row.reason for row in report.kept}
    assert "modules_to_not_convert" in reasons["layers/0/mlp/up_proj/weight"]
    assert "k_proj" in reasons["layers/1/self_attn/k_proj/weight"]
    with pytest.raises(ValueError, match="`\\*/kproj` matches no tensor"):
        quantize_checkpoint(source, tmp_path / "other", skip="*/kproj")
    with pytest.raises(ValueError, match="quantized already"):
        quantize_checkpoint(tmp_path / "out", tmp_path / "other", skip="*/k_proj")
    assert not (tmp_path / "other").exists()


def test_files_beside_the_weights_are_carried_over(tmp_path):
    source = write_folder(tmp_path / "in", DENSE, random_weights(DENSE))
    kept = {
        "tokenizer.json": '{"é": 1}',
        "chat_template.jinja": "{{ x }}",
        "merges.txt": "a b",
        "LICENSE": "text",
        "modeling_other.py": "x = 1",
    }
    dropped = (".hidden.json", "model.safetensors.index.json.bak", "pytorch_model.bin")
    for name in (*kept, *dropped):
        (source / name).write_text(kept.get(name, "x"), encoding="utf-8")
    (source / "folder.json").mkdir()
    quantize_checkpoint(source, tmp_path / "out")
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == {
        *kept,
        *(".jmx8.json", "config.json", "hf_quant_config.json", "model.safetensors"),
    }
    for name, text in kept.items():
        assert (tmp_path / "out" / name).read_text(encoding="utf-8") == text


def test_a_quantized_cache_stays_described(tmp_path):
    scheme = {"num_bits": 8, "type": "float", "dynamic": False}
    form = WRITABLE["compressed-tensors"]
    quantization = form.quantization_config(["lm_head"]) | {"kv_cache_scheme": scheme}
    tensors = stored(random_weights(DENSE), form)
    scales = {
        f"model.layers.0.self_attn.{x}_scale": np.ones((), BF16) for x in ("k", "v")
    }
    config = DENSE | {"quantization_config": quantization}
    source = write_folder(tmp_path / "a", config, tensors | scales)
    quantize_checkpoint(source, tmp_path / "b", format="modelopt")
    assert scales.keys() <= read_all(tmp_path / "b").keys()
    written = json.loads((tmp_path / "b/config.json").read_text())
    assert written["quantization_config"]["kv_cache_scheme"] == scheme
    side_file = json.loads((tmp_path / "b/hf_quant_config.json").read_text())
    assert side_file["quantization"]["kv_cache_quant_algo"] == "FP8"


def test_weights_that_are_not_finite_are_refused(tmp_path):
    tensors = random_weights(DENSE)
    name = "model.layers.1.self_attn.v_proj.weight"
    tensors[name][7, 3] = np.nan
    tensors[name][8, 3] = -np.inf
    source = write_folder(tmp_path / "in", DENSE, tensors)
    with pytest.raises(CheckpointError, match=f"{name}.* 1 NaN and 1 infinite"):
        quantize_checkpoint(source, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))
    shutil.rmtree(tmp_path / "out")
    quantize_checkpoint(source, tmp_path / "out", on_nonfinite="keep")
    expected = expected_output(tensors, WRITABLE["modelopt"])
    assert_same(read_all(tmp_path / "out"), expected)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_layers_are_quantized_from_the_dtype_on_disk(tmp_path, dtype):
    tensors = {n: x.astype(dtype) for n, x in random_weights(DENSE).items()}
    tensors["model.layers.0.mlp.up_proj.weight"] *= dtype(1.001)
    source = write_folder(tmp_path / "in", DENSE, tensors)
    quantize_checkpoint(source, tmp_path / "out")
    expected = expected_output(tensors, WRITABLE["modelopt"])
    assert_same(read_all(tmp_path / "out"), expected)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"format": "mx"}, "format must be one of"),
        ({"on_nonfinite": "drop"}, "on_nonfinite must be"),
        ({"shard_bytes": 0}, "shard_bytes must be positive"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, options, message):
    source = write_folder(tmp_path / "in", DENSE, random_weights(DENSE))
    function = getattr(quantize_checkpoint, "__wrapped__", quantize_checkpoint)
    with pytest.raises(ValueError, match=message):
        function(source, tmp_path / "out", **options)

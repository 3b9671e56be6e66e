"""Checkpoints in every format that stores MXFP8, written byte by byte.

There is no package that writes `quant_method` mxfp8 on a CPU; it is made here from what
its readers expect. What other packages do write is in test_foreign_checkpoints.py.
"""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from jmx8._mx_array import dequantize, MXArray, quantize
from jmx8.checkpoint import CheckpointError, load, open_folder
from jmx8.checkpoint._load import _leaves
from jmx8.checkpoint.formats import MODELOPT, MXFP8, recognize, WRITABLE
from jmx8.checkpoint.stored import find_weights, MXRows

from .mx_checkpoints import (
    assert_same,
    BF16,
    bits,
    DENSE,
    E4M3,
    E8M0,
    MOE,
    mx_bytes,
    random_weights,
    stored,
    use_small_chunks,
    write_file,
    write_folder,
)


KEPT = ["lm_head", "model.layers.1.mlp.gate"]
GATE = "model.layers.0.mlp.gate_proj.weight"
EXPERTS = "model.layers.1.mlp.experts"


@pytest.fixture
def small_chunks(monkeypatch):
    use_small_chunks(monkeypatch)


def config_of(form, config):
    return config | {"quantization_config": form.quantization_config(KEPT)}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A mixture of experts in bfloat16, and what it is when it is converted."""
    tensors = random_weights(MOE)
    folder = write_folder(tmp_path_factory.mktemp("plain"), MOE, tensors)
    return tensors, load(folder)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("scale_dtype", [np.uint8, E8M0])
@pytest.mark.parametrize("form", WRITABLE.values(), ids=WRITABLE)
def test_each_format_is_the_model_that_was_quantized(
    tmp_path, plain, form, scale_dtype
):
    tensors, expected = plain
    tensors = stored(tensors, form, scale_dtype)
    folder = write_folder(tmp_path, config_of(form, MOE), tensors, num_shards=3)
    assert open_folder(folder).format is form
    model, report = load(folder, return_report=True)
    assert_same(model, expected)
    assert {row.reason for row in report.converted} == {"stored as MXFP8"}
    on_disk = sum(x.nbytes for x in tensors.values())
    assert report.bytes_before == on_disk
    router = "layers/1/mlp/gate/weight"
    assert any(row.path == router for row in report.kept)


@pytest.mark.parametrize("num_shards", [1, 4])
def test_neither_an_index_nor_the_config_is_needed(tmp_path, plain, num_shards):
    tensors = stored(plain[0], MXFP8)
    write_folder(tmp_path, MOE, tensors, num_shards=num_shards, index=False)
    assert_same(load(tmp_path), plain[1])


def test_the_file_of_modelopt_alone_names_the_format(tmp_path, plain):
    write_folder(tmp_path, MOE, stored(plain[0], MODELOPT))
    ((name, content),) = MODELOPT.side_file_contents(KEPT).items()
    (tmp_path / name).write_text(json.dumps(content))
    assert open_folder(tmp_path).format is MODELOPT
    assert_same(load(tmp_path), plain[1])
    content["quantization"]["quant_algo"] = "NVFP4"
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"quant_config.json: .*'NVFP4'"):
        load(tmp_path)


def test_the_lists_of_modelopts_file_keep_modules(tmp_path, plain):
    write_folder(tmp_path, MOE, plain[0])
    for name, content in MODELOPT.side_file_contents(["*q_proj*"]).items():
        (tmp_path / name).write_text(json.dumps(content))
    leaves = _leaves(load(tmp_path))
    kept = [path for path in leaves if "q_proj/" in path]
    assert kept and not any(isinstance(leaves[path], MXArray) for path in kept)
    assert isinstance(leaves["layers/0/self_attn/k_proj/weight"], MXArray)


@pytest.mark.usefixtures("small_chunks")
def test_layers_that_are_stored_unquantized_stay_so(tmp_path, plain):
    tensors = stored(plain[0], MXFP8)
    for name in list(tensors):
        if "layers.0.self_attn" in name or "experts.2.up_proj" in name:
            tensors[name] = plain[0].get(name)
    tensors = {name: x for name, x in tensors.items() if x is not None}
    config = MOE | {"quantization_config": {"quant_method": "mxfp8"}}
    write_folder(tmp_path, config, tensors, num_shards=2)
    leaves, converted = _leaves(load(tmp_path)), _leaves(plain[1])
    for path, leaf in leaves.items():
        expected = converted[path]
        if "layers/0/self_attn" in path and "_proj" in path:
            np.testing.assert_array_equal(
                leaf, plain[0][f"model.{path}".replace("/", ".")]
            )
        elif "experts" in path:
            # One expert is not quantized, so none is; of the others nothing is lost.
            values = np.array(dequantize(expected, BF16))
            if path.endswith("w13"):
                values[2, 48:] = plain[0][f"{EXPERTS}.2.up_proj.weight"]
            np.testing.assert_array_equal(leaf, values)
        else:
            assert type(leaf) is type(expected)
    # What is asked for by name is converted all the same.
    asked = _leaves(load(tmp_path, only="layers/0/self_attn"))
    path = "layers/0/self_attn/q_proj/weight"
    np.testing.assert_array_equal(
        bits(asked[path].elements), bits(converted[path].elements)
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_is_not_wanted_in_mxfp8_is_dequantized_exactly(tmp_path, plain, dtype):
    folder = write_folder(tmp_path, MOE, stored(plain[0], MXFP8))
    models = [(load(folder, dtype=dtype), dtype)]
    if dtype == "bfloat16":
        models.append((load(folder, skip=["layers/*"]), dtype))
    for model, wanted in models:
        for path, leaf in _leaves(model).items():
            expected = _leaves(plain[1])[path]
            if isinstance(expected, MXArray):
                expected = dequantize(expected, wanted)
            assert leaf.dtype == wanted
            np.testing.assert_array_equal(leaf, expected.astype(wanted))


def stacks(tensors):
    """Returns the tensors with the experts of layer 1 in stacks `[e, n, k]`."""
    result = {name: x for name, x in tensors.items() if "experts" not in name}
    join = lambda names: np.stack(
        [
            np.concatenate([tensors[f"{EXPERTS}.{e}.{name}.weight"] for name in names])
            for e in range(4)
        ]
    )
    result[f"{EXPERTS}.gate_up_proj"] = join(("gate_proj", "up_proj"))
    result[f"{EXPERTS}.down_proj"] = join(("down_proj",))
    return result


def quantized_stacks(tensors, suffix, axis=-1):
    """Returns the tensors with stacks of experts quantized along an axis."""
    result = {}
    for name, x in tensors.items():
        result[name] = x
        if x.ndim == 3:
            w = quantize(jnp.asarray(np.swapaxes(x, -1, axis)))
            elements, codes = mx_bytes(w, x.shape[axis])
            result[name] = np.swapaxes(elements, -1, axis)
            result[name + suffix] = np.swapaxes(codes, -1, axis)
    return result


def transposed(tensors):
    return {
        name: np.ascontiguousarray(np.swapaxes(x, -1, -2)) if x.ndim == 3 else x
        for name, x in tensors.items()
    }


@pytest.mark.parametrize(
    "suffix", ["_scale", "_scale_inv", "_weight_scale", "_weight_scale_inv"]
)
def test_stacks_of_experts_are_read_with_their_scales(tmp_path, plain, suffix):
    tensors = quantized_stacks(stacks(stored_dense(plain[0])), suffix)
    assert_same(load(write_folder(tmp_path, MOE, tensors)), plain[1])


def stored_dense(tensors):
    """Returns the tensors with all linear layers stored but the experts."""
    dense = {name: x for name, x in tensors.items() if "experts" not in name}
    return stored(dense, MXFP8) | {n: x for n, x in tensors.items() if "experts" in n}


@pytest.mark.usefixtures("small_chunks")
def test_transposed_stacks_are_turned(tmp_path, plain):
    folder = write_folder(tmp_path / "plain", MOE, transposed(stacks(plain[0])))
    assert_same(load(folder), plain[1])
    # Quantized along the axis that a product contracts, they are MXFP8 as well.
    tensors = transposed(stacks(stored_dense(plain[0])))
    quantized = quantized_stacks(tensors, "_scale", axis=-2)
    assert_same(load(write_folder(tmp_path / "mx", MOE, quantized)), plain[1])
    # Along the other they cannot be.
    wrong = quantized_stacks(tensors, "_scale", axis=-1)
    with pytest.raises(CheckpointError, match=r"blocks along n; MXFP8 needs") as info:
        load(write_folder(tmp_path / "wrong", MOE, wrong))
    assert len(info.value.problems) == 2


@pytest.mark.parametrize("turned", [False, True])
def test_a_square_stack_is_turned_if_the_other_is(tmp_path, turned):
    config = MOE | {"moe_intermediate_size": 32}  # [4, 64, 64] and [4, 64, 32]
    tensors = random_weights(config)
    expected = load(write_folder(tmp_path / "single", config, tensors))
    fused = stacks(tensors)
    fused = transposed(fused) if turned else fused
    assert_same(load(write_folder(tmp_path / "fused", config, fused)), expected)


SCALE = f"{GATE}_scale_inv"


@pytest.mark.parametrize(
    "change, message",
    [
        ({SCALE: None}, f"{GATE}: its elements are float8_e4m3fn, and the checkpoint"),
        ({f"{GATE}_scale": np.zeros((80, 2), np.uint8)}, "several tensors of scales"),
        ({SCALE: np.zeros((2, 80), np.uint8)}, r"shape \[2, 80\] do not fit elements"),
        ({SCALE: np.zeros((80, 2), np.float32)}, r"128 x 128 need \[1, 1\]"),
        ({SCALE: np.zeros((), np.float32)}, r"float32 scales of shape \[\] do not fit"),
        ({SCALE: np.zeros((80, 2), np.int8)}, "scales must be uint8, .* got int8"),
        ({SCALE: np.zeros((80, 2), E4M3)}, "scales must be uint8, .*got float8_e4m3fn"),
        ({GATE: np.zeros(80, E4M3)}, "1 x 32 need 2 axes"),
        ({GATE: np.zeros((80, 64), np.uint8)}, f"{GATE}: dtype must be bfloat16"),
        ({"model.norm.weight_scale": np.zeros(2, np.uint8)}, "weight_scale: unknown"),
    ],
)
def test_scales_that_do_not_belong_are_named(tmp_path, change, message):
    tensors = stored(random_weights(DENSE), MXFP8) | change
    tensors = {name: x for name, x in tensors.items() if x is not None}
    with pytest.raises(CheckpointError, match=message):
        load(write_folder(tmp_path, DENSE, tensors))


def test_a_weight_given_as_torchao_stores_it_and_plainly_is_refused(tmp_path):
    tensors = stored(random_weights(DENSE), MXFP8)
    module = GATE.removesuffix(".weight")
    tensors[f"{module}._weight_qdata"] = tensors.pop(GATE)
    tensors[f"{module}._weight_scale"] = tensors.pop(SCALE)
    path = write_folder(tmp_path, DENSE, tensors)
    assert GATE in find_weights(open_folder(path))
    tensors[GATE] = np.zeros((80, 64), BF16)
    with pytest.raises(CheckpointError, match="given twice"):
        load(write_folder(tmp_path, DENSE, tensors))


@pytest.mark.parametrize(
    "element, code, found",
    [
        (0x7F, 127, "1 NaN and 0 infinite"),
        (0xFF, 127, "1 NaN and 0 infinite"),
        (0x30, 255, "32 NaN and 0 infinite"),
        (0xFE, 247, "0 NaN and 1 infinite"),
        (0x7E, 246, None),
        (0x30, 250, None),
        (0x00, 254, None),
    ],
)
def test_stored_weights_must_be_finite(tmp_path, element, code, found):
    tensors = stored(random_weights(DENSE), MXFP8)
    elements, codes = tensors[GATE].view(np.uint8), tensors[SCALE]
    elements[79, 32:] = 0
    elements[79, 40], codes[79, 1] = element, code
    folder = write_folder(tmp_path, DENSE, tensors)
    if found is None:
        leaf = _leaves(load(folder))["layers/0/mlp/gate_proj/weight"]
    else:
        with pytest.raises(CheckpointError, match=f"{GATE}: .* found {found} in rows"):
            load(folder)
        model = load(folder, on_nonfinite="keep")
        leaf = _leaves(model)["layers/0/mlp/gate_proj/weight"]
    assert bits(leaf.elements)[79, 40] == element
    assert bits(leaf.scales)[79, 1] == code


def test_scales_of_a_quantized_cache_are_left_out(tmp_path):
    tensors = stored(random_weights(DENSE), MODELOPT)
    expected = load(write_folder(tmp_path / "without", DENSE, tensors))
    for name in ("k_proj.k_scale", "v_proj.v_scale"):
        tensors[f"model.layers.0.self_attn.{name}"] = np.ones((), np.float32)
    assert_same(load(write_folder(tmp_path / "with", DENSE, tensors)), expected)


def test_a_stored_copy_of_the_tied_embedding_must_be_one(tmp_path):
    config = DENSE | {"hidden_size": 64}
    tensors = stored(random_weights(config), MXFP8)
    elements, codes = mx_bytes(
        quantize(jnp.asarray(tensors["model.embed_tokens.weight"])), 64
    )
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name], tensors[f"{name}_scale_inv"] = elements, codes.copy()
    model = load(write_folder(tmp_path, config, tensors))
    values = MXRows(elements, codes).dequantize()
    np.testing.assert_array_equal(model.embed_tokens.weight, values.astype(BF16))
    tensors["lm_head.weight_scale_inv"][69, 1] ^= 1
    with pytest.raises(CheckpointError, match=r"scale_inv: differs from .* in rows"):
        load(write_folder(tmp_path, config, tensors))


@pytest.mark.parametrize(
    "quantization, form",
    [
        ({}, None),
        ({"ignore": []}, None),
        ({"quant_method": "mxfp8"}, MXFP8),
        ({"quant_method": "fp8", "weight_block_size": [1, 32]}, MXFP8),
        ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}, MODELOPT),
        *((form.quantization_config(KEPT), form) for form in WRITABLE.values()),
    ],
)
def test_configs_name_formats(tmp_path, quantization, form):
    path = tmp_path / "config.json"
    assert recognize({"quantization_config": quantization}, path) is form


def test_metadata_of_a_file_may_be_anything(tmp_path):
    tensors = stored(random_weights(DENSE), MXFP8)
    write_folder(tmp_path, DENSE, tensors)
    for text in ("{", "[]", "[" * 100_000, '{"_data": 1}', '{"_data": {}}'):
        write_file(tmp_path / "model.safetensors", tensors, {GATE: text})
        assert GATE in find_weights(open_folder(tmp_path))

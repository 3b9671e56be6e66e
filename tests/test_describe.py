"""`describe` and `compare`, the two halves of `jmx8 inspect`."""

import json
import math
import os
import subprocess
import sys
import time
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jmx8.checkpoint.compare
from jmx8._mx_array import quantize
from jmx8.checkpoint import CheckpointError, SafetensorsFile
from jmx8.checkpoint.compare import compare, differing_layers
from jmx8.checkpoint.describe import describe, layer_name, natural_order
from jmx8.checkpoint.formats import MXFP8, WRITABLE
from jmx8.convert import measure

from .mx_checkpoints import (
    BF16,
    DENSE,
    E4M3,
    is_linear,
    MOE,
    mx_bytes,
    random_weights,
    stored,
    write_folder,
)


pytestmark = pytest.mark.cpu

GATE = "model.layers.0.mlp.gate_proj.weight"


@pytest.fixture
def no_reads(monkeypatch):
    """Fails the test if any weight is read."""

    def read_rows(self, name, start, stop):
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(SafetensorsFile, "read_rows", read_rows)


@pytest.mark.usefixtures("no_reads")
@pytest.mark.parametrize("form", WRITABLE.values(), ids=WRITABLE)
def test_a_checkpoint_is_described_without_reading_it(tmp_path, form):
    weights = random_weights(MOE)
    tensors = stored(weights, form)
    config = MOE | {"quantization_config": form.quantization_config(["lm_head"])}
    found = describe(write_folder(tmp_path, config, tensors, num_shards=3))
    assert (found.model_type, found.format) == ("qwen3_moe", form.name)
    assert (found.num_files, found.problems) == (3, ())
    assert found.num_bytes == sum(x.nbytes for x in tensors.values())
    assert found.num_parameters == sum(x.size for x in weights.values())
    linear = [name for name in weights if is_linear(name)]
    assert found.totals()["MXFP8"][0] == len(linear)
    assert found.totals()["bfloat16"][0] == len(weights) - len(linear)
    kinds = {kind.pattern: kind for kind in found.kinds}
    experts = kinds["model.layers.*.mlp.experts.*.up_proj.weight"]
    assert (experts.stored_as, experts.count) == ("MXFP8", 4)
    assert experts.shape == (48, 64) and experts.num_bytes == 4 * 48 * (64 + 2)
    (layer,) = (layer for layer in found.layers if layer.name == "model.layers.1")
    inside = [x for name, x in weights.items() if "layers.1." in name]
    assert layer.num_parameters == sum(x.size for x in inside)
    quantized = [x for n, x in weights.items() if "layers.1." in n and is_linear(n)]
    assert layer.num_quantized == sum(x.size for x in quantized)
    assert json.loads(json.dumps(found.to_dict()))["num_bytes"] == found.num_bytes


def test_what_is_not_read_is_described_with_the_reason(tmp_path):
    weights = random_weights(DENSE)
    names = ("qweight", "scales")
    odd = {f"model.layers.0.x.{name}": np.zeros((2, 2), np.int32) for name in names}
    config = DENSE | {"quantization_config": {"quant_method": "awq"}}
    found = describe(write_folder(tmp_path, config, weights | odd))
    assert found.format == "unknown" and "'awq' is not read" in found.problems[0]
    assert found.totals()["int32"] == (2, 32)
    lost = weights | {GATE: weights[GATE].astype(E4M3)}
    found = describe(write_folder(tmp_path, {"model_type": 1}, lost))
    assert found.model_type is None and found.format == "none"
    assert f"{GATE}: its elements are float8_e4m3fn" in found.problems[0]
    assert found.totals()["float8_e4m3fn"][0] == 1


def test_what_the_config_leaves_out_the_weights_tell(tmp_path):
    tensors = stored(random_weights(DENSE), MXFP8)
    found = describe(write_folder(tmp_path, DENSE, tensors))
    assert found.format == "not named in config.json" and found.totals()["MXFP8"]
    assert (
        describe(write_folder(tmp_path, DENSE, random_weights(DENSE))).format == "none"
    )


@pytest.mark.parametrize(
    "weight, layer",
    [
        ("model.layers.10.mlp.experts.3.up_proj.weight", "model.layers.10"),
        ("transformer.h.3.weight", "transformer.h.3"),
        ("lm_head.weight", "lm_head"),
        ("model.embed_tokens.weight", "model.embed_tokens"),
        ("x", "x"),
    ],
)
def test_layers_are_named_by_their_first_number(weight, layer):
    assert layer_name(weight) == layer


def test_layers_are_in_the_order_of_their_numbers():
    names = ["a.10.w", "a.9.w", "a.9.b", "1", "a", "a.10.2"]
    expected = ["1", "a", "a.9.b", "a.9.w", "a.10.2", "a.10.w"]
    assert sorted(names, key=natural_order) == expected


def many_shards(path, num_shards=400, weights_per_shard=60) -> int:
    """Writes the headers of a large checkpoint; its data are holes in the files."""
    weight_map: dict[str, str] = {}
    for shard in range(num_shards):
        header: dict[str, Any] = {}
        position = 0
        for i in range(weights_per_shard):
            name = f"model.layers.{shard // 4}.mlp.experts.{shard % 4 * 60 + i}.up_proj"
            for suffix, dtype, columns in (
                ("", "F8_E4M3", 4096),
                ("_scale", "U8", 128),
            ):
                end = position + 2048 * columns
                header[f"{name}.weight{suffix}"] = {
                    "dtype": dtype,
                    "shape": [2048, columns],
                    "data_offsets": [position, end],
                }
                position = end
        text = json.dumps(header).encode()
        file = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        with (path / file).open("wb") as handle:
            handle.write(len(text).to_bytes(8, "little") + text)
            handle.truncate(8 + len(text) + position)
        weight_map |= dict.fromkeys(header, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text('{"model_type": "large"}')
    return len(weight_map) // 2


@pytest.mark.usefixtures("no_reads")
def test_four_hundred_shards_are_described_at_once(tmp_path):
    count = many_shards(tmp_path)
    began = time.process_time()
    found = describe(tmp_path)
    seconds = time.process_time() - began
    assert found.num_files == 400 and len(found.layers) == 100
    assert found.totals() == {"MXFP8": (count, count * 2048 * (4096 + 128))}
    # Type checks, which only tests have, take longer than what they check.
    assert seconds < 6, seconds


def test_the_command_describes_four_hundred_shards_at_once(tmp_path):
    many_shards(tmp_path)
    before = os.times()
    command = [sys.executable, "-m", "jmx8", "inspect", str(tmp_path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    after = os.times()
    assert "24000 weights" in out
    # Not the time that passes, in which other processes may have the cores. It is 0.6
    # on the machine of `benchmarks/results/inspect_cpu.md`; others are slower.
    seconds = after.children_user + after.children_system
    seconds -= before.children_user + before.children_system
    assert seconds < 2, seconds


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(jmx8.checkpoint.compare, "CHUNK_BYTES", 700)


@pytest.mark.usefixtures("small_chunks")
def test_a_conversion_is_compared_with_its_original(tmp_path):
    weights = random_weights(DENSE)
    first = write_folder(tmp_path / "bf16", DENSE, weights)
    second = write_folder(tmp_path / "mx", DENSE, stored(weights, MXFP8), num_shards=2)
    calls: list[tuple[int, int, str]] = []
    differences = compare(first, second, progress=lambda *call: calls.append(call))
    assert [d.name for d in differences] == sorted(weights, key=natural_order)
    for difference in differences:
        x = jnp.asarray(weights[difference.name])
        if not is_linear(difference.name):
            assert difference.is_equal and difference.sqnr_db == math.inf
            continue
        expected = measure(x, quantize(x)).sqnr_db
        assert difference.sqnr_db == pytest.approx(expected, abs=1e-3)
        assert (difference.first, difference.second) == ("bfloat16", "MXFP8")
        assert difference.max_difference and not difference.is_equal
    assert differing_layers(differences) == {"model.layers.0": 7, "model.layers.1": 7}
    done, totals, _ = zip(*calls, strict=True)
    assert list(done) == sorted(done) and {done[-1]} == set(totals)
    assert all(d.is_equal for d in compare(second, second))
    json.dumps([d.to_dict() for d in differences])


@pytest.mark.usefixtures("small_chunks")
def test_formats_of_one_model_do_not_differ(tmp_path):
    weights = random_weights(DENSE)
    folders = [
        write_folder(tmp_path / form.name, DENSE, stored(weights, form), num_shards=2)
        for form in WRITABLE.values()
    ]
    for other in folders[1:]:
        assert all(difference.is_equal for difference in compare(folders[0], other))


@pytest.mark.usefixtures("small_chunks")
def test_layers_that_differ_are_found(tmp_path):
    weights = random_weights(DENSE)
    first = write_folder(tmp_path / "first", DENSE, weights)
    other = dict(weights)
    del other["model.norm.weight"]
    other["model.extra.weight"] = np.ones(3, BF16)
    other[GATE] = weights[GATE].T.copy()
    changed = "model.layers.1.self_attn.q_proj.weight"
    other[changed] = weights[changed].copy()
    other[changed][79, 63] *= 2
    differences = {d.name: d for d in compare(first, write_folder(tmp_path, {}, other))}
    assert {name for name, d in differences.items() if not d.is_equal} == {
        *("model.norm.weight", "model.extra.weight", GATE, changed)
    }
    assert differences["model.norm.weight"].second == ""
    assert differences["model.extra.weight"].first == ""
    assert differences[GATE].second == "bfloat16 [64, 80]"
    value = abs(float(weights[changed][79, 63]))
    assert differences[changed].max_difference == value
    signal = np.sum(weights[changed].astype(np.float64) ** 2)
    expected = 10 * math.log10(signal / value**2)
    assert differences[changed].sqnr_db == pytest.approx(expected)


def test_stacks_in_either_order_are_compared(tmp_path, small_chunks):
    x = random_weights(MOE)["lm_head.weight"][:64].reshape(4, 16, 64)
    elements, codes = mx_bytes(quantize(jnp.asarray(x)), 64)
    straight = {"experts.down_proj": elements, "experts.down_proj_scale": codes}
    turned = {name: np.swapaxes(y, 1, 2).copy() for name, y in straight.items()}
    first = write_folder(tmp_path / "straight", {}, straight)
    (difference,) = compare(first, write_folder(tmp_path / "turned", {}, turned))
    assert difference.is_equal


@pytest.mark.parametrize(
    "a, b, sqnr, largest",
    [
        ([1.0, np.nan], [1.0, np.nan], math.inf, 0),
        ([1.0, np.inf], [1.0, np.inf], math.inf, 0),
        ([1.0, 0.0], [1.0, np.nan], None, math.nan),
        ([0.0, 0.0], [0.0, 1.0], -math.inf, 1),
        ([2.0, 0.0], [2.0, 0.2], 20, 0.2),
    ],
)
def test_special_values_are_compared(tmp_path, a, b, sqnr, largest):
    folders = [
        write_folder(tmp_path / name, {}, {"x": np.asarray([values], np.float32)})
        for name, values in (("a", a), ("b", b))
    ]
    (difference,) = compare(*folders)
    assert difference.max_difference == pytest.approx(largest, nan_ok=True)
    if sqnr is None:
        assert difference.sqnr_db is not None and math.isnan(difference.sqnr_db)
    else:
        assert difference.sqnr_db == pytest.approx(sqnr, abs=1e-5)
    assert difference.is_equal == (largest == 0)


def test_a_folder_that_is_broken_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        describe(tmp_path / "absent")
    good = write_folder(tmp_path / "good", DENSE, random_weights(DENSE))
    with pytest.raises(CheckpointError, match="no such folder"):
        compare(good, tmp_path / "absent")

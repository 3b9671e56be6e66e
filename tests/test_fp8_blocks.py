"""Checkpoints in FP8 with a scale for 128 x 128 elements, as DeepSeek stores them.

There is no package that writes them on a CPU; they are made here from what their
readers expect.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from jmx8._mx_array import dequantize, quantize
from jmx8.checkpoint import CheckpointError, load, open_folder
from jmx8.checkpoint._load import _leaves
from jmx8.checkpoint.formats import FP8_BLOCKS
from jmx8.checkpoint.stored import is_power_of_two

from .mx_checkpoints import (
    assert_same,
    BF16,
    bits,
    E4M3,
    E8M0,
    is_linear,
    MOE,
    random_weights,
    use_small_chunks,
    write_folder,
)


GATE = "model.layers.0.mlp.gate_proj.weight"
EXPERTS = "model.layers.1.mlp.experts"


@pytest.fixture
def small_chunks(monkeypatch):
    use_small_chunks(monkeypatch)


def block_fp8(x, scale_dtype=np.float32, powers=True):
    """Returns elements and scales of 128 x 128 blocks, as DeepSeek stores them."""
    n, k = x.shape
    rows, columns = -(-n // 128), -(-k // 128)
    blocks = np.zeros((rows * 128, columns * 128), np.float32)
    blocks[:n, :k] = x
    blocks = blocks.reshape(rows, 128, columns, 128)
    scales = np.abs(blocks).max((1, 3)) / 448
    scales = np.exp2(np.ceil(np.log2(scales))) if powers else scales
    elements = (blocks / scales[:, None, :, None]).astype(E4M3)
    elements = elements.reshape(rows * 128, columns * 128)[:n, :k]
    if scale_dtype != np.float32:
        codes = (np.log2(scales) + 127).astype(np.uint8)
        return elements, codes.view(scale_dtype)
    return elements, scales.astype(np.float32)


# More than one block in both directions, and sizes that are no multiples of a block.
LARGE = MOE | {"hidden_size": 160, "intermediate_size": 208, "head_dim": 36}
LARGE |= {"moe_intermediate_size": 144}


def deepseek(tensors, **kwargs):
    result = {}
    for name, x in tensors.items():
        if is_linear(name):
            # Blocks of different magnitudes, so that a wrong scale is seen.
            rows = np.exp2(np.arange(x.shape[0]) // 128 * 3)[:, None]
            columns = np.exp2(np.arange(x.shape[1]) // 128 * 5)
            values = x.astype(np.float32) * rows * columns
            result[name], result[f"{name}_scale_inv"] = block_fp8(values, **kwargs)
        else:
            result[name] = x
    return result


def block_values(tensors, name):
    """Returns what a weight in blocks stands for, element by element."""
    elements, scales = tensors[name], tensors[f"{name}_scale_inv"]
    if scales.dtype != np.float32:
        scales = scales.view(E8M0).astype(np.float32)
    i, j = np.indices(elements.shape)
    return elements.astype(np.float32) * scales[i // 128, j // 128]


DEEPSEEK = {
    "quantization_config": {
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
        "scale_fmt": "ue8m0",
    }
}


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("scale_dtype", [np.float32, np.uint8, E8M0])
def test_blocks_with_powers_of_two_keep_their_elements(tmp_path, scale_dtype):
    tensors = deepseek(random_weights(LARGE), scale_dtype=scale_dtype)
    folder = write_folder(tmp_path, LARGE | DEEPSEEK, tensors, num_shards=2)
    assert open_folder(folder).format is FP8_BLOCKS
    leaves = _leaves(load(folder))
    for layer, module in ((0, "mlp.down_proj"), (1, "self_attn.q_proj")):
        name = f"model.layers.{layer}.{module}.weight"
        leaf = leaves[f"layers/{layer}/{module.replace('.', '/')}/weight"]
        k = leaf.shape[-1]
        np.testing.assert_array_equal(
            bits(leaf.elements)[:, :k], tensors[name].view(np.uint8)
        )
        np.testing.assert_array_equal(dequantize(leaf), block_values(tensors, name))
    for expert in range(4):
        name = f"{EXPERTS}.{expert}.down_proj.weight"
        w2 = dequantize(leaves["layers/1/mlp/experts/w2"])[expert]
        np.testing.assert_array_equal(w2, block_values(tensors, name))


@pytest.mark.usefixtures("small_chunks")
def test_stacks_in_blocks_are_read_either_way(tmp_path):
    singles = deepseek(random_weights(LARGE), scale_dtype=E8M0)
    expected = load(write_folder(tmp_path / "single", LARGE, singles))
    dense = {name: x for name, x in singles.items() if "experts" not in name}
    # A stack of gate and up would have other blocks: 144 rows end inside of one.
    gates = {n: x for n, x in singles.items() if "experts" in n and "down" not in n}
    down = {
        f"{EXPERTS}.down_proj{end}": np.stack(
            [singles[f"{EXPERTS}.{e}.down_proj.weight{end}"] for e in range(4)]
        )
        for end in ("", "_scale_inv")
    }
    turned = {n: np.ascontiguousarray(np.swapaxes(x, 1, 2)) for n, x in down.items()}
    for way, stack in (("straight", down), ("turned", turned)):
        folder = write_folder(tmp_path / way, LARGE, dense | gates | stack)
        assert_same(load(folder), expected)


@pytest.mark.parametrize("value", [0.3, 0.0, -2.0, np.nan, np.inf, 2.0**-130])
def test_other_scales_are_refused_or_rounded_when_asked(tmp_path, value):
    tensors = deepseek(random_weights(LARGE))
    scales = tensors[f"{GATE}_scale_inv"]
    scales[1, 1] = value
    write_folder(tmp_path, LARGE | DEEPSEEK, tensors)
    with pytest.raises(CheckpointError) as info:
        load(tmp_path)
    (line,) = info.value.problems
    assert f"{GATE}_scale_inv: scale {float(np.float32(value)):.9g} in row 1" in line
    assert "not a power of two" in line and "requantize=True" in line
    if not np.isfinite(value):
        with pytest.raises(CheckpointError, match=f"{GATE}: weights must be finite"):
            load(tmp_path, requantize=True)
        return
    model, report = load(tmp_path, requantize=True, return_report=True)
    leaf = _leaves(model)["layers/0/mlp/gate_proj/weight"]
    expected = quantize(jnp.asarray(block_values(tensors, GATE)))
    np.testing.assert_array_equal(bits(leaf.elements), bits(expected.elements))
    np.testing.assert_array_equal(bits(leaf.scales), bits(expected.scales))
    rows = {row.path: row for row in report.converted}
    rounded = rows["layers/0/mlp/gate_proj/weight"]
    assert rounded.statistics is not None and rounded.reason != "stored as MXFP8"
    other = rows["layers/0/mlp/up_proj/weight"]
    assert other.statistics is None and other.reason == "stored as MXFP8"


def test_powers_of_two_are_known_by_their_bits():
    yes = np.asarray([2.0**-127, 2.0**-126, 0.5, 1, 2.0**127], np.float32)
    no = [0, -1, 2.0**-128, 2.0**-149, 3, 1 + 2.0**-23, np.inf, np.nan]
    no = np.asarray(no, np.float32)
    assert is_power_of_two(yes).all() and not is_power_of_two(no).any()
    assert is_power_of_two(yes.astype(BF16)).all()

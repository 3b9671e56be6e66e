from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jmx8.checkpoint.plan
import jmx8.checkpoint.stream
from jmx8._mx_array import dequantize, MXArray, quantize
from jmx8.checkpoint import CheckpointError, load
from jmx8.checkpoint._load import _check_arguments, _leaves
from jmx8.checkpoint.names import QWEN3
from jmx8.convert import measure, quantize_model
from jmx8.models import Qwen3, Qwen3Config
from jmx8.nn import MXExperts, MXLinear

from . import hf
from .checkpoints import DENSE, MOE, random_tensors, write_checkpoint


CONFIGS = {"dense": DENSE, "moe": MOE}


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


@pytest.fixture
def small_chunks(monkeypatch):
    """Makes every tensor of the small checkpoints take several chunks."""
    monkeypatch.setattr(jmx8.checkpoint.plan, "CHUNK_BYTES", 640)
    monkeypatch.setattr(jmx8.checkpoint.stream, "CHUNK_BYTES", 640)


def as_jax(tensor):
    return jnp.asarray(tensor.float().numpy()).astype(str(tensor.dtype).split(".")[1])


def expected_parameter(path, tensors):
    """Returns a parameter as a plain array, put together from the tensors by hand."""
    name = f"model.{path}".replace("/", ".").replace("model.lm_head", "lm_head")
    if "experts" not in name:
        return as_jax(tensors[name])
    prefix, _, which = name.rpartition(".")
    projections = {"w13": ("gate_proj", "up_proj"), "w2": ("down_proj",)}[which]
    experts = []
    while f"{prefix}.{len(experts)}.down_proj.weight" in tensors:
        rows = [tensors[f"{prefix}.{len(experts)}.{p}.weight"] for p in projections]
        experts.append(as_jax(torch.cat(rows)))
    return jnp.stack(experts)


def bits(x):
    return np.asarray(x).view(f"u{x.dtype.itemsize}")


def assert_bit_equal(actual, expected):
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    if isinstance(expected, MXArray):
        assert (actual.padding, actual.transposed) == (expected.padding, False)
        np.testing.assert_array_equal(bits(actual.elements), bits(expected.elements))
        np.testing.assert_array_equal(bits(actual.scales), bits(expected.scales))
    else:
        np.testing.assert_array_equal(bits(actual), bits(expected))


@pytest.mark.parametrize("num_shards", [1, 3])
def test_each_parameter_is_quantize_of_its_tensors(
    tmp_path, config, num_shards, small_chunks
):
    tensors = random_tensors(config)
    model = load(write_checkpoint(tmp_path, config, tensors, num_shards=num_shards))
    kinds = set()
    for path, leaf in _leaves(model).items():
        expected = expected_parameter(path, tensors)
        converted = any(name in path for name in ("_proj/", "/w13", "/w2"))
        assert_bit_equal(leaf, quantize(expected) if converted else expected)
        kinds.add(type(leaf))
    assert MXArray in kinds
    assert isinstance(model.layers[0].self_attn.q_proj, MXLinear)
    if config is MOE:
        mlp: Any = model.layers[1].mlp
        assert isinstance(mlp.experts, MXExperts)


def test_chunks_do_not_change_a_byte(tmp_path, config, monkeypatch):
    folder = write_checkpoint(tmp_path, config, random_tensors(config))
    whole = load(folder)
    monkeypatch.setattr(jmx8.checkpoint.stream, "CHUNK_BYTES", 640)
    names = []
    chunked = load(folder, progress=lambda done, total, name: names.append(name))
    assert len(names) > 2 * len(set(names))
    for actual, expected in zip(
        jax.tree.leaves(chunked), jax.tree.leaves(whole), strict=True
    ):
        assert_bit_equal(actual, expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_without_conversion_tensors_are_cast(tmp_path, config, dtype, stored):
    tensors = random_tensors(config, stored)
    model = load(write_checkpoint(tmp_path, config, tensors), dtype=dtype)
    for path, leaf in _leaves(model).items():
        assert_bit_equal(leaf, expected_parameter(path, tensors).astype(dtype))


@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
def test_weights_are_quantized_from_the_dtype_on_disk(tmp_path, stored):
    tensors = random_tensors(DENSE, stored)
    model = load(write_checkpoint(tmp_path, DENSE, tensors))
    weight = _leaves(model)["layers/0/mlp/down_proj/weight"]
    tensor = expected_parameter("layers/0/mlp/down_proj/weight", tensors)
    expected = quantize(tensor)
    assert weight.dtype == jnp.bfloat16
    assert weight.padding == 16
    np.testing.assert_array_equal(bits(weight.elements), bits(expected.elements))
    np.testing.assert_array_equal(bits(weight.scales), bits(expected.scales))
    assert model.embed_tokens.weight.dtype == jnp.bfloat16


def test_load_equals_loading_all_and_then_converting(tmp_path, config):
    folder = write_checkpoint(tmp_path, config, random_tensors(config))
    skip = ["layers/0", "re:q_proj"]
    streamed = load(folder, skip=skip, activations="mxfp8")
    converted = quantize_model(
        load(folder, dtype="bfloat16"), skip=skip, activations="mxfp8"
    )
    assert jax.tree.structure(streamed) == jax.tree.structure(converted)
    for actual, expected in zip(
        jax.tree.leaves(streamed), jax.tree.leaves(converted), strict=True
    ):
        assert_bit_equal(actual, expected)


def test_only_and_skip_choose_layers(tmp_path):
    folder = write_checkpoint(tmp_path, MOE, random_tensors(MOE))
    model, report = load(
        folder, only=["lm_head", "*/experts"], skip="*/q_proj/*", return_report=True
    )
    assert {row.path for row in report.converted} == {
        "layers/1/mlp/experts/w13",
        "layers/1/mlp/experts/w2",
        "lm_head/weight",
    }
    assert isinstance(model.lm_head, MXLinear)
    assert isinstance(model.layers[0].self_attn.q_proj, eqx.nn.Linear)


FIELDS = {
    "dense": hf.DENSE,
    "dense tied": hf.DENSE | {"tie_word_embeddings": True, "attention_bias": True},
    "moe": hf.MOE | {"mlp_only_layers": [0], "tie_word_embeddings": True},
}


@pytest.mark.parametrize("fields", FIELDS)
def test_a_model_saved_by_transformers_has_the_logits_of_transformers(tmp_path, fields):
    torch_model = hf.random_hf_model(**FIELDS[fields])
    torch_model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    model = load(tmp_path, dtype="float32")
    tokens = np.random.default_rng(0).integers(0, 97, 16)
    expected = hf.hf_logits(torch_model, tokens.tolist())
    with jax.default_matmul_precision("highest"):
        logits, _ = model(jnp.asarray(tokens, jnp.int32)[None])
    # Both in float32, which orders its sums differently; as in the parity tests.
    limit = 1e-4 * (expected.max() - expected.min())
    np.testing.assert_allclose(logits[0], expected, rtol=0, atol=limit)
    # The converted model is the same model with rounded weights.
    converted, _ = load(tmp_path)(jnp.asarray(tokens, jnp.int32)[None])
    assert np.corrcoef(converted[0].ravel(), expected.ravel())[0, 1] > 0.9


def fuse_experts(tensors):
    """Returns the tensors with the experts of layer 1 fused as in transformers 5."""
    experts = "model.layers.1.mlp.experts"
    fused = {name: x for name, x in tensors.items() if "experts" not in name}
    parts = {
        projection: torch.stack(
            [tensors[f"{experts}.{e}.{projection}.weight"] for e in range(4)]
        )
        for projection in ("gate_proj", "up_proj", "down_proj")
    }
    gate_up = torch.cat([parts["gate_proj"], parts["up_proj"]], dim=1)
    return fused | {
        f"{experts}.gate_up_proj": gate_up,
        f"{experts}.down_proj": parts["down_proj"],
    }


@pytest.mark.usefixtures("small_chunks")
def test_fused_experts_are_the_same_model(tmp_path):
    tensors = random_tensors(MOE)
    single = load(write_checkpoint(tmp_path / "single", MOE, tensors))
    fused = load(write_checkpoint(tmp_path / "fused", MOE, fuse_experts(tensors)))
    for actual, expected in zip(
        jax.tree.leaves(fused), jax.tree.leaves(single), strict=True
    ):
        assert_bit_equal(actual, expected)


def test_experts_given_fused_and_one_by_one_are_refused(tmp_path):
    tensors = random_tensors(MOE)
    tensors |= fuse_experts(tensors)
    write_checkpoint(tmp_path, MOE, tensors)
    with pytest.raises(CheckpointError, match="given twice") as info:
        load(tmp_path)
    assert len(info.value.problems) == 2
    assert "model.layers.1.mlp.experts.gate_up_proj: given twice" in str(info.value)


def test_a_copy_of_the_tied_embedding_must_be_one(tmp_path):
    tensors = random_tensors(DENSE)
    folder = write_checkpoint(tmp_path, DENSE, tensors)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    write_checkpoint(tmp_path, DENSE, tensors)
    assert load(folder).lm_head is None
    tensors["lm_head.weight"][69, 63] += 1
    write_checkpoint(tmp_path, DENSE, tensors)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: differs from .* ties"):
        load(folder)
    tensors["lm_head.weight"] = torch.zeros(69, 64)
    write_checkpoint(tmp_path, DENSE, tensors)
    with pytest.raises(CheckpointError) as info:
        load(folder)
    assert "lm_head.weight: dtype must be that of" in info.value.problems[0]
    assert "lm_head.weight: shape must be [70, 64]" in info.value.problems[1]


@pytest.fixture
def moe_folder(tmp_path):
    return write_checkpoint(tmp_path, MOE, random_tensors(MOE))


def test_a_pattern_that_matches_nothing_is_an_error(moe_folder):
    with pytest.raises(ValueError, match="matches no tensor"):
        load(moe_folder, skip="*/qproj")


@pytest.mark.usefixtures("small_chunks")
def test_the_report_has_what_is_on_disk_and_measures_it(tmp_path):
    tensors = random_tensors(MOE, torch.float32)
    tensors["model.layers.1.mlp.experts.2.up_proj.weight"][3] *= 100
    tensors["model.layers.0.mlp.up_proj.weight"].zero_()
    model, report = load(write_checkpoint(tmp_path, MOE, tensors), return_report=True)
    leaves = _leaves(model)
    assert [row.path for row in report.rows] == list(leaves)
    for row in report.rows:
        x = expected_parameter(row.path, tensors)
        assert row.shape == x.shape
        assert (row.dtype, row.bytes_before) == ("float32", x.nbytes)
        assert row.bytes_after == leaves[row.path].nbytes
        assert (row.statistics is None) == (row.action == "kept")
        if row.statistics is not None:
            expected = measure(x, quantize(x))
            assert row.statistics.amax == expected.amax
            assert row.statistics.exponent_min == expected.exponent_min
            assert row.statistics.exponent_max == expected.exponent_max
            # Sums of squares in another order.
            np.testing.assert_allclose(
                row.statistics.sqnr_db, expected.sqnr_db, rtol=1e-5
            )


def test_the_report_of_an_unconverted_model_says_so(tmp_path):
    folder = write_checkpoint(tmp_path, DENSE, random_tensors(DENSE))
    _, report = load(folder, dtype="float32", return_report=True)
    assert not report.converted
    assert {row.reason for row in report.rows} == {"loaded as float32"}
    assert report.bytes_after == 2 * report.bytes_before


@pytest.mark.usefixtures("small_chunks")
def test_progress_counts_every_byte_once(tmp_path):
    tensors = random_tensors(MOE)
    calls = []
    load(
        write_checkpoint(tmp_path, MOE, tensors, num_shards=2),
        progress=lambda *call: calls.append(call),
    )
    done, totals, names = zip(*calls, strict=True)
    assert list(done) == sorted(set(done))
    assert set(totals) == {sum(x.nbytes for x in tensors.values())} == {done[-1]}
    assert set(names) == set(tensors)


def test_rows_are_written_in_place(tmp_path, monkeypatch):
    """The buffer of a parameter never moves, and its final dtype is a view of it."""
    pointers = {}
    target = jmx8.checkpoint.stream._Target
    write, finish = target.write, target.finish

    def watch(self):
        return [buffer.unsafe_buffer_pointer() for buffer in self.buffers]

    def watched_write(self, *args, **kwargs):
        pointers.setdefault(id(self), watch(self))
        result = write(self, *args, **kwargs)
        assert watch(self) == pointers[id(self)]
        return result

    def watched_finish(self):
        leaf = finish(self)
        found = [array.unsafe_buffer_pointer() for array in jax.tree.leaves(leaf)]
        assert found == pointers.pop(id(self))
        return leaf

    monkeypatch.setattr(jmx8.checkpoint.stream, "CHUNK_BYTES", 2**16)
    monkeypatch.setattr(target, "write", watched_write)
    monkeypatch.setattr(target, "finish", watched_finish)
    config = MOE | {"hidden_size": 256, "moe_intermediate_size": 512}
    load(write_checkpoint(tmp_path, config, random_tensors(config)))
    assert not pointers


@pytest.mark.parametrize("shape", [(64, 512, 1024)])
@pytest.mark.parametrize("quantized", [True, False])
def test_writing_rows_needs_no_memory_of_the_size_of_the_stack(shape, quantized):
    leaf = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    leaf = jax.eval_shape(quantize, leaf) if quantized else leaf
    dtypes = [part.dtype for part in jax.tree.leaves(leaf)]
    buffers = tuple(
        jax.ShapeDtypeStruct(part.shape, jmx8.checkpoint.stream._storage_dtype(dtype))
        for part, dtype in zip(jax.tree.leaves(leaf), dtypes, strict=True)
    )
    rows = jax.ShapeDtypeStruct((64, shape[-1]), jnp.bfloat16)
    compiled = jmx8.checkpoint.stream._write.lower(
        buffers,
        rows,
        jax.ShapeDtypeStruct((), jnp.int32),
        dtype=jnp.dtype(jnp.bfloat16),
        quantized=quantized,
        return_quantized=False,
    ).compile()
    memory: Any = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= sum(x.size * x.dtype.itemsize for x in buffers)
    assert memory.temp_size_in_bytes < 2 * rows.size


def test_a_loaded_model_can_be_donated(tmp_path):
    folder = write_checkpoint(tmp_path, DENSE, random_tensors(DENSE))
    model, again = load(folder), load(folder)
    add = jax.jit(lambda w: w.view(jnp.uint8) ^ jnp.uint8(1), donate_argnums=0)
    elements = _leaves(model)["layers/0/mlp/up_proj/weight"].elements
    expected = bits(elements) ^ 1
    np.testing.assert_array_equal(add(elements), expected)
    untouched = _leaves(again)["layers/0/mlp/up_proj/weight"].elements
    np.testing.assert_array_equal(bits(untouched), expected ^ 1)


def test_the_loaded_model_runs_jitted(tmp_path, config):
    model = load(write_checkpoint(tmp_path, config, random_tensors(config)))
    logits, _ = eqx.filter_jit(lambda model, x: model(x))(
        model, jnp.arange(6, dtype=jnp.int32)[None]
    )
    assert logits.shape == (1, 6, 70)
    assert bool(jnp.all(jnp.isfinite(logits)))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("fp8", None, None, "raise"), "dtype must be one of"),
        (("mxfp8", None, None, "ignore"), 'must be "raise" or "keep"'),
        (("bfloat16", "lm_head", None, "raise"), "skip and only choose what becomes"),
        (("float32", None, "lm_head", "raise"), "skip and only choose what becomes"),
    ],
)
def test_arguments_are_checked(arguments, message):
    # Called directly: under the test suite's type checker `load` refuses these itself.
    with pytest.raises(ValueError, match=message):
        _check_arguments(*arguments)


@pytest.mark.parametrize("config", [DENSE | {"attention_bias": True}, MOE])
def test_the_table_knows_every_parameter(config):
    model = eqx.filter_eval_shape(
        Qwen3, Qwen3Config.from_hf(config), key=jax.random.key(0)
    )
    for path, leaf in _leaves(model).items():
        assert QWEN3.alternatives(path, leaf.shape)
    with pytest.raises(ValueError, match="no rule for a parameter 'layers/0/mlp/w13'"):
        QWEN3.alternatives("layers/0/mlp/w13", (4, 8, 8))


def test_infinite_weights_can_be_kept(tmp_path):
    tensors = random_tensors(DENSE)
    tensors["model.layers.0.mlp.up_proj.weight"][1, 2] = float("inf")
    model = load(write_checkpoint(tmp_path, DENSE, tensors), on_nonfinite="keep")
    path = "layers/0/mlp/up_proj/weight"
    expected = quantize(expected_parameter(path, tensors))
    assert_bit_equal(_leaves(model)[path], expected)
    assert float(dequantize(expected)[1, 2]) > 1e38
    unconverted = load(tmp_path, dtype="bfloat16", on_nonfinite="keep")
    assert bool(jnp.isinf(_leaves(unconverted)[path][1, 2]))

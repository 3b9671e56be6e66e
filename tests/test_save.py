"""Models in memory to checkpoints and back; Orbax."""

import jax
import jax.numpy as jnp
import pytest

import jmx8
from jmx8 import CheckpointError, load, quantize_checkpoint
from jmx8._mx_array import quantize
from jmx8.checkpoint import open_folder
from jmx8.checkpoint.formats import WRITABLE

from .helpers import assert_bits_equal
from .mx_checkpoints import DENSE, MOE, random_weights, write_folder


ALIGNED = {"head_dim": 32, "intermediate_size": 96}
CONFIGS = {
    "dense": DENSE | ALIGNED,
    "moe": MOE | ALIGNED | {"moe_intermediate_size": 64},
}


def read_all(folder):
    sources = open_folder(folder).sources
    return {name: s.file.read(name) for name, s in sources.items()}


def assert_same_tree(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert_bits_equal(x, y)


@pytest.mark.parametrize(
    "name, form",
    [("dense", "mxfp8"), ("moe", "modelopt"), ("moe", "compressed-tensors")],
)
def test_a_loaded_model_is_saved_as_its_checkpoint_is_converted(tmp_path, name, form):
    config = CONFIGS[name]
    source = write_folder(tmp_path / "in", config, random_weights(config))
    (source / "tokenizer.json").write_text("{}")
    model = load(source)
    jmx8.save(model, tmp_path / "saved", source=source, format=form, shard_bytes=60_000)
    quantize_checkpoint(source, tmp_path / "converted", format=form)
    saved, converted = (read_all(tmp_path / n) for n in ("saved", "converted"))
    assert saved.keys() == converted.keys()
    for tensor, x in converted.items():
        assert saved[tensor].dtype == x.dtype
        assert_bits_equal(saved[tensor], x)
    for file in ("config.json", "tokenizer.json"):
        text = (tmp_path / "converted" / file).read_bytes()
        assert (tmp_path / "saved" / file).read_bytes() == text
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    assert_same_tree(load(tmp_path / "saved"), model)


def test_prepared_weights_are_saved_in_their_canonical_form(tmp_path, monkeypatch):
    pytest.importorskip("jax_tvm_ffi")
    from . import emulated_flashinfer

    config = CONFIGS["moe"] | {"num_hidden_layers": 1, "mlp_only_layers": []}
    source = write_folder(tmp_path / "in", config, random_weights(config))
    expected = load(source, activations="bf16")
    jmx8.save(expected, tmp_path / "a", source=source)
    emulated_flashinfer.use(monkeypatch)
    prepared = load(source, activations="mxfp8")
    assert len(jax.tree.leaves(prepared)) and str(prepared).count("PreparedWeights")
    jmx8.save(prepared, tmp_path / "b", source=source)
    a, b = (tmp_path / name / "model.safetensors" for name in "ab")
    assert a.read_bytes() == b.read_bytes()


def test_columns_that_are_no_multiple_of_32_come_back(tmp_path):
    source = write_folder(tmp_path / "in", MOE, random_weights(MOE))
    model = load(source)
    jmx8.save(model, tmp_path / "out", source=source)
    assert_same_tree(load(tmp_path / "out"), model)


def test_what_cannot_be_saved_is_refused(tmp_path):
    config = CONFIGS["dense"]
    source = write_folder(tmp_path / "in", config, random_weights(config))
    model = load(source)
    other = write_folder(tmp_path / "other", MOE, random_weights(MOE))
    with pytest.raises(CheckpointError, match="describes another model"):
        jmx8.save(model, tmp_path / "out", source=other)
    with pytest.raises(CheckpointError, match="only read"):
        jmx8.save(model, source / "out", source=source)
    with pytest.raises(ValueError, match="of no family"):
        jmx8.save({"w": jnp.ones((2, 2))}, tmp_path / "out", source=source)
    assert not (tmp_path / "out").exists()
    jmx8.save(model, tmp_path / "out", source=source)
    with pytest.raises(CheckpointError, match="holds other output"):
        jmx8.save(model, tmp_path / "out", source=source)


@pytest.mark.parametrize("first", WRITABLE)
@pytest.mark.parametrize("second", WRITABLE)
def test_through_a_model_there_and_back_is_byte_identical(tmp_path, first, second):
    config = CONFIGS["dense"] | {"num_hidden_layers": 1}
    source = write_folder(tmp_path / "in", config, random_weights(config))
    quantize_checkpoint(source, tmp_path / "a", format=first)
    jmx8.save(load(tmp_path / "a"), tmp_path / "b", source=source, format=second)
    jmx8.save(load(tmp_path / "b"), tmp_path / "c", source=source, format=first)
    a, c = (tmp_path / name / "model.safetensors" for name in "ac")
    assert read_all(tmp_path / "a").keys() == read_all(tmp_path / "c").keys()
    for name, x in read_all(tmp_path / "a").items():
        assert_bits_equal(read_all(tmp_path / "c")[name], x)
    assert a.stat().st_size == c.stat().st_size


def test_orbax_restores_every_bit(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    weight = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
    codes = jnp.arange(256, dtype=jnp.uint8)
    every_code = jmx8.MXArray(
        jnp.repeat(codes[:, None], 32, 1).view(jnp.float8_e4m3fn),
        codes[:, None].view(jnp.float8_e8m0fnu),
    )
    tree = {
        "w": quantize(weight(0, 3, 40, 80).astype(jnp.bfloat16)),
        "kernels": [quantize(weight(1, 64, 32), axis=-2)],
        "codes": every_code,
        "norm": jnp.ones(7, jnp.bfloat16),
    }
    abstract = jax.eval_shape(lambda: tree)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "tree", tree)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "tree", abstract)
    assert_same_tree(restored, tree)
    assert restored["w"].padding == 16 and restored["kernels"][0].transposed

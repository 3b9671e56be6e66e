import json

import pytest

from jmx8._mx_array import MXArray
from jmx8.checkpoint import CheckpointError, load, open_folder
from jmx8.checkpoint._load import _abstract_model, _family, _leaves
from jmx8.checkpoint.stored import find_weights

from .checkpoints import MOE, random_tensors, write_checkpoint


def kept(folder, entries, key="ignore"):
    """Returns the weights that an ignore list keeps, by path, with the reason."""
    config = open_folder(folder).config | {"quantization_config": {key: entries}}
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint = open_folder(folder)
    family, weights = _family(checkpoint), find_weights(checkpoint)
    _, report = _abstract_model(
        checkpoint, weights, family, "mxfp8", None, None, "auto"
    )
    return skipped(report)


def skipped(report):
    return {
        row.path: row.reason for row in report.kept if row.reason.startswith("skip:")
    }


@pytest.fixture
def moe_folder(tmp_path):
    return write_checkpoint(tmp_path, MOE, random_tensors(MOE))


LAYER_1 = {f"layers/1/self_attn/{p}_proj/weight" for p in "qkvo"}
EXPERTS = {"layers/1/mlp/experts/w13", "layers/1/mlp/experts/w2"}


@pytest.mark.parametrize(
    "entry, paths",
    [
        ("model.layers.1.self_attn.q_proj", {"layers/1/self_attn/q_proj/weight"}),
        ("layers.1.self_attn.q_proj", {"layers/1/self_attn/q_proj/weight"}),
        (
            "model.layers.1.self_attn.q_proj.weight",
            {"layers/1/self_attn/q_proj/weight"},
        ),
        ("model.layers.1.self_attn", LAYER_1),
        ("layers.1.", LAYER_1 | EXPERTS),
        ("q_proj", {f"layers/{i}/self_attn/q_proj/weight" for i in (0, 1)}),
        ("lm_head", set()),
        ("mlp.gate", set()),
        ("mlp.gate.", set()),
        (
            "re:.*self_attn\\.q_proj$",
            {f"layers/{i}/self_attn/q_proj/weight" for i in (0, 1)},
        ),
        ("re:self_attn", set()),
        ("re:layers.1.self", LAYER_1),
        ("*layers.1.self_attn*", LAYER_1),
        ("*mlp.gate.*", set()),
        ("*.down_proj", {"layers/0/mlp/down_proj/weight"} | EXPERTS),
        ("model.layers.1.mlp.experts", EXPERTS),
        ("model.layers.1.mlp.experts.3.up_proj", EXPERTS),
        ("re:.*experts\\.2\\..*", EXPERTS),
        ("model.layers.1.mlp.experts.gate_up_proj", EXPERTS),
        ("", set()),
        ("visual", set()),
    ],
)
def test_an_entry_of_the_ignore_list_keeps(moe_folder, entry, paths):
    found = kept(moe_folder, [entry])
    default = {"lm_head/weight", "layers/1/mlp/gate/weight"}
    assert set(found) - default == paths
    for reason in found.values():
        assert reason == f"skip: `{entry}` in config.json's ignore"


@pytest.mark.parametrize(
    "key", ["modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules"]
)
def test_every_name_of_the_ignore_list_is_read(moe_folder, key):
    assert set(kept(moe_folder, ["self_attn"], key)) == {
        f"layers/{i}/self_attn/{p}_proj/weight" for i in (0, 1) for p in "qkvo"
    }


def test_the_ignore_list_adds_to_the_arguments(tmp_path):
    config = MOE | {"quantization_config": {"ignore": ["q_proj", "experts.1"]}}
    write_checkpoint(tmp_path, config, random_tensors(MOE))
    only = "re:layers/1/(self_attn|mlp/experts)/"
    model, report = load(tmp_path, only=only, skip="*/k_proj", return_report=True)
    reasons = {
        "q_proj": "skip: `q_proj` in config.json's ignore",
        "k_proj": "skip: `*/k_proj`",
        "experts": "skip: `experts.1` in config.json's ignore",
    }
    for path, leaf in _leaves(model).items():
        found = [reason for name, reason in reasons.items() if f"/{name}/" in path]
        converted = ("layers/1/self_attn/v_proj", "layers/1/self_attn/o_proj")
        assert isinstance(leaf, MXArray) == path.startswith(converted)
        assert skipped(report).get(path) == (found[0] if found else None)


@pytest.mark.parametrize(
    "entry",
    [
        *(r"re:(\w+\.?)*!", "re:(.*)*x", "re:(a|a)+$", "re:((a+)b?){2,}x"),
        *("re:" + 7 * ".*" + "x", "re:([a-z]|x){1,99}y", "re:(?:(?:x*))*y"),
    ],
)
def test_expressions_that_take_forever_are_refused(moe_folder, entry):
    with pytest.raises(CheckpointError, match="could take forever to match"):
        kept(moe_folder, [entry])


@pytest.mark.parametrize(
    "entry",
    [
        r"re:.*layers\.\d+\.mlp\.(gate|up)_proj.*",
        r"re:(?!.*(\+\*)).*\.experts\.[0-9*+]+\.down_proj$",
        "re:(model.layers.(0|1)).self_attn.[qkv]_proj",
    ],
)
def test_expressions_that_lists_use_are_taken(moe_folder, entry):
    assert kept(moe_folder, [entry])

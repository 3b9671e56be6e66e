import re

import pytest

from jmx8.convert import compile_patterns, DEFAULT_SKIP
from jmx8.convert._patterns import first_match, idle_patterns


def matches(pattern, path, leaf=None):
    return compile_patterns("skip", pattern)[0].matches(path, leaf)


@pytest.mark.parametrize(
    "pattern, path",
    [
        ("lm_head/weight", "lm_head/weight"),
        ("lm_head", "lm_head/weight"),
        ("lm_head/", "lm_head/weight"),
        ("layers/0", "layers/0/mlp/up_proj/weight"),
        ("layers/*/mlp", "layers/12/mlp/up_proj/weight"),
        ("*/q_proj", "layers/0/self_attn/q_proj/weight"),
        ("*q_proj*", "layers/0/self_attn/q_proj/weight"),
        ("layers/[01]/mlp", "layers/1/mlp/up_proj/weight"),
        ("layers/?/mlp", "layers/7/mlp/up_proj/weight"),
        ("*", "a"),
        ("model.layers.0.*", "model.layers.0.mlp.gate.weight"),
        ("re:q_proj", "layers/0/self_attn/q_proj/weight"),
        ("re:^layers/[0-3]/", "layers/2/mlp/up_proj/weight"),
        ("re:(k|v)_proj/weight$", "layers/0/self_attn/v_proj/weight"),
    ],
)
def test_pattern_matches(pattern, path):
    assert matches(pattern, path)


@pytest.mark.parametrize(
    "pattern, path",
    [
        ("lm_head", "lm_head_norm/weight"),
        ("lm_head", "model/lm_head/weight"),
        ("weight", "lm_head/weight"),
        ("layers/1", "layers/12/mlp/up_proj/weight"),
        ("layers/?/mlp", "layers/12/mlp/up_proj/weight"),
        ("LM_HEAD", "lm_head/weight"),
        ("*/q_proj", "q_proj/weight"),
        ("re:^q_proj", "layers/0/self_attn/q_proj/weight"),
        ("re:layers/[0-3]/", "layers/12/mlp/up_proj/weight"),
    ],
)
def test_pattern_does_not_match(pattern, path):
    assert not matches(pattern, path)


def test_function_gets_path_and_leaf():
    seen = []

    def small(path, leaf):
        seen.append((path, leaf))
        return 1  # any true value

    assert matches(small, "a/b", "leaf") is True
    assert seen == [("a/b", "leaf")]


def test_none_one_or_several_patterns_are_accepted():
    assert compile_patterns("skip", None) == ()
    assert compile_patterns("skip", []) == ()
    assert len(compile_patterns("skip", "a")) == 1
    assert len(compile_patterns("skip", iter(["a", "re:b", lambda p, x: True]))) == 3


def test_first_match_is_the_first():
    patterns = compile_patterns("skip", ["x", "a", "*"])
    found = first_match(patterns, "a/b", None)
    assert found is not None and found.source == "a"
    assert first_match(patterns[:1], "a/b", None) is None


@pytest.mark.parametrize("bad", [3, [None], [b"bytes"], [("a", "b")]])
def test_wrong_type_is_named(bad):
    with pytest.raises(TypeError, match=r"only: a pattern is a glob, .* got "):
        compile_patterns("only", bad)


@pytest.mark.parametrize("bad", ["", "/", "re:"])
def test_empty_pattern_is_refused(bad):
    with pytest.raises(ValueError, match=re.escape(f"skip: pattern `{bad}` is empty")):
        compile_patterns("skip", ["a", bad])


def test_bad_regular_expression_is_refused():
    message = r"skip: `re:\(a` is not a regular expression: missing \)"
    with pytest.raises(ValueError, match=message):
        compile_patterns("skip", "re:(a")


def test_idle_patterns_are_named_with_the_nearest_path():
    leaves = [("layers/0/q_proj/weight", None), ("lm_head/weight", None)]
    patterns = compile_patterns(
        "skip",
        ["lm_head", "q_proj", "lm_heat/weight", "re:^zzz$", lambda p, x: False, "idle"],
        may_be_idle=["idle"],
    )
    assert idle_patterns("skip", patterns, leaves) == [
        "skip: `q_proj` matches no tensor. Globs match whole paths. Did you mean "
        "`*/q_proj`?",
        "skip: `lm_heat/weight` matches no tensor. The nearest path is "
        "`lm_head/weight`.",
        "skip: `re:^zzz$` matches no tensor.",
    ]


@pytest.mark.parametrize(
    "path, name",
    [
        ("embed_tokens/weight", "embedding"),
        ("params/Embed_0/embedding", "embedding"),
        ("transformer.wte.weight", "embedding"),
        ("wpe/weight", "embedding"),
        ("layers/0/input_layernorm/weight", "norm"),
        ("params/LayerNorm_0/scale", "norm"),
        ("layers/0/self_attn/q_norm/weight", "norm"),
        ("h/0/ln_1/weight", "norm"),
        ("ln_f/weight", "norm"),
        ("layers/0/ln2/weight", "norm"),
        ("a/bias", "bias"),
        ("layers/0/mlp/gate/e_score_correction_bias", "bias"),
        ("experts/w13_bias", "bias"),
        ("layers/0/mlp/gate/weight", "router"),
        ("model.layers.3.mlp.gate.weight", "router"),
        ("layers/0/block_sparse_moe/gate/weight", "router"),
        ("layers/0/feed_forward/router/weight", "router"),
        ("params/router_0/kernel", "router"),
        ("layers/0/mlp/shared_expert_gate/weight", "router"),
        ("lm_head/weight", "lm_head"),
        ("model/lm_head", "lm_head"),
    ],
)
def test_default_skip_keeps(path, name):
    found = [key for key, pattern in DEFAULT_SKIP.items() if matches(pattern, path)]
    assert name in found


@pytest.mark.parametrize(
    "path",
    [
        "layers/0/mlp/gate_proj/weight",
        "model.layers.0.mlp.experts.7.gate_proj.weight",
        "layers/0/mlp/experts/gate_up_proj",
        "layers/0/mlp/gate_up_proj/weight",
        "layers/0/self_attn/q_proj/weight",
        "layers/0/mlp/experts/w13",
        "layers/0/mlp/shared_expert/up_proj/weight",
        "params/Dense_0/kernel",
        "layers/0/linear1/weight",
        "layers/0/aggregate/weight",
        "kiln_0/weight",
        "normal_proj/weight",
    ],
)
def test_default_skip_does_not_keep(path):
    assert not any(matches(pattern, path) for pattern in DEFAULT_SKIP.values())

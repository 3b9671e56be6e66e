import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

from jmx8.convert import (
    DEFAULT_SKIP,
    params as params_module,
    quantize_params,
)

from .convert_helpers import (
    assert_same_bytes,
    converted_paths,
    is_mx,
    normal,
    quantized,
    small_tree,
)


def test_skip_adds_to_the_defaults():
    out = quantize_params(small_tree(), skip=["*/experts", "re:gate_proj"])
    assert converted_paths(out) == ["layers/0/q_proj/weight"]


def test_only_overrides_the_defaults():
    out = quantize_params(small_tree(), only=["lm_head", "embed", "layers/0/gate"])
    assert converted_paths(out) == [
        "embed/weight",
        "layers/0/gate/weight",
        "lm_head/weight",
    ]


def test_only_does_not_convert_what_cannot_be():
    out = quantize_params(small_tree(), only="*")
    assert len(converted_paths(out)) == 7
    assert not is_mx(out["layers"][0]["q_proj"]["bias"])
    assert not is_mx(out["layers"][0]["norm"]["weight"])
    assert not is_mx(out["steps"])


def test_skip_applies_within_only():
    out = quantize_params(small_tree(), only="layers/0", skip="*/gate")
    assert converted_paths(out) == [
        "layers/0/gate_proj/weight",
        "layers/0/q_proj/weight",
    ]


def test_functions_select_by_leaf():
    out = quantize_params(small_tree(), skip=lambda path, x: x.ndim == 3)
    assert converted_paths(out) == [
        "layers/0/gate_proj/weight",
        "layers/0/q_proj/weight",
    ]
    out = quantize_params(small_tree(), only=lambda path, x: x.shape == (50, 64))
    assert converted_paths(out) == [
        "embed/weight",
        "layers/0/gate/weight",
        "lm_head/weight",
    ]


def test_defaults_can_be_chosen_one_by_one():
    some = [pattern for name, pattern in DEFAULT_SKIP.items() if name != "lm_head"]
    tree = {
        "lm_head": {"weight": normal(0, (8, 32))},
        "q": {"weight": normal(1, (8, 32))},
    }
    tree["embed"] = {"weight": normal(2, (8, 32))}
    assert converted_paths(quantize_params(tree, only="*", skip=some)) == [
        "lm_head/weight",
        "q/weight",
    ]


def test_pattern_without_a_match_is_an_error():
    with pytest.raises(ValueError) as error:
        quantize_params(small_tree(), skip="q_proj", contract={"nowhere": -1})
    assert str(error.value) == (
        "quantize_params: skip: `q_proj` matches no tensor. Globs match whole paths. "
        "Did you mean `*/q_proj`?\n"
        "quantize_params: contract: `nowhere` matches no tensor."
    )
    with pytest.raises(ValueError, match="only: `lm_heat` matches no tensor"):
        quantize_params(small_tree(), only="lm_heat")


def test_only_that_asks_for_what_is_never_converted_is_an_error():
    with pytest.raises(ValueError) as error:
        quantize_params(small_tree(), only=["lm_head", "layers/0/norm"])
    assert str(error.value) == (
        "quantize_params: only: `layers/0/norm` matches nothing that can be converted; "
        "`layers/0/norm/weight`: fewer than 2 axes."
    )


def test_eight_bit_and_integer_leaves_are_kept():
    tree = {
        "a": {"weight": jnp.ones((4, 32), jnp.float8_e4m3fn)},
        "b": {"weight": jnp.ones((4, 32), jnp.float8_e8m0fnu)},
        "c": {"weight": jnp.ones((4, 32), jnp.int8)},
        "d": {"weight": jnp.ones((0, 32))},
        "e": jax.random.key(0),
    }
    out, report = quantize_params(tree, return_report=True)
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, out, tree))
    assert [row.reason for row in report.rows] == [
        "already 8 bits or fewer: float8_e4m3fn",
        "already 8 bits or fewer: float8_e8m0fnu",
        "not a float array: int8",
        "empty",
        "not a float array: key<fry>",
    ]


def test_second_conversion_changes_nothing():
    once = quantize_params(small_tree())
    twice, report = quantize_params(once, return_report=True)
    assert jax.tree.structure(twice) == jax.tree.structure(once)
    for a, b in zip(jax.tree.leaves(twice), jax.tree.leaves(once), strict=True):
        assert a is b
    assert report.converted == () and report.bytes_before == report.bytes_after
    assert {r.reason for r in report.rows if "experts" in r.path} == {"already MXFP8"}
    quantize_params(once, only="*/experts")


def test_unknown_axes_are_one_error_that_lists_them():
    tree = {
        "w": normal(0, (32, 64)),
        "experts": {"gate_up_proj": normal(1, (4, 32, 64))},
        "attention": {"kernel": normal(2, (64, 4, 16))},
        "c_attn": {"weight": normal(3, (32, 96))},
        "known": {"weight": normal(4, (32, 64))},
    }
    with pytest.raises(ValueError) as error:
        quantize_params(tree)
    assert str(error.value) == (
        "quantize_params: neither name nor module type says which axis a matmul "
        "contracts, for 4 of the leaves to convert:\n"
        "  attention/kernel  (64, 4, 16)\n"
        "  c_attn/weight  (32, 96)\n"
        "  experts/gate_up_proj  (4, 32, 64)\n"
        "  w  (32, 64)\n"
        "Pass `contract`, an axis or a mapping of patterns to axes: -1 for "
        "[..., n, k], used as x @ w.T, or -2 for [..., k, n], used as x @ w. Or keep "
        "them with `skip`."
    )
    assert not any(x.is_deleted() for x in jax.tree.leaves(tree))
    axes = {"w": -2, "experts/*": -1, "re:^attention": -2, "c_attn": 1, "*": -2}
    out = quantize_params(tree, contract=axes, donate=False)
    expected = {"w": -2, "c_attn": -1, "attention": -2, "experts": -1, "known": -2}
    for name, axis in expected.items():
        (x,), (w,) = (
            jax.tree.leaves(tree[name]),
            jax.tree.leaves(out[name], is_leaf=is_mx),
        )
        assert_same_bytes(w, quantized(x, axis=axis))


def test_one_axis_holds_for_every_leaf():
    tree = {"a": normal(0, (32, 64)), "b": {"weight": normal(1, (3, 32, 64))}}
    for axis in (-1, -2):
        out = quantize_params(tree, contract=axis, donate=False)
        assert_same_bytes(out["a"], quantized(tree["a"], axis=axis))
        assert_same_bytes(out["b"]["weight"], quantized(tree["b"]["weight"], axis=axis))


def test_axis_from_a_function_that_may_leave_it_to_inference():
    tree = {"a": normal(0, (32, 64)), "b": {"kernel": normal(1, (32, 64))}}
    out = quantize_params(
        tree, contract=lambda path, x: -1 if path == "a" else None, donate=False
    )
    assert_same_bytes(out["a"], quantized(tree["a"]))
    assert_same_bytes(out["b"]["kernel"], quantized(tree["b"]["kernel"], axis=-2))


@pytest.mark.parametrize(
    "contract, text",
    [
        (-3, "a: contract gives -3, not one of the last 2 axes of"),
        (0, "a: contract gives 0"),
        ({"a": True}, "a: contract gives True"),
        (lambda path, x: 1.0, "a: contract gives 1.0"),
    ],
)
def test_axis_that_is_none_of_the_last_two_is_an_error(contract, text):
    with pytest.raises((ValueError, TypeError), match=text):
        params_module.convert_tree(
            "quantize_params",
            {"a": normal(0, (2, 32, 64))},
            params_module.make_rules(None, None, contract),
            on_nonfinite="raise",
            donate=True,
            with_stats=False,
        )


def test_axis_against_the_module_type_is_an_error():
    linear = eqx.nn.Linear(32, 64, key=jax.random.key(0))
    text = "weight: contract gives -2, but eqx.nn.Linear contracts -1"
    with pytest.raises(ValueError, match=text):
        quantize_params(linear, contract=-2)


def test_contract_of_another_type_is_refused():
    with pytest.raises(TypeError, match=r"contract: an axis, a mapping .* got '-1'"):
        params_module.make_rules(None, None, "-1")

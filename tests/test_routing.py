"""`route` against its rule, spelled out in plain Python."""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from jmx8 import route


METHODS = ("softmax", "topk_softmax", "sigmoid", "sqrtsoftplus")
# name of the test case: options of `route`
RULES = {
    f"{method}{'' if renormalize else '_raw'}": {
        "method": method,
        "top_k": 5,
        "renormalize": renormalize,
        "scaling_factor": 2.5,
    }
    for method, renormalize in itertools.product(METHODS, (True, False))
}
RULES |= {
    f"{rule}_groups": RULES[rule] | {"num_groups": 4, "topk_groups": 2}
    for rule in ("softmax", "sigmoid", "sigmoid_raw")
}
NUM_EXPERTS = 16

jit_route = jax.jit(
    route,
    static_argnames=(
        "method",
        "top_k",
        "renormalize",
        "num_groups",
        "topk_groups",
        "scaling_factor",
    ),
)


@pytest.fixture
def without_type_checks(monkeypatch):
    """As for a user, who has no import hook that refuses bad arguments earlier."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def _rule(logits, bias=None, **options):
    """Routes one token by `_rule_of_token`, for each row of `logits`."""
    rows = [_rule_of_token(row, bias, **options) for row in np.asarray(logits, float)]
    ids, weights = zip(*rows, strict=True)
    return np.array(ids), np.array(weights)


def _rule_of_token(
    logits,
    bias,
    *,
    method,
    top_k,
    renormalize=True,
    num_groups=1,
    topk_groups=1,
    scaling_factor=1.0,
):
    """The rule in words of plain Python, in float64: lists of ids and of weights."""
    score = {
        "softmax": lambda z: math.exp(z) / sum(math.exp(y) for y in logits),
        "topk_softmax": lambda z: z,
        "sigmoid": lambda z: 1 / (1 + math.exp(-z)),
        "sqrtsoftplus": lambda z: math.sqrt(math.log1p(math.exp(z))),
    }[method]
    scores = [score(z) for z in logits]
    choice = [s + (0 if bias is None else float(bias[e])) for e, s in enumerate(scores)]
    size = len(logits) // num_groups
    groups = [list(range(g * size, (g + 1) * size)) for g in range(num_groups)]
    worth = [sum(sorted(choice[e] for e in group)[-2:]) for group in groups]
    kept = sorted(range(num_groups), key=lambda g: (-worth[g], g))[:topk_groups]
    allowed = [e for g in kept for e in groups[g]]
    ids = sorted(allowed, key=lambda e: (-choice[e], e))[:top_k]
    weights = [scores[e] for e in ids]
    if method == "topk_softmax":
        weights = [math.exp(w) for w in weights]
    if renormalize or method == "topk_softmax":
        weights = [w / sum(weights) for w in weights]
    return ids, [w * scaling_factor for w in weights]


def _assert_same_routing(actual, expected, rtol=2e-6):
    ids, weights = actual
    assert ids.dtype == jnp.int32 and weights.dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(ids), expected[0])
    np.testing.assert_allclose(np.asarray(weights), expected[1], rtol=rtol)


def _logits(seed=0, num_tokens=24, num_experts=NUM_EXPERTS):
    return 2 * jax.random.normal(jax.random.key(seed), (num_tokens, num_experts))


def _bias(seed=1, num_experts=NUM_EXPERTS):
    return 0.4 * jax.random.normal(jax.random.key(seed), (num_experts,))


@pytest.mark.parametrize("rule", RULES)
def test_ids_and_weights_are_those_of_the_rule_best_first(rule):
    logits, options = _logits(), RULES[rule]
    bias = None if options["method"] == "softmax" else _bias()
    actual = jit_route(logits, correction_bias=bias, **options)
    _assert_same_routing(actual, _rule(logits, bias, **options))


def test_softmax_of_the_top_k_is_the_renormalized_softmax():
    logits = _logits()
    expected = jit_route(logits, "softmax", 2)
    actual = jit_route(logits, "topk_softmax", 2)
    _assert_same_routing(actual, [np.asarray(a) for a in expected])


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 1},
        {"top_k": NUM_EXPERTS},
        {"top_k": NUM_EXPERTS, "num_groups": 4, "topk_groups": 4},
        {"top_k": 4, "num_groups": 4, "topk_groups": 1},
        {"top_k": 3, "num_groups": NUM_EXPERTS, "topk_groups": 3},
        {"top_k": 2, "num_groups": 1, "topk_groups": 1},
    ],
    ids=str,
)
def test_rule_holds_at_the_ends_of_each_range(options):
    logits, bias = _logits(seed=2), _bias()
    actual = jit_route(logits, "sigmoid", correction_bias=bias, **options)
    _assert_same_routing(actual, _rule(logits, bias, method="sigmoid", **options))


@pytest.mark.parametrize("method", ["softmax", "sigmoid"])
@pytest.mark.parametrize("groups", [{}, {"num_groups": 4, "topk_groups": 2}], ids=str)
def test_of_equal_scores_the_lower_index_is_taken(method, groups):
    """Experts of one score, and groups of one sum, come in the order of their index."""
    rng = np.random.default_rng(0)
    # Sums of two of two values are equal only where the values are.
    logits = rng.choice([0.0, 3.0], (40, NUM_EXPERTS)).astype(np.float32)
    logits[0] = 0
    actual = jit_route(jnp.asarray(logits), method, 5, **groups)
    expected = _rule(logits, method=method, top_k=5, **groups)
    _assert_same_routing(actual, expected)
    assert expected[0][0].tolist() == [0, 1, 2, 3, 4]


def test_bias_is_added_for_the_choice_and_is_not_in_the_weights():
    logits = jnp.asarray([[2.0, 1.0, 0.0, -1.0]])
    bias = jnp.asarray([-1.0, 0.0, 0.0, 1.0])
    ids, weights = jit_route(
        logits, "sigmoid", 2, correction_bias=bias, renormalize=False
    )
    # 0.88 - 1, 0.73, 0.5, 0.27 + 1
    assert ids.tolist() == [[3, 1]]
    np.testing.assert_allclose(weights, jax.nn.sigmoid(logits[:, [3, 1]]), rtol=1e-6)


def test_a_group_is_worth_its_two_best_experts():
    #          best single        best two          best three
    scores = [[0.90, 0.05, 0.05], [0.60, 0.50, 0.02], [0.45, 0.40, 0.44]]
    logits = jnp.log(jnp.asarray(scores) / (1 - jnp.asarray(scores))).reshape(1, 9)
    ids, _ = jit_route(logits, "sigmoid", 2, num_groups=3, topk_groups=1)
    assert ids.tolist() == [[3, 4]]
    ids, _ = jit_route(logits, "sigmoid", 3, num_groups=3, topk_groups=2)
    assert ids.tolist() == [[0, 3, 4]]


def test_experts_outside_the_kept_groups_are_never_chosen_with_negative_scores():
    """Dropped experts must lose against any bias, not only against scores above 0."""
    bias = jnp.full(NUM_EXPERTS, -5.0)
    ids, _ = jit_route(
        _logits(), "sigmoid", 4, correction_bias=bias, num_groups=4, topk_groups=1
    )
    groups = np.asarray(ids) // 4
    assert (groups == groups[:, :1]).all()


@pytest.mark.parametrize("method", METHODS)
def test_renormalized_weights_sum_to_the_scaling_factor(method):
    _, weights = jit_route(_logits(), method, 4, scaling_factor=2.5)
    np.testing.assert_allclose(np.sum(weights, axis=-1), 2.5, rtol=1e-6)


def test_scores_that_are_all_zero_give_weights_of_zero():
    ids, weights = jit_route(jnp.full((2, 8), -300.0), "sigmoid", 3)
    assert ids.tolist() == [[0, 1, 2]] * 2
    assert weights.tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("method", METHODS)
def test_an_expert_with_a_logit_of_minus_infinity_comes_last(method):
    logits = _logits().at[:, 3].set(-jnp.inf)
    ids, weights = jit_route(logits, method, NUM_EXPERTS)
    assert (ids[:, -1] == 3).all() and (weights[:, -1] == 0).all()
    assert jnp.isfinite(weights).all()


def test_large_logits_do_not_overflow():
    logits = jnp.asarray([[1e30, 200.0, 3e38, -3e38]])
    for method in METHODS:
        ids, weights = jit_route(logits, method, 2)
        assert set(ids[0].tolist()) <= {0, 1, 2}
        np.testing.assert_allclose(jnp.sum(weights), 1, rtol=1e-6)


# Transformations and types


@pytest.mark.parametrize(
    "rule", ["softmax", "softmax_raw", "topk_softmax", "sigmoid_groups", "sqrtsoftplus"]
)
def test_gradient_of_the_weights_is_that_of_the_rule(rule):
    """Against central differences in float64."""
    options, bias, step = RULES[rule], np.asarray(_bias()), 1e-6
    logits = np.asarray(_logits(num_tokens=3), np.float64)
    cotangent = np.random.default_rng(0).normal(size=(3, options["top_k"]))

    def loss(logits, bias):
        weights = jit_route(logits, correction_bias=bias, **options)[1]
        return jnp.sum(weights * jnp.asarray(cotangent, jnp.float32))

    actual, bias_gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))(
        jnp.asarray(logits, jnp.float32), jnp.asarray(bias)
    )
    expected = np.zeros_like(logits)
    for expert in range(NUM_EXPERTS):
        shift = step * np.eye(NUM_EXPERTS)[expert]
        above, below = (
            _rule(z, bias, **options)[1] for z in (logits + shift, logits - shift)
        )
        expected[:, expert] = np.sum(cotangent * (above - below), -1) / (2 * step)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6)
    # It only takes part in the choice.
    assert not np.any(bias_gradient)


@pytest.mark.parametrize("method", METHODS)
def test_gradient_is_finite_where_a_score_is_zero(method):
    logits = _logits().at[:, 3].set(-jnp.inf).at[:, 5].set(-300.0)
    gradient = jax.grad(lambda z: jnp.sum(jit_route(z, method, 4)[1][:, 0]))(logits)
    assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_scores_of_narrow_logits_are_float32(dtype):
    logits = _logits().astype(dtype)
    bias = _bias().astype(dtype)
    actual = jit_route(logits, "sigmoid", 4, correction_bias=bias)
    wide = jit_route(logits.astype(jnp.float32), "sigmoid", 4, correction_bias=bias)
    assert actual[1].dtype == jnp.float32
    np.testing.assert_array_equal(actual[0], wide[0])
    # Equal but for the last bits, as two programs may evaluate one exponential.
    np.testing.assert_array_max_ulp(actual[1], wide[1], maxulp=4)


@pytest.mark.parametrize("shape", [(), (2, 1, 3), (0,), (2, 0)])
def test_any_leading_axes(shape):
    options = RULES["sigmoid_groups"]
    logits = _logits(num_tokens=math.prod(shape))
    expected = jit_route(logits, correction_bias=_bias(), **options)
    actual = jit_route(
        logits.reshape(*shape, NUM_EXPERTS), correction_bias=_bias(), **options
    )
    for a, b, dtype in zip(actual, expected, (jnp.int32, jnp.float32), strict=True):
        assert a.shape == (*shape, 5) and a.dtype == dtype
        np.testing.assert_array_equal(a.reshape(b.shape), b)


@pytest.mark.parametrize("in_axes", [(0, None), (None, 0), (0, 0), (2, 1)], ids=str)
def test_vmap_is_a_loop(in_axes):
    """Over the logits, over the correction bias, and over both."""
    options = RULES["sigmoid_groups"]
    f = lambda z, bias: jit_route(z, correction_bias=bias, **options)
    logits = jnp.stack([_logits(seed, 6) for seed in range(3)])
    biases = jnp.stack([_bias(seed) for seed in range(3)])
    rows = [
        f(
            logits[0 if in_axes[0] is None else i],
            biases[0 if in_axes[1] is None else i],
        )
        for i in range(3)
    ]
    operands = [
        a[0] if axis is None else jnp.moveaxis(a, 0, axis)
        for a, axis in zip((logits, biases), in_axes, strict=True)
    ]
    actual = jax.jit(jax.vmap(f, in_axes))(*operands)
    for a, b in zip(actual, zip(*rows, strict=True), strict=True):
        np.testing.assert_array_equal(a, jnp.stack(b))


def test_vmap_over_vmap_over_tokens():
    f = lambda z, bias: jit_route(z, "sigmoid", 3, correction_bias=bias)
    logits, biases = _logits(num_tokens=10).reshape(2, 5, -1), jnp.stack([_bias()] * 2)
    inner = jax.vmap(f, (0, None))
    actual = jax.vmap(inner)(logits, biases)
    expected = jit_route(logits, "sigmoid", 3, correction_bias=_bias())
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("shape", [(2, 0), (0, 3)])
def test_vmap_of_nothing(shape):
    logits = jnp.zeros((*shape, NUM_EXPERTS))
    biases = jnp.zeros((shape[0], NUM_EXPERTS))
    f = lambda z, bias: route(z, "sigmoid", 3, correction_bias=bias)
    ids, weights = jax.vmap(f)(logits, biases)
    assert ids.shape == weights.shape == (*shape, 3)


def test_abstract_logits_give_abstract_results():
    logits = jax.ShapeDtypeStruct((7, NUM_EXPERTS), jnp.bfloat16)
    ids, weights = jax.eval_shape(lambda z: route(z, "softmax", 2), logits)
    assert (ids.shape, ids.dtype) == ((7, 2), jnp.int32)
    assert (weights.shape, weights.dtype) == ((7, 2), jnp.float32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"method": "tanh"},
            "route: unknown method 'tanh'; expected one of ['softmax', 'topk_softmax', "
            "'sigmoid', 'sqrtsoftplus'].",
        ),
        *(
            (
                {"num_groups": groups, "topk_groups": kept},
                "route: num_groups must divide the number of experts and topk_groups "
                f"be at most num_groups, got num_experts=16, num_groups={groups}, "
                f"topk_groups={kept}.",
            )
            for groups, kept in [(0, 0), (3, 1), (-4, 1), (4, 5), (4, 0), (32, 1)]
        ),
        *(
            (
                {"top_k": top_k, "num_groups": groups, "topk_groups": kept},
                f"route: top_k must be between 1 and the {available} experts that can "
                f"be chosen, got top_k={top_k} with num_experts=16, "
                f"num_groups={groups}, topk_groups={kept}.",
            )
            for top_k, groups, kept, available in [
                (0, 1, 1, 16),
                (17, 1, 1, 16),
                (-1, 1, 1, 16),
                (9, 4, 2, 8),
            ]
        ),
        *(
            (
                {"correction_bias": jnp.zeros(shape)},
                "route: correction_bias must have shape (16,), one value per expert, "
                f"got {shape}.",
            )
            for shape in [(15,), (1,), (24, 16), ()]
        ),
    ],
    ids=str,
)
def test_bad_arguments_are_named(arguments, message, without_type_checks):
    arguments = {"method": "softmax", "top_k": 2} | arguments
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        route(_logits(), **arguments)


def test_unknown_implementation_is_named(without_type_checks):
    with pytest.raises(
        ValueError, match=r"^route: unknown implementation 'cuda'; .*'x"
    ):
        route(_logits(), "softmax", 2, implementation="cuda")  # pyright: ignore

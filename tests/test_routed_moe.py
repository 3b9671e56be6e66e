"""`mx_routed_moe_w8a8` through XLA; its kernel is in `test_routed_moe_kernel`."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmx8 import dequantize, explain, mx_moe, mx_routed_moe_w8a8, quantize, route

from .helpers import assert_bits_equal
from .trtllm_model import (
    apply_experts,
    assert_close,
    best,
    keep_best_groups,
    sigmoid,
    silu_gated,
    softmax,
    through_mxfp8,
    to_bf16,
)


E, H, I, T, K = 8, 64, 32, 9, 3


def normal(seed, *shape, dtype=jnp.bfloat16):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def make_layer(seed=0, dtype=jnp.bfloat16):
    """Returns tokens, weights, logits, a correction bias and the biases."""
    layer = _make_layer(seed)
    return layer | {"x": layer["x"].astype(dtype)}


@jax.jit
def _make_layer(seed):
    return {
        "x": normal(seed, T, H),
        "w13": quantize(normal(seed + 1, E, 2 * I, H) / 8),
        "w2": quantize(normal(seed + 2, E, H, I) / 8),
        "router_logits": normal(seed + 3, T, E, dtype=jnp.float32),
        "correction_bias": normal(seed + 4, E, dtype=jnp.float32) / 8,
        "w13_bias": normal(seed + 5, E, 2 * I),
        "w2_bias": normal(seed + 6, E, H),
    }


def run(layer, **kwargs):
    kwargs = {"method": "softmax", "top_k": K} | layer | kwargs
    operands = [kwargs.pop(name) for name in ("x", "w13", "w2", "router_logits")]
    return mx_routed_moe_w8a8(*operands, **kwargs)


def jitted(layer, **kwargs):
    return jax.jit(lambda layer: run(layer, **kwargs))(layer)


ROWS = ("x", "router_logits")

# What families of models route by, and what none does.
ROUTINGS: list[dict[str, Any]] = [
    {"method": "softmax"},
    {"method": "softmax", "renormalize": False},
    {"method": "topk_softmax", "correction_bias": None},
    {"method": "sigmoid", "renormalize": False, "correction_bias": None},
    {"method": "sigmoid", "scaling_factor": 2.5},
    {"method": "sigmoid", "num_groups": 4, "topk_groups": 2, "scaling_factor": 2.5},
    {"method": "sqrtsoftplus", "scaling_factor": 1.5},
]
named = pytest.mark.parametrize(
    "routing", ROUTINGS, ids=lambda r: "-".join(map(str, r.values()))
)


def route_one(logits, bias, method, *, renormalize=True, num_groups=1, **others):
    """Routes one token by the definition."""
    scores = {
        "softmax": softmax,
        "topk_softmax": lambda a: a,
        "sigmoid": sigmoid,
        "sqrtsoftplus": lambda a: np.sqrt(np.log1p(np.exp(a))),
    }[method](logits)
    choice = scores if bias is None else scores + bias
    if num_groups > 1:
        bias = to_bf16(bias)
        choice = keep_best_groups(scores + bias, num_groups, others["topk_groups"])
    ids = best(choice, K)
    weights = scores[ids]
    if method == "topk_softmax":
        weights = softmax(weights)
    elif renormalize:
        weights = weights / np.sum(weights)
    return ids, weights * others.get("scaling_factor", 1.0)


@named
def test_matches_a_loop_over_tokens(routing):
    layer = make_layer() | routing
    f64 = lambda a: np.asarray(a, np.float64)
    names = ("x", "router_logits", "w13_bias", "w2_bias")
    x, logits, b13, b2 = (f64(layer[name]) for name in names)
    bias = layer["correction_bias"]
    bias = None if bias is None else f64(bias)
    w13, w2 = (f64(dequantize(layer[name])) for name in ("w13", "w2"))
    others = {
        k: v for k, v in routing.items() if k not in ("method", "correction_bias")
    }
    expected = np.stack(
        [
            apply_experts(
                *(token, w13, w2, b13, b2),
                *route_one(row, bias, routing["method"], **others),
                silu_gated,
            )
            for token, row in zip(through_mxfp8(x), logits, strict=True)
        ]
    )
    out = jax.jit(lambda: run(layer))()
    assert out.dtype == jnp.bfloat16
    assert_close(out, expected)


def test_routing_weights_are_bfloat16():
    layer = make_layer(dtype=jnp.float32)
    layer["w2_bias"] = jnp.zeros((E, H)).at[:, 0].set(1.0)
    layer["w2"] = quantize(jnp.zeros((E, H, I)))  # so that the output is the weights
    out = jitted(layer, top_k=1, renormalize=False)[:, 0]
    _, weights = route(
        layer["router_logits"],
        "softmax",
        1,
        renormalize=False,
        correction_bias=layer["correction_bias"],
    )
    rounded = weights[:, 0].astype(jnp.bfloat16).astype(jnp.float32)
    assert_bits_equal(out, rounded)
    assert jnp.all(rounded != weights[:, 0])


@pytest.mark.parametrize("num_groups", [1, 4])
def test_correction_bias_is_bfloat16_where_there_are_groups(num_groups):
    layer = make_layer(dtype=jnp.float32)
    layer["router_logits"] = jnp.zeros((T, E))
    # Apart in float32, equal in bfloat16, where the lower index is taken.
    layer["correction_bias"] = jnp.zeros(E).at[2:4].set(jnp.array([1.0, 1 + 2**-12]))
    layer["w2_bias"] = jnp.tile(jnp.arange(E, dtype=jnp.float32)[:, None], (1, H))
    layer["w2"] = quantize(jnp.zeros((E, H, I)))  # so that the output is the expert
    routing = {"method": "sigmoid", "num_groups": num_groups}
    out = jitted(layer, top_k=1, topk_groups=1, **routing)
    assert_bits_equal(out, jnp.full((T, H), 2.0 if num_groups > 1 else 3.0))


def test_leading_axes_are_tokens_and_there_may_be_none():
    layer = make_layer()
    out = jitted(layer)
    rows = {name: layer[name].reshape(3, 3, -1) for name in ROWS}
    assert_bits_equal(jitted(layer | rows).reshape(T, H), out)
    assert_close(jitted(layer | {n: layer[n][0] for n in ROWS}), out[0])
    none = {name: rows[name][:, :0] for name in ROWS}
    assert jitted(layer | none).shape == (3, 0, H)


def shard(layer, experts):
    part = lambda a: jax.tree.map(lambda a: a[experts], a)
    names = ("w13", "w2", "w13_bias", "w2_bias")
    return layer | {name: part(layer[name]) for name in names}


stack = lambda *layers: jax.tree.map(lambda *a: jnp.stack(a), *layers)


def test_expert_parallel_shards_add_up():
    layer = make_layer(dtype=jnp.float32)
    halves = [shard(layer, slice(o, o + 4)) for o in (0, 4)]
    # Devices of a mesh differ in their offset, which is a constant of each branch.
    branches = [lambda half, o=o: run(half, local_expert_offset=o) for o in (0, 4)]
    part = jax.jit(lambda i, half: jax.lax.switch(i, branches, half))
    parts = [part(i, half) for i, half in enumerate(halves)]
    assert all(np.any(np.asarray(part)) for part in parts)
    np.testing.assert_allclose(sum(parts), jitted(layer), rtol=0, atol=1e-5)


def test_vmap_over_tokens_is_one_call():
    layer = make_layer()
    one = lambda x, logits: run(layer | {"x": x, "router_logits": logits})
    args = [layer[name] for name in ROWS]
    assert_close(jax.jit(jax.vmap(one))(*args), jitted(layer))
    count = lambda f: str(jax.make_jaxpr(f)(*args)).count("dot_general")
    assert count(jax.vmap(one)) == count(one) == 2


def test_vmap_over_correction_biases():
    layer = make_layer()
    biases = jnp.stack([layer["correction_bias"], -layer["correction_bias"]])
    one = jax.jit(lambda bias: run(layer, correction_bias=bias))
    out = jax.jit(jax.vmap(one))(biases)
    for got, bias in zip(out, biases, strict=True):
        assert_close(got, one(bias))
    assert np.any(out[0] != out[1])


def test_vmap_over_layers_gives_each_its_own_experts():
    layers = [shard(make_layer(seed), slice(2, 6)) for seed in (0, 10, 20, 30)]
    function = jax.jit(lambda layer: run(layer, local_expert_offset=2))
    expected = [function(layer) for layer in layers]
    out = jax.jit(jax.vmap(function))(stack(*layers))
    nested = stack(stack(*layers[:2]), stack(*layers[2:]))
    nested_out = jax.jit(jax.vmap(jax.vmap(function)))(nested)
    assert_bits_equal(nested_out.reshape(out.shape), out)
    for got, want in zip(out, expected, strict=True):
        assert_close(got, want)
    # The same tokens, logits and biases for the weights of all layers.
    names = ("w13", "w2")
    shared = jax.vmap(lambda weights: function(layers[0] | weights))
    weights = [{name: layer[name] for name in names} for layer in layers[:2]]
    out = jax.jit(shared)(stack(*weights))
    assert_close(out[0], expected[0])
    assert_close(out[1], function(layers[0] | weights[1]))


def test_gradients_are_those_of_unrounded_routing_and_experts():
    layer = make_layer(dtype=jnp.float32)
    names = ("x", "router_logits", "w13_bias")
    args = tuple(layer[name] for name in names)

    def two_ops(x, logits, w13_bias):
        bias = layer["correction_bias"]
        ids, weights = route(logits, "softmax", K, correction_bias=bias)
        operands = (x, layer["w13"], layer["w2"], ids, weights)
        return mx_moe(*operands, w13_bias=w13_bias, w2_bias=layer["w2_bias"])

    one_op = lambda *args: run(layer | dict(zip(names, args, strict=True)))
    cotangent = normal(9, T, H, dtype=jnp.float32)
    through = lambda f: jax.jit(lambda *args: jax.vjp(f, *args)[1](cotangent))(*args)
    for got, want in zip(through(one_op), through(two_ops), strict=True):
        assert np.any(np.asarray(want))
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_bad_arguments_are_named(monkeypatch):
    # Without the tests' own type checks.
    op = inspect.unwrap(mx_routed_moe_w8a8)
    monkeypatch.setitem(globals(), "mx_routed_moe_w8a8", op)
    layer = make_layer()
    prefix = "^mx_routed_moe_w8a8: "
    with pytest.raises(ValueError, match=prefix + "unknown method 'best'"):
        run(layer, method="best")
    with pytest.raises(ValueError, match=prefix + "top_k must be between 1 and the 4"):
        run(layer, top_k=5, num_groups=4, topk_groups=2)
    with pytest.raises(ValueError, match=prefix + "num_groups must divide"):
        run(layer, num_groups=3)
    with pytest.raises(
        ValueError, match=prefix + r"correction_bias must have .*\(8,\)"
    ):
        run(layer, correction_bias=jnp.zeros(7))
    with pytest.raises(ValueError, match=prefix + r"router_logits must be \[\.\.\."):
        run(layer, router_logits=layer["router_logits"][:-1])
    with pytest.raises(ValueError, match="router_logits must be of all experts"):
        run(layer, local_expert_offset=1)
    with pytest.raises(ValueError, match="local_expert_offset=-1 and 8 experts in w2"):
        run(layer, local_expert_offset=-1)
    with pytest.raises(TypeError, match=r"Use jax\.lax\.switch over"):
        jax.jit(lambda i: run(layer, local_expert_offset=i))(0)
    with pytest.raises(TypeError, match=prefix + "router_logits must have a floating"):
        run(layer, router_logits=jnp.zeros((T, E), jnp.int32))
    with pytest.raises(ValueError, match=r"w13 must be \(8, 32, 64\)"):
        run(layer, activation="relu2")
    with pytest.raises(ValueError, match=r"w2_bias must have shape \(8, 64\)"):
        run(layer, w2_bias=layer["w13_bias"][:, :3])
    with pytest.raises(ValueError, match="unknown implementation 'flashinfer_cutlass'"):
        run(layer, implementation="flashinfer_cutlass")


@pytest.mark.cpu
def test_explains_itself_where_there_is_no_kernel():
    (choice,) = explain(run, make_layer()).choices
    assert choice.op.startswith("mx_routed_moe_w8a8(bfloat16[9,64], MXArray")
    assert choice.implementation == "xla"
    ((name, reason),) = choice.passed_over
    assert name == "flashinfer_trtllm" and "is not an NVIDIA GPU" in reason
    with pytest.raises(NotImplementedError, match="is not an NVIDIA GPU"):
        run(make_layer(), implementation="flashinfer_trtllm")

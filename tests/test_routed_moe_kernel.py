"""`mx_routed_moe_w8a8` through FlashInfer's kernel, emulated, and what it is passed."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmx8 import canonical, explain, mx_routed_moe_w8a8, prepare
from jmx8.kernels._prepared import PreparedWeights
from jmx8.kernels.flashinfer import prepare as layouts, quantize, trtllm_moe
from jmx8.kernels.flashinfer.trtllm_routing import BIASED, RoutingMethodType
from jmx8.nn import Experts, MXExperts, MXLinear

from .helpers import model_quantize
from .trtllm_model import (
    apply_experts,
    assert_close,
    best,
    keep_best_groups,
    sigmoid,
    softmax,
    to_bf16,
)


pytest.importorskip("jax_tvm_ffi")
import tvm_ffi

from . import emulated_flashinfer
from .emulated_flashinfer import activate, e4m3, host, wide


pytestmark = pytest.mark.cpu


def quantize_linearly(x, elements, scales, layout, alignment, enable_pdl):
    codes, scale_codes = model_quantize(host(x).astype(np.float64))
    host(elements).view(np.uint8)[...] = codes
    host(scales)[...] = scale_codes.reshape(-1)


def run_kernel(*arguments):
    """Stands for `trtllm_fp8_block_scale_moe`, routing inside."""
    given = dict(zip(trtllm_moe._ARGUMENTS, arguments, strict=True))
    assert given["routing_input_mode"] == 0
    out, offset = host(given["out"]), given["local_expert_offset"]
    codes = host(given["x_scales"]).astype(np.float64)
    x = e4m3(given["x"]) * np.repeat(2.0 ** (codes - 127), 32, axis=1)
    w13 = in_order(given, "w13", given["activation_type"] == 3)
    w2 = in_order(given, "w2", False)
    for t, row in enumerate(host(given["logits"]).astype(np.float64)):
        ids, weights = route(row, given)
        out[t] = apply_experts(
            *(x[t], w13[0], w2[0], w13[1], w2[1], ids - offset, weights),
            lambda h: as_swiglu(h, given),
        )


def in_order(given, name, gated):
    """Returns weights and biases with their rows as they were before the shuffle."""
    elements, scales = e4m3(given[name]), host(given[f"{name}_scales"])
    order_of = layouts._trtllm_order(gated)
    assert order_of is not None
    arranged = np.stack([wide(*w) for w in zip(elements, scales, strict=True)])
    bias = given[f"{name}_bias"]
    bias = np.zeros(arranged.shape[:2]) if bias is None else host(bias)
    back = np.argsort(order_of(elements.shape[1]))
    return arranged[:, back], bias[:, back].astype(np.float64)


def as_swiglu(h, given):
    if given["activation_type"] == 3:
        h = np.concatenate(np.split(h, 2)[::-1])  # `activate` has up before gate
    names = {"alpha": "alpha", "beta": "beta", "limit": "clamp_limit"}
    parameters = {f"swiglu_{k}": given[f"gemm1_{v}"] for k, v in names.items()}
    return activate(h, parameters | {"activation_type": given["activation_type"]})


def route(logits, given):
    method, top_k = RoutingMethodType(given["routing_method_type"]), given["top_k"]
    name = method.name
    scores = softmax(logits) if name == "DEFAULT" else logits
    if "SIGMOID" in name or method in BIASED:
        scores = sigmoid(logits)
    choice = scores
    if method in BIASED:
        bias = host(given["correction_bias"]).astype(np.float64)
        choice = scores + (to_bf16(bias) if name == "DEEPSEEK_V3" else bias)
    if name == "DEEPSEEK_V3":
        choice = keep_best_groups(choice, given["num_groups"], given["topk_groups"])
    ids = best(choice, top_k)
    weights = scores[ids]
    if name.startswith("RENORMALIZE"):
        weights = softmax(weights)
    elif method in BIASED or name == "SIGMOID_RENORM":
        weights = weights / np.sum(weights)
    return ids, weights * (given["routed_scaling_factor"] or 1.0)


@pytest.fixture
def blackwell(monkeypatch):
    emulated_flashinfer.use(monkeypatch)
    for module, function in ((quantize, quantize_linearly), (trtllm_moe, run_kernel)):
        original = module._kernel

        def emulated(*key, original=original, function=function):
            load = lambda: tvm_ffi.convert(function)
            return dataclasses.replace(original(*key), load=load, platform="cpu")

        monkeypatch.setattr(module, "_kernel", emulated)


E, H, I, T, K = 8, 96, 40, 5, 2  # h and i need padding


def normal(seed, *shape, dtype=jnp.bfloat16):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def make_experts(activation: Any = "silu", use_bias=True):
    experts = Experts.init(
        *(E, H, I),
        activation=activation,
        use_bias=use_bias,
        dtype=jnp.bfloat16,
        key=jax.random.key(0),
    )
    if use_bias:
        w13_bias, w2_bias = experts.w13_bias, experts.w2_bias
        assert w13_bias is not None and w2_bias is not None
        biases = {
            "w13_bias": normal(1, *w13_bias.shape),
            "w2_bias": normal(2, *w2_bias.shape),
        }
        experts = dataclasses.replace(experts, **biases)
    return MXExperts.from_experts(experts)


def run(experts, x, logits, **kwargs):
    kwargs = {"method": "softmax", "top_k": K} | kwargs
    return mx_routed_moe_w8a8(
        *(x, experts.w13, experts.w2, logits),
        activation=experts.activation,
        w13_bias=experts.w13_bias,
        w2_bias=experts.w2_bias,
        **kwargs,
    )


FOR_KERNEL: dict[str, Any] = {"implementation": "flashinfer_trtllm"}
BIAS = normal(3, 12, dtype=jnp.float32) / 8
ROUTINGS: dict[str, dict[str, Any]] = {
    "DEFAULT": {"renormalize": False},
    "RENORMALIZE": {"method": "topk_softmax"},
    "DEEPSEEK_V3": {
        "method": "sigmoid",
        "correction_bias": BIAS,
        "num_groups": 4,
        "topk_groups": 2,
        "scaling_factor": 2.5,
    },
    "RENORMALIZE_NAIVE": {},
    "SIGMOID_RENORM": {"method": "sigmoid"},
    "MINIMAX2": {"method": "sigmoid", "correction_bias": BIAS},
    "SIGMOID": {"method": "sigmoid", "renormalize": False},
}


@pytest.mark.parametrize("name", ROUTINGS)
def test_the_kernel_and_xla_agree(blackwell, name):
    number = RoutingMethodType[name]
    offset = 4 * (number % 2)  # of 12 experts, 8 are here
    activation = ("silu", "swigluoai", "relu2")[number % 3]
    experts = make_experts(activation, use_bias=number % 4 < 2)
    prepared = prepare(experts, **FOR_KERNEL)
    x, logits = normal(6, T, H), normal(5, T, 12, dtype=jnp.float32)
    kwargs = ROUTINGS[name] | {"local_expert_offset": offset}
    call = lambda experts, x, logits: run(experts, x, logits, **kwargs)
    (choice,) = explain(call, prepared, x, logits).choices
    assert choice.implementation == "flashinfer_trtllm" and not choice.passed_over
    out = eqx.filter_jit(call)(prepared, x, logits)
    expected = jax.jit(lambda: run(experts, x, logits, implementation="xla", **kwargs))
    assert_close(out, expected())
    assert np.any(np.asarray(out))


def test_vmap_is_one_call_and_the_gradient_is_that_of_xla(blackwell):
    experts = make_experts()
    prepared = prepare(experts, **FOR_KERNEL)
    x, logits = normal(4, T, H), normal(5, T, E, dtype=jnp.float32)
    one = lambda x, logits: run(prepared, x, logits, **FOR_KERNEL)
    batched = jax.jit(jax.vmap(one))
    text = batched.lower(x, logits).as_text()
    assert text.count("custom_call @jmx8.flashinfer.") == 2  # quantizes, and the layer
    assert_close(batched(x, logits), jax.jit(lambda: run(experts, x, logits))())
    through = lambda e: jax.jit(lambda *a: jax.vjp(lambda *a: run(e, *a), *a)[1](x))
    for got, want in zip(
        through(prepared)(x, logits), through(experts)(x, logits), strict=True
    ):
        np.testing.assert_array_equal(got, want)
    assert one(x[:0], logits[:0]).shape == (0, H)


def test_reasons(blackwell):
    experts = make_experts()
    x, logits = normal(4, T, H), normal(5, T, E, dtype=jnp.float32)

    def reason(experts, x, logits, **kwargs):
        call = lambda *args: run(*args, **kwargs)
        (choice,) = explain(call, experts, x, logits).choices
        assert choice.implementation == "xla"
        return choice.passed_over[0][1]

    assert reason(experts, x, logits) == (
        "`jmx8.prepare` must lay out the weights for it, once after loading, for "
        "implementation='flashinfer_trtllm'"
    )
    cutlass = prepare(experts)
    assert "laid out for cutlass_fused_moe" in reason(cutlass, x, logits)
    prepared = prepare(experts, **FOR_KERNEL)
    assert "returns bfloat16" in reason(prepared, x.astype(jnp.float32), logits)
    half = logits.astype(jnp.float16)
    assert "routes on float32 and bfloat16" in reason(prepared, x, half)
    assert "no routing method for" in reason(prepared, x, logits, method="sqrtsoftplus")
    assert "no routing method for" in reason(prepared, x, logits, scaling_factor=2.0)
    few = jnp.zeros((T, 10))
    assert "a multiple of 4 experts" in reason(prepared, x, few)
    groups = {"method": "sigmoid", "num_groups": 4, "topk_groups": 1}
    assert "more experts in them than top_k" in reason(prepared, x, logits, **groups)
    call = lambda bias: run(prepared, x, logits, method="sigmoid", correction_bias=bias)
    (choice,) = explain(jax.vmap(call), jnp.zeros((2, E))).choices
    assert "one correction bias for all tokens" in choice.passed_over[0][1]
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), prepared)
    call = lambda experts: run(experts, x, logits)
    (choice,) = explain(jax.vmap(call), stacked).choices
    assert "one set of experts for all tokens" in choice.passed_over[0][1]
    with pytest.raises(NotImplementedError, match="must lay out the weights for it"):
        run(experts, x, logits, **FOR_KERNEL)


def layouts_of(tree):
    leaves = jax.tree.leaves(tree, is_leaf=lambda a: isinstance(a, PreparedWeights))
    return [a.layout.name for a in leaves if isinstance(a, PreparedWeights)]


def test_prepare_for_a_backend_by_name(blackwell):
    linear = MXLinear(64, 32, dtype=jnp.bfloat16, key=jax.random.key(0))
    model = {"experts": make_experts(), "linear": linear}
    prepared = prepare(model, **FOR_KERNEL)
    experts = layouts_of(prepared["experts"])
    assert len(experts) == 4 and all("trtllm" in name for name in experts)
    # Its op has no such backend.
    assert layouts_of(prepared["linear"]) == ["mxfp8_gemm"]
    assert eqx.tree_equal(canonical(prepared), model)
    # From one layout to another, and to none.
    by_default = prepare(model)
    assert eqx.tree_equal(prepare(by_default, **FOR_KERNEL), prepared)
    assert eqx.tree_equal(
        prepare(prepared, implementation="flashinfer_cutlass"), by_default
    )
    assert eqx.tree_equal(prepare(prepared, implementation="xla"), model)
    assert eqx.tree_equal(prepare(prepared), prepared)
    x, ids = normal(4, T, H), jnp.tile(jnp.arange(K), (T, 1))
    (choice,) = explain(prepared["experts"], x, ids, jnp.ones((T, K))).choices
    assert choice.implementation == "flashinfer_trtllm"


def test_prepare_says_why_a_backend_cannot_run(blackwell, monkeypatch):
    with pytest.raises(NotImplementedError, match="has no gelu: its gated activations"):
        prepare(make_experts("gelu"), **FOR_KERNEL)
    with pytest.raises(ValueError, match="unknown implementation 'flashinfer_cutile'"):
        prepare(make_experts(), implementation="flashinfer_cutile")
    bf16 = dataclasses.replace(make_experts(), activations="bf16")
    assert prepare(bf16, **FOR_KERNEL) is bf16
    monkeypatch.undo()
    with pytest.raises(NotImplementedError, match="is not an NVIDIA GPU"):
        prepare(make_experts(), **FOR_KERNEL)

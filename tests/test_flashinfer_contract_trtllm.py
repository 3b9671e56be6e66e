"""The contract of `test_flashinfer_contract`, for the kernels of trtllm-gen."""

import jax
import jax.numpy as jnp
import pytest


torch = pytest.importorskip("torch")
pytest.importorskip("flashinfer")
pytest.importorskip("jax_tvm_ffi")

from jmx8.kernels.flashinfer import prepare, trtllm_moe
from jmx8.kernels.flashinfer.trtllm_routing import (
    BIASED,
    method_type,
    Routing,
    RoutingMethodType,
)

from . import flashinfer_recorder as recorder
from .flashinfer_calls import (
    ACTIVATIONS,
    assert_same_call,
    EXPERTS,
    HIDDEN,
    INNER,
    Layer,
    normal,
    quantized,
    recorded,
    SHAPES,
    to_torch,
    TOP_K,
)


pytestmark = pytest.mark.cpu


def trtllm_weights(layer, has_bias):
    biases = layer.prepared_biases(prepare.bias_trtllm) if has_bias else ()
    return trtllm_moe.Weights(*layer.prepared(prepare.moe_trtllm), *biases)


def run_trtllm(layer, function, *operands):
    """Runs a form of the kernel; returns its arguments and the quantized tokens."""
    elements, scales = quantized(layer.x_padded, "linear")
    out = normal(8, layer.x_padded.shape)
    results = {
        "mxfp8_quantize": [(1, elements), (2, scales)],
        "trtllm_fp8_block_scale_moe": [(17, out)],
    }
    with recorded(results=results) as calls:
        ours = jax.jit(function)(layer.x, *operands)
    assert jnp.array_equal(ours, out[:, : layer.x.shape[1]])
    scales = scales.reshape(elements.shape[0], -1)
    return calls[1][1], to_torch(elements), to_torch(scales)


def trtllm_kwargs(layer, weights, elements, scales):
    """Returns what both wrappers of the kernel take alike."""
    alpha, beta, limit = layer.swiglu()
    return {
        "hidden_states": elements,
        "hidden_states_scale": scales,
        "gemm1_weights": to_torch(weights.w13),
        "gemm1_weights_scale": to_torch(weights.w13_scales),
        "gemm2_weights": to_torch(weights.w2),
        "gemm2_weights_scale": to_torch(weights.w2_scales),
        "gemm1_alpha": alpha,
        "gemm1_beta": beta,
        "gemm1_clamp_limit": limit,
        "intermediate_size": weights.w2.shape[2],
        "activation_type": layer.torch_activation,
        "local_num_experts": EXPERTS,
    }


@pytest.mark.parametrize("tokens, hidden, inner", SHAPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("packed", [False, True])
def test_trtllm_moe_with_given_ids(tokens, hidden, inner, activation, packed):
    layer = Layer(tokens, hidden, inner, activation)
    weights = trtllm_weights(layer, has_bias=False)
    actual, elements, scales = run_trtllm(
        layer,
        lambda *a: trtllm_moe.moe_w8a8(*a, activation=activation, packed=packed),
        layer.ids,
        layer.weights,
        weights,
    )
    is_local = (layer.ids >= 0) & (layer.ids < EXPERTS)
    ids = to_torch(jnp.where(is_local, layer.ids, -1))
    topk = ids, to_torch(layer.weights)
    if packed:
        bits = topk[1].bfloat16().view(torch.int16).int() & 0xFFFF
        topk = (ids << 16) | bits
    expected = recorder.trtllm_fp8_block_scale_moe(
        **trtllm_kwargs(layer, weights, elements, scales),
        topk_ids=topk,
        routing_bias=None,
        num_experts=EXPERTS,
        top_k=TOP_K,
        n_group=None,
        topk_group=None,
        local_expert_offset=0,
        routed_scaling_factor=None,
        routing_method_type=1,
    )
    assert len(expected) == 42
    assert_same_call(actual, expected, trtllm_moe._ARGUMENTS)


# Arguments of `route`, each the kernel's method of the same name; then methods that
# `route` does not have.
ROUTINGS = {
    "DEFAULT": Routing("softmax", TOP_K, renormalize=False),
    "RENORMALIZE": Routing("topk_softmax", TOP_K),
    "DEEPSEEK_V3": Routing("sigmoid", TOP_K, True, 4, 2, 2.5, True),
    "RENORMALIZE_NAIVE": Routing("softmax", TOP_K),
    "SIGMOID_RENORM": Routing("sigmoid", TOP_K),
    "MINIMAX2": Routing("sigmoid", TOP_K, scaling_factor=2.0),
    "SIGMOID": Routing("sigmoid", TOP_K, renormalize=False),
    "LLAMA4": Routing("sigmoid", 1, renormalize=False),
    "TOPK": Routing("softmax", TOP_K),
    "TOPK_SIGMOID": Routing("sigmoid", TOP_K, renormalize=False),
}
NOT_OURS = ("LLAMA4", "TOPK", "TOPK_SIGMOID")


def test_every_routing_method_is_listed_and_found():
    theirs = {int(method) for method in recorder.flashinfer.RoutingMethodType}
    assert theirs == {*RoutingMethodType, 10}  # "Unspecified"
    assert ROUTINGS.keys() == {method.name for method in RoutingMethodType}
    for name, routing in ROUTINGS.items():
        found = method_type(routing)
        assert found is not None and (found.name == name) == (name not in NOT_OURS)


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("offset", [0, 24])
def test_trtllm_moe_that_routes(name, offset):
    # Each axis of the grid that is no parameter follows from those that are.
    method, routing = RoutingMethodType[name], ROUTINGS[name]
    activation = ACTIVATIONS[method % len(ACTIVATIONS)]
    layer = Layer(*SHAPES[method % len(SHAPES)], activation)
    weights = trtllm_weights(layer, has_bias=offset == 0)
    num_experts = EXPERTS + offset
    logits_dtype = jnp.float32 if offset else jnp.bfloat16
    logits = normal(9, (layer.x.shape[0], num_experts), logits_dtype)
    correction = None
    if routing.has_bias:
        correction = normal(10, (num_experts,), logits_dtype)
    actual, elements, scales = run_trtllm(
        layer,
        lambda *operands: trtllm_moe.route_and_moe_w8a8(
            *operands,
            routing=routing,
            method=method if name in NOT_OURS else None,
            activation=activation,
            local_expert_offset=offset,
            tactic=(8, 3),
        ),
        logits,
        correction,
        weights,
    )
    if method in BIASED and correction is None:
        correction = jnp.zeros(num_experts)
    as_torch = lambda a: None if a is None else to_torch(a)
    as_float32 = lambda a: None if a is None else to_torch(a.astype(jnp.float32))
    is_grouped = routing.num_groups > 1
    expected = recorder.trtllm_fp8_block_scale_moe(
        **trtllm_kwargs(layer, weights, elements, scales),
        routing_logits=to_torch(logits),
        routing_bias=as_torch(correction),
        gemm1_bias=as_float32(weights.w13_bias),
        gemm2_bias=as_float32(weights.w2_bias),
        num_experts=num_experts,
        top_k=routing.top_k,
        n_group=routing.num_groups if is_grouped else None,
        topk_group=routing.topk_groups if is_grouped else None,
        local_expert_offset=offset,
        routed_scaling_factor=routing.scaling_factor if method in BIASED else None,
        routing_method_type=int(method),
    )
    expected[32] = recorder.describe([8, 3])  # what an autotuner would have chosen
    assert_same_call(actual, expected, trtllm_moe._ARGUMENTS)


def test_no_tokens_are_no_call():
    layer = Layer(1, HIDDEN, INNER, "silu")
    x, ids, topk_weights = (a[:0] for a in (layer.x, layer.ids, layer.weights))
    weights, logits = trtllm_weights(layer, has_bias=False), jnp.zeros((0, EXPERTS))
    routing = ROUTINGS["DEFAULT"]
    with recorded() as calls:
        outs = (
            trtllm_moe.moe_w8a8(x, ids, topk_weights, weights, activation="silu"),
            trtllm_moe.route_and_moe_w8a8(
                x, logits, None, weights, routing=routing, activation="silu"
            ),
        )
    assert [out.shape for out in outs] == [(0, HIDDEN)] * 2
    assert calls == []

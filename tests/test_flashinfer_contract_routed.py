"""The contract of `test_flashinfer_contract_trtllm`, from the public op on."""

import jax.numpy as jnp
import pytest


pytest.importorskip("torch")
pytest.importorskip("flashinfer")
pytest.importorskip("jax_tvm_ffi")

from jmx8 import mx_routed_moe_w8a8, prepare
from jmx8.kernels.flashinfer import trtllm_moe
from jmx8.kernels.flashinfer.trtllm_routing import BIASED, RoutingMethodType
from jmx8.nn import MXExperts

from . import flashinfer_recorder as recorder
from .flashinfer_calls import (
    ACTIVATIONS,
    assert_same_call,
    EXPERTS,
    Layer,
    normal,
    recorded,
    SHAPES,
    to_torch,
)
from .test_flashinfer_contract_trtllm import (
    NOT_OURS,
    ROUTINGS,
    run_trtllm,
    trtllm_kwargs,
    trtllm_weights,
)


pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("name", sorted({*ROUTINGS} - {*NOT_OURS}))
def test_the_op_calls_the_kernel_as_flashinfer_does(name):
    # Each axis of the grid that is no parameter follows from those that are.
    method, routing = RoutingMethodType[name], ROUTINGS[name]
    offset, has_biases = 24 * (method % 2), method % 4 < 2
    layer = Layer(*SHAPES[method % len(SHAPES)], ACTIVATIONS[method % len(ACTIVATIONS)])
    biases = (layer.w13_bias, layer.w2_bias) if has_biases else (None, None)
    experts = MXExperts(layer.w13, layer.w2, *biases, activation=layer.activation)
    with recorded() as calls:
        experts = prepare(experts, implementation="flashinfer_trtllm")
    assert calls == []
    num_experts = EXPERTS + offset
    dtype = jnp.bfloat16 if offset else jnp.float32
    logits = normal(9, (layer.x.shape[0], num_experts), dtype)
    correction = normal(10, (num_experts,), dtype) if routing.has_bias else None
    actual, elements, scales = run_trtllm(
        layer,
        lambda x, logits, correction, experts: mx_routed_moe_w8a8(
            *(x, experts.w13, experts.w2, logits),
            method=routing.method,
            top_k=routing.top_k,
            renormalize=routing.renormalize,
            correction_bias=correction,
            num_groups=routing.num_groups,
            topk_groups=routing.topk_groups,
            scaling_factor=routing.scaling_factor,
            activation=experts.activation,
            w13_bias=experts.w13_bias,
            w2_bias=experts.w2_bias,
            local_expert_offset=offset,
            implementation="flashinfer_trtllm",
        ),
        logits,
        correction,
        experts,
    )
    if method in BIASED and correction is None:
        correction = jnp.zeros(num_experts)
    weights = trtllm_weights(layer, has_biases)
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
    assert_same_call(actual, expected, trtllm_moe._ARGUMENTS)

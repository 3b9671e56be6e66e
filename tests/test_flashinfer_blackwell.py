"""When FlashInfer's Blackwell kernels are passed over or refused, and why."""

import jax
import jax.numpy as jnp
import pytest

from jmx8 import _device, SwiGLUOAI
from jmx8.kernels.flashinfer import (
    cutlass_moe,
    dense,
    modules,
    quantize,
    trtllm_moe,
    trtllm_routing,
)
from jmx8.kernels.flashinfer.trtllm_moe import Weights
from jmx8.kernels.flashinfer.trtllm_routing import Routing, RoutingMethodType


pytestmark = pytest.mark.cpu


def zeros(*shape, dtype=jnp.bfloat16):
    return jnp.zeros(shape, dtype)


def fp8(*shape):
    return jnp.zeros(shape, jnp.float8_e4m3fn)


@pytest.fixture
def claim(monkeypatch):
    """Makes the device claim a compute capability, with every module to be had."""
    monkeypatch.setattr(modules, "unavailable", lambda module, capability: None)

    def claim(capability):
        monkeypatch.setattr(_device, "compute_capability", lambda: capability)
        devices = [_Device(".".join(map(str, capability or ())))]
        monkeypatch.setattr(jax, "local_devices", lambda: devices)

    return claim


def call_dense(x):
    return dense.matmul_w8a8(
        x, fp8(128, 128), zeros(512, dtype=jnp.uint8), n=128, out_dtype=jnp.bfloat16
    )


MOE_WEIGHTS = (
    fp8(4, 256, 128),
    zeros(4, 256, 1, dtype=jnp.int32),
    fp8(4, 128, 128),
    zeros(4, 128, 1, dtype=jnp.int32),
)


def call_cutlass(x):
    ids, weights = zeros(3, 2, dtype=jnp.int32), jnp.zeros((3, 2))
    return cutlass_moe.moe_w8a8(x, ids, weights, *MOE_WEIGHTS, activation="silu")


def call_trtllm(x):
    ids, topk_weights = zeros(3, 2, dtype=jnp.int32), jnp.zeros((3, 2))
    weights = Weights(*MOE_WEIGHTS)
    return trtllm_moe.moe_w8a8(x, ids, topk_weights, weights, activation="silu")


def call_trtllm_with_logits(x):
    return trtllm_moe.route_and_moe_w8a8(
        x,
        jnp.zeros((3, 4)),
        None,
        Weights(*MOE_WEIGHTS),
        routing=Routing("softmax", 2),
        activation="silu",
    )


CALLS = [
    lambda x: quantize.mxfp8_quantize(x, "linear"),
    lambda x: quantize.capability() and x,
    call_dense,
    call_cutlass,
    call_trtllm,
    call_trtllm_with_logits,
]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("capability", [(9, 0), (8, 9), None])
@pytest.mark.parametrize("transform", [jax.jit, lambda f: f, jax.vmap])
def test_the_quantizer_refuses_devices_where_it_writes_nothing(
    claim, monkeypatch, call, capability, transform
):
    loaded = []
    monkeypatch.setattr(modules, "load", lambda *key: loaded.append(key))
    claim(capability)
    x = zeros(3, 128)
    x = x[None] if transform is jax.vmap else x
    here = "9.0" if capability == (9, 0) else "8.9" if capability else "not an NVIDIA"
    with pytest.raises(NotImplementedError, match=f"writes nothing below.*{here}"):
        transform(call)(x)
    assert loaded == []


def test_the_quantizer_refuses_to_be_lowered_for_a_gpu_elsewhere(claim):
    claim((9, 0))
    lower = jax.jit(lambda x: quantize.mxfp8_quantize(x, "128x4")).trace
    with pytest.raises(NotImplementedError, match=r"compute capability 10\.0 on"):
        lower(zeros(2, 64)).lower(lowering_platforms=("cuda",))


def test_the_quantizer_refuses_if_one_gpu_of_several_is_older(claim, monkeypatch):
    claim((10, 0))
    devices = [_Device("10.0"), _Device("10.0")]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert quantize.unsupported(jnp.bfloat16, 64) is None
    devices[1] = _Device("9.0")
    problem = quantize.unsupported(jnp.bfloat16, 64)
    assert problem is not None and "on every GPU of the process" in problem


class _Device:
    def __init__(self, compute_capability):
        self.compute_capability = compute_capability


def test_without_a_gpu_each_backend_says_what_it_needs():
    x, ids = zeros(3, 128), zeros(3, 2, dtype=jnp.int32)
    moe = {"activation": "silu", "apply_router_weight_on_input": False}
    w13, w2 = MOE_WEIGHTS[::2]
    for problem in (
        dense.unsupported(x, fp8(128, 128), out_dtype=jnp.bfloat16),
        cutlass_moe.unsupported(x, ids, w13, w2, **moe),
        trtllm_moe.unsupported(x, w13, w2, **moe),
    ):
        assert problem is not None
        assert "is for compute capability 10.0" in problem
        assert "this device is not an NVIDIA GPU" in problem


@pytest.mark.parametrize(
    "capability, name",
    [
        ((10, 0), "mxfp8_gemm_cutlass"),
        ((10, 3), "mxfp8_gemm_cutlass"),
        ((11, 0), "mxfp8_gemm_cutlass"),
        ((12, 0), "mxfp8_gemm_cutlass_sm120"),
        ((12, 1), "mxfp8_gemm_cutlass_sm120"),
    ],
)
def test_each_device_has_its_matmul(monkeypatch, claim, capability, name):
    claim(capability)
    asked = []
    record = lambda module, capability: asked.append((module.name, capability))
    monkeypatch.setattr(modules, "unavailable", record)
    assert dense.unsupported(zeros(2, 128), fp8(128, 128), out_dtype="float16") is None
    assert asked == [(name, capability), ("mxfp8_quantization_sm100", capability)]


@pytest.mark.parametrize("capability", [(10, 0), (10, 3)])
def test_each_device_has_its_experts(monkeypatch, claim, capability):
    claim(capability)
    asked = []
    record = lambda module, capability: asked.append(module.name)
    monkeypatch.setattr(modules, "unavailable", record)
    moe = {"activation": "relu2", "apply_router_weight_on_input": False}
    x, ids = zeros(2, 128, dtype=jnp.float16), zeros(2, 2, dtype=jnp.int32)
    problem = cutlass_moe.unsupported(x, ids, fp8(4, 128, 128), fp8(4, 128, 128), **moe)
    assert problem is None
    assert asked[0] == f"fused_moe_{capability[0] * 10 + capability[1]}"


@pytest.mark.parametrize(
    "dtype, n, k, out_dtype, reason",
    [
        (jnp.float32, 128, 128, jnp.bfloat16, "not float32"),
        (jnp.bfloat16, 128, 128, jnp.float32, "bfloat16 or float16, not float32"),
        (jnp.bfloat16, 64, 128, jnp.bfloat16, "got n=64 and k=128"),
        (jnp.bfloat16, 128, 144, jnp.bfloat16, "got n=128 and k=144"),
    ],
)
def test_dense_says_why_not(claim, dtype, n, k, out_dtype, reason):
    claim((10, 0))
    problem = dense.unsupported(
        zeros(4, k, dtype=dtype), fp8(n, k), out_dtype=out_dtype
    )
    assert problem is not None and reason in problem


def moe_problems(claim, **changes):
    """Returns what both MoE backends say about one change to what they can run."""
    claim((10, 0))
    options = {"activation": "silu", "apply_router_weight_on_input": False}
    sizes = {"t": 3, "top_k": 2, "e": 4, "h": 128, "i": 128, "halves": 2}
    dtype = changes.pop("dtype", jnp.bfloat16)
    options |= {name: changes.pop(name) for name in [*options] if name in changes}
    sizes |= changes
    e, h, i = (sizes[name] for name in "ehi")
    shape = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype)
    x = shape(sizes["t"], h)
    ids = shape(sizes["t"], sizes["top_k"], dtype=jnp.int32)
    w13 = shape(e, sizes["halves"] * i, h, dtype=jnp.float8_e4m3fn)
    w2 = shape(e, h, i, dtype=jnp.float8_e4m3fn)
    return (
        cutlass_moe.unsupported(x, ids, w13, w2, **options),
        trtllm_moe.unsupported(x, w13, w2, **options),
    )


@pytest.mark.parametrize(
    "activation, halves",
    [("silu", 2), ("swigluoai", 2), (SwiGLUOAI(limit=None), 2), ("relu2", 1)],
)
def test_experts_are_supported(claim, activation, halves):
    found = moe_problems(claim, activation=activation, halves=halves)
    assert found == (None, None)


@pytest.mark.parametrize(
    "changes, cutlass, trtllm",
    [
        ({"dtype": jnp.float16}, None, "returns bfloat16, not float16"),
        ({"dtype": jnp.float32}, "not float32", "not float32"),
        ({"h": 192}, "multiples of 128, got 192", "multiples of 128, got 192"),
        ({"i": 160}, "128 and 160", "128 and 160"),
        ({"halves": 1}, "got (4, 128, 128)", "got (4, 128, 128)"),
        ({"activation": "gelu"}, None, "has no gelu"),
        ({"activation": "gelu_tanh"}, None, "has no gelu_tanh"),
        ({"apply_router_weight_on_input": True}, "output only", "output only"),
        ({"t": 1 << 26, "e": 32}, "exceed what cutlass_fused_moe can count", None),
    ],
)
def test_experts_say_why_not(claim, changes, cutlass, trtllm):
    found = moe_problems(claim, **changes)
    for problem, reason in zip(found, (cutlass, trtllm), strict=True):
        assert problem is None if reason is None else reason in (problem or "")


@pytest.mark.parametrize(
    "routing, experts, reason",
    [
        (Routing("softmax", 8), 128, None),
        (Routing("softmax", 22), 512, None),
        (Routing("softmax", 2), 6, "a multiple of 4 experts"),
        (Routing("softmax", 8), 8, "more than top_k=8, got 8"),
        (Routing("softmax", 33), 512, "at most ((2048, 32),)"),
        (Routing("softmax", 8, renormalize=False), 128, None),
        (Routing("softmax", 8, renormalize=False), 512, "DEFAULT is compiled for"),
        (Routing("topk_softmax", 4), 32, None),
        (Routing("sqrtsoftplus", 8), 256, "no routing method for"),
        (Routing("softmax", 8, scaling_factor=2.0), 256, "scaling_factor=2.0"),
        (Routing("softmax", 8, has_bias=True), 256, "a correction bias"),
        (Routing("sigmoid", 8, renormalize=False, has_bias=True), 256, "a correction"),
        (Routing("sigmoid", 8), 256, None),
        (Routing("sigmoid", 8), 384, "SIGMOID_RENORM is compiled for"),
        (Routing("sigmoid", 8, has_bias=True), 384, None),
        (Routing("sigmoid", 22, has_bias=True), 512, None),
        (Routing("sigmoid", 22, has_bias=True), 896, None),
        (Routing("sigmoid", 33, has_bias=True), 896, "MINIMAX2 is compiled for"),
        (Routing("sigmoid", 8, True, 8, 4, 2.5, True), 256, None),
        (Routing("sigmoid", 8, True, 16, 4, 2.5, True), 256, "at most 8 groups"),
        (Routing("sigmoid", 2, True, 8, 4), 8, "groups of 2 to 32 experts"),
        (Routing("sigmoid", 8, True, 8, 5, 2.5, True), 256, "at most 4 groups kept"),
        (Routing("sigmoid", 8, True, 8, 1, 2.5, True), 64, "more experts in them"),
        (Routing("sigmoid", 8, True, 4, 2, 2.5, True), 256, "of 2 to 32 experts"),
        (Routing("sigmoid", 9, True, 8, 4, 2.5, True), 256, "top_k up to 8"),
    ],
)
def test_routing_says_why_not(routing, experts, reason):
    problem = trtllm_routing.unsupported(routing, experts)
    assert problem is None if reason is None else reason in (problem or "")


def test_groups_go_to_the_one_method_that_has_them():
    routing = Routing("sigmoid", 8, True, 8, 4, 2.5, True)
    assert trtllm_routing.method_type(routing) is RoutingMethodType.DEEPSEEK_V3


def test_given_ids_have_limits_too():
    assert trtllm_moe.unsupported_ids(8, 1) is None  # one expert of many is here
    assert trtllm_moe.unsupported_ids(2, 6) is None
    problem = trtllm_moe.unsupported_ids(33, 128)
    assert problem is not None and "RENORMALIZE is compiled for" in problem


@pytest.mark.parametrize(
    "logits_dtype, bias_dtype, offset, reason",
    [
        (jnp.float32, None, 0, None),
        (jnp.bfloat16, jnp.float32, 24, None),
        (jnp.float16, None, 0, "not on float16"),
        (jnp.float32, jnp.float16, 0, "not on float16"),
        (jnp.float32, None, 25, "experts 25 to 32 are not all of the router's"),
        (jnp.float32, None, -1, "experts -1 to 6"),
    ],
)
def test_logits_have_limits(logits_dtype, bias_dtype, offset, reason):
    bias = None if bias_dtype is None else jnp.zeros(32, bias_dtype)
    routing = Routing("sigmoid", 4, has_bias=bias is not None)
    problem = trtllm_moe.unsupported_logits(
        jnp.zeros((3, 32), logits_dtype),
        bias,
        routing=routing,
        num_local_experts=8,
        local_expert_offset=offset,
    )
    assert problem is None if reason is None else reason in (problem or "")
    problem = trtllm_moe.unsupported_logits(
        jnp.zeros((3, 30)), None, routing=routing, num_local_experts=8
    )
    assert problem is not None and "a multiple of 4 experts" in problem

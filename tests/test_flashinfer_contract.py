"""Argument by argument, jmx8 calls FlashInfer's kernels as FlashInfer's wrappers do."""

import inspect

import jax
import jax.numpy as jnp
import pytest


torch = pytest.importorskip("torch")
pytest.importorskip("flashinfer")
pytest.importorskip("jax_tvm_ffi")

from jmx8 import quantize as reference_quantize
from jmx8.kernels.flashinfer import (
    activation as flashinfer_activation,
    cutlass_moe,
    dense,
    prepare,
    quantize,
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
)


pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("layout", ["128x4", "8x4", "linear"])
@pytest.mark.parametrize(
    "shape, dtype",
    [
        ((1, 32), jnp.bfloat16),
        ((130, 96), jnp.float16),
        ((7, 256), jnp.bfloat16),
        ((3, 5, 128), jnp.bfloat16),
    ],
)
def test_mxfp8_quantize(shape, dtype, layout):
    x = normal(0, shape, dtype)
    with recorded() as calls:
        elements, scales = jax.jit(quantize.mxfp8_quantize, static_argnums=1)(x, layout)
    assert elements.shape == shape and elements.dtype == jnp.float8_e4m3fn
    assert scales.shape == (quantized(x.reshape(-1, shape[-1]), layout)[1].size,)
    torch_dtype = getattr(torch, jnp.dtype(dtype).name)
    number = {"128x4": 0, "8x4": 1, "linear": 2}[layout]
    expected = recorder.mxfp8_quantize(shape, torch_dtype, number)
    names = ("x", "elements", "scales", "layout", "alignment", "enable_pdl")
    ((_, actual),) = calls
    # FlashInfer's side has no data.
    assert_same_call(actual, expected, names, ("x", "elements", "scales"))
    assert actual[0].value == recorder.describe(to_torch(x)).value


@pytest.mark.parametrize(
    "m, n, k, out_dtype, capability",
    [
        (1, 128, 128, jnp.bfloat16, (10, 0)),
        (1, 160, 288, jnp.float16, (12, 0)),
        (3, 96, 64, jnp.bfloat16, (11, 0)),
        (128, 130, 256, jnp.float16, (10, 3)),
        (257, 160, 288, jnp.bfloat16, (12, 1)),
        (257, 384, 512, jnp.float16, (10, 0)),
    ],
)
def test_mm_mxfp8(m, n, k, out_dtype, capability):
    x, w = normal(m, (m, k)), reference_quantize(normal(n, (n, k)))
    prepared_elements, prepared_scales = prepare.dense_cutlass().prepare(w)
    padded_n, padded_k = prepared_elements.shape
    x_padded = jnp.pad(x, [(0, 0), (0, padded_k - k)])
    elements, scales = quantized(x_padded, "128x4")
    product = normal(1, (m, padded_n), out_dtype)
    results = {
        "mxfp8_quantize": [(1, elements), (2, scales)],
        "mxfp8_gemm": [(4, product)],
    }
    with recorded(capability, results=results) as calls:
        out = jax.jit(lambda *a: dense.matmul_w8a8(*a, n=n, out_dtype=out_dtype))(
            x, prepared_elements, prepared_scales
        )
    assert jnp.array_equal(out, product[:, :n])
    expected = recorder.mm_mxfp8(
        to_torch(elements),
        to_torch(prepared_elements),
        to_torch(scales),
        to_torch(prepared_scales),
        getattr(torch, jnp.dtype(out_dtype).name),
        capability,
    )
    names = ("x", "w", "x_scales", "w_scales", "out", "workspace", "tactic")
    assert_same_call(calls[1][1], expected, names, ("out", "workspace"))


@pytest.mark.parametrize("tactic", [-1, 0, 31])
def test_mm_mxfp8_passes_its_tactic(tactic):
    x, w = normal(0, (2, 3, 128)), reference_quantize(normal(1, (2, 128, 128)))
    prepared = prepare.dense_cutlass().prepare(w)
    with recorded() as calls:
        out = dense.matmul_w8a8(
            x, *prepared, n=128, out_dtype=jnp.bfloat16, tactic=tactic
        )
    assert out.shape == (2, 3, 128)
    gemms = [arguments for name, arguments in calls if name == "mxfp8_gemm"]
    assert [arguments[6].value for arguments in gemms] == [tactic] * 2  # one a group
    for arguments, elements in zip(gemms, prepared[0], strict=True):
        assert arguments[1] == recorder.describe(to_torch(elements))


@pytest.mark.parametrize("tokens, hidden, inner", SHAPES)
@pytest.mark.parametrize("activation", [*ACTIVATIONS, "gelu", "gelu_tanh"])
def test_cutlass_fused_moe(tokens, hidden, inner, activation):
    # Each axis of the grid that is no parameter follows from those that are.
    dtype = jnp.float16 if tokens == 5 else jnp.bfloat16
    has_bias, deterministic = tokens != 1, activation != "silu"
    layer = Layer(tokens, hidden, inner, activation, dtype)
    prepared = layer.prepared(prepare.moe_cutlass)
    biases = (None, None)
    if has_bias:
        biases = layer.prepared_biases(prepare.bias_cutlass)
    elements, scales = quantized(layer.x_padded, "128x4")
    out = normal(8, layer.x_padded.shape, dtype)
    results = {"mxfp8_quantize": [(1, elements), (2, scales)], "run_moe": [(0, out)]}
    with recorded(results=results) as calls:
        run = jax.jit(
            lambda *operands: cutlass_moe.moe_w8a8(
                *operands,
                activation=activation,
                deterministic=deterministic,
                tactics=(3, 9),
            )
        )
        ours = run(layer.x, layer.ids, layer.weights, *prepared, *biases)
    assert jnp.array_equal(ours, out[:, :hidden])
    calls = dict(calls)
    is_local = (layer.ids >= 0) & (layer.ids < EXPERTS)
    ones = torch.ones(EXPERTS)
    alpha, beta, limit = layer.swiglu()
    w13, w13_scales, w2, w2_scales = map(to_torch, prepared)
    as_torch = lambda a: None if a is None else to_torch(a)
    expected_init, expected = recorder.cutlass_fused_moe(
        input=to_torch(elements),
        token_selected_experts=to_torch(jnp.where(is_local, layer.ids, EXPERTS)),
        token_final_scales=to_torch(layer.weights),
        fc1_expert_weights=w13,
        fc2_expert_weights=w2,
        output_dtype=getattr(torch, jnp.dtype(dtype).name),
        quant_scales=[w13_scales, ones, w2_scales, ones],
        fc1_expert_biases=as_torch(biases[0]),
        fc2_expert_biases=as_torch(biases[1]),
        input_sf=to_torch(scales),
        swiglu_alpha=alpha,
        swiglu_beta=beta,
        swiglu_limit=limit,
        ep_size=2,
        ep_rank=0,
        activation_type=layer.torch_activation,
        use_fused_finalize=not deterministic,
        profile_ids=[3, 9],
        workspace_buffer=torch.zeros(12_345, dtype=torch.uint8),
    )
    assert calls["init"] == expected_init and len(expected_init) == 9
    assert len(expected) == 29
    assert_same_call(
        calls["run_moe"], expected, cutlass_moe._ARGUMENTS, ("out", "workspace")
    )


def test_no_tokens_are_no_call():
    layer = Layer(1, HIDDEN, INNER, "silu")
    none = lambda a: a[:0]
    x, ids, weights = map(none, (layer.x, layer.ids, layer.weights))
    w = reference_quantize(normal(1, (128, 128)))
    dense_weight = prepare.dense_cutlass().prepare(w)
    with recorded() as calls:
        outs = (
            dense.matmul_w8a8(x[:, :128], *dense_weight, n=99, out_dtype=jnp.float16),
            cutlass_moe.moe_w8a8(
                x, ids, weights, *layer.prepared(prepare.moe_cutlass), activation="silu"
            ),
        )
    assert [out.shape for out in outs] == [(0, 99), (0, HIDDEN)]
    assert calls == []


def test_the_contract_covers_every_parameter_of_the_wrappers():
    # A new parameter of FlashInfer's must be looked at before its version is let in.
    fused_moe = recorder.flashinfer.fused_moe
    parameters = {
        recorder.flashinfer.mxfp8_quantize: 6,
        recorder.flashinfer.mm_mxfp8: 8,
        fused_moe.trtllm_fp8_block_scale_moe: 35,
        fused_moe.trtllm_fp8_block_scale_routed_moe: 31,
        fused_moe.cutlass_fused_moe: 38,
    }
    counts = {f: len(inspect.signature(f).parameters) for f in parameters}
    assert counts == parameters


def test_numbers_of_activations_are_flashinfers():
    theirs = recorder.flashinfer.ActivationType
    names = {
        "silu": theirs.Swiglu,
        "swigluoai": theirs.Swiglu,
        "gelu": theirs.Geglu,
        "gelu_tanh": theirs.GegluTanh,
        "relu2": theirs.Relu2,
    }
    assert flashinfer_activation.ACTIVATION_TYPES == names
    is_gated = recorder.flashinfer.tllm_enums.is_gated_activation
    assert [name for name in names if not is_gated(names[name])] == ["relu2"]


def test_a_deviation_is_found():
    arguments = [recorder.describe(value) for value in (1, None, torch.zeros(2))]
    names = ("a", "b", "c")
    assert_same_call(arguments, arguments, names)
    for i, value in enumerate((True, 0, torch.ones(2))):
        wrong = [*arguments[:i], recorder.describe(value), *arguments[i + 1 :]]
        with pytest.raises(AssertionError, match=f"argument {i + 1}, {names[i]}"):
            assert_same_call(wrong, arguments, names)

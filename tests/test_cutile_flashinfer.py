"""Compares what jmx8 knows of FlashInfer's cuTile kernels with FlashInfer itself."""

import functools
import types

import jax
import jax.numpy as jnp
import pytest

from jmx8.kernels.cutile import _backend, _kernels, _launch, _pipeline
from jmx8.kernels.cutile._tiles import Gemm, Tiles
from jmx8.kernels.flashinfer import _version


torch = pytest.importorskip("torch")
ct = pytest.importorskip("cuda.tile")
pytest.importorskip("flashinfer")
# FlashInfer imports what warns about being deprecated.
pytestmark = pytest.mark.filterwarnings("ignore")


@functools.cache
def flashinfer_modules():
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from flashinfer.fused_moe import api
        from flashinfer.fused_moe.cutile import activation, fp8, moe
    return types.SimpleNamespace(activation=activation, fp8=fp8, moe=moe, api=api)


def test_version_is_the_one_that_is_declared():
    assert _version.version_problem() is None


@pytest.mark.parametrize("kernel", _kernels.ALL, ids=lambda k: k.function)
def test_parameters_are_those_of_the_kernel(kernel):
    function = getattr(getattr(flashinfer_modules(), kernel.module), kernel.function)
    annotated = function._annotated_function
    assert list(annotated.pysig.parameters) == list(kernel.parameters)
    hints = annotated.pyfunc.__annotations__
    for (name, parameter), found in zip(
        kernel.parameters.items(), annotated.parameter_annotations, strict=True
    ):
        assert found.constant == isinstance(parameter, _launch.Constant), name
        if isinstance(parameter, _launch.Constant):
            kinds = {
                ct.Constant[int]: int,
                ct.Constant[float]: float,
                ct.Constant[bool]: bool,
            }
            hint = hints[name]
            if isinstance(hint, str):
                hint = annotated.pyfunc.__globals__[hint]
            assert kinds[hint] is parameter.kind, name
        is_wide = found.array is not None and found.array.index_dtype == ct.int64
        assert is_wide == getattr(parameter, "wide", False), name


ACTIVATIONS = {
    "silu": lambda api: api.SwiGLU(),
    "gelu": lambda api: api.GeGLU(),
    "gelu_tanh": lambda api: api.GeGLUTanh(),
    "swigluoai": lambda api: api.SwiGLU(alpha=1.702, beta=1.0, limit=7.0),
    "relu2": lambda api: api.ReLU2(),
}


def flashinfer_launches(monkeypatch, t, k, e, h, i, activation, tiles):
    """Runs FlashInfer's own MoE on tensors without memory; returns its launches."""
    modules = flashinfer_modules()
    launches = []

    def launch(stream, grid, kernel, arguments):
        launches.append((kernel, grid, arguments))

    monkeypatch.setattr(ct, "launch", launch)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    empty = functools.partial(torch.empty, device="meta")
    config = ACTIVATIONS[activation](modules.api)
    workspace = modules.fp8.allocate_workspace(
        activation_fp8=False,
        block_scaled=True,
        num_tokens=t,
        hidden_size=h,
        intermediate_size=i,
        num_experts=e,
        top_k=k,
        is_gated=config.is_gated,
        block_sizes=(tiles.rows,),
        device="meta",
    )
    rows = i * (2 if config.is_gated else 1)
    weights = lambda n, c: (
        empty(e, n, c, dtype=torch.float8_e4m3fn),
        empty(e, n, c // 32, dtype=torch.float8_e8m0fnu),
    )
    gemm_config = lambda g: modules.moe.GemmConfig(g.n, g.k, g.occupancy)
    modules.fp8.run_moe(
        empty(t, h, dtype=torch.bfloat16),
        empty(t, k, dtype=torch.int32),
        empty(t, k, dtype=torch.float32),
        *weights(rows, h),
        *weights(h, i),
        empty(t, h, dtype=torch.bfloat16),
        workspace,
        activation=config,
        activation_fp8=False,
        block_scaled=True,
        weight_fp4=False,
        block_size=tiles.rows,
        gemm1_config=gemm_config(tiles.first),
        gemm2_config=gemm_config(tiles.second),
        sorted_input=True,
        num_sms=132,
    )
    return launches


def our_launches(t, k, e, h, i, activation, tiles):
    shape = jax.ShapeDtypeStruct
    weights = functools.partial(_backend.abstract_weights, e)
    layer = functools.partial(
        _pipeline.moe,
        activation=activation,
        apply_router_weight_on_input=False,
        tiles=tiles,
        target=_launch.Target("sm_90", lambda cubin: b""),
    )
    with _launch.record() as launches:
        jax.eval_shape(
            layer,
            shape((t, h), jnp.bfloat16),
            weights(i * (1 if activation == "relu2" else 2), h),
            weights(h, i),
            shape((t, k), jnp.int32),
            shape((t, k), jnp.float32),
        )
    return launches


def differences(ours, theirs):
    """Returns names of arguments in which two launches of a kernel differ."""
    kernel, grid, arguments = theirs
    annotated = kernel._annotated_function
    assert annotated.pyfunc.__name__ == ours.cubin.function
    assert (*grid, 1)[:2] == ours.grid
    assert dict(ours.cubin.hints).get("occupancy") == kernel._compiler_options.occupancy
    different = []
    for (name, parameter), value in zip(
        ours.kernel.parameters.items(), arguments, strict=True
    ):
        if isinstance(parameter, _launch.Unused):
            continue
        found = ours.arguments[name]
        if isinstance(value, torch.Tensor):
            dtype = str(value.dtype).removeprefix("torch.")
            value = (tuple(value.shape), dtype)
            found = (found.shape, _launch._kernel_dtype(found.dtype))
        if (type(found), found) != (type(value), value):
            different.append(name)
    # What makes the arrays that we do not pass unused.
    for name, switches in {"AMAX_PARTIAL": ("A8", "WRITE_AMAX"), "OS": ("MX",)}.items():
        if name in ours.kernel.parameters:
            assert not any(ours.arguments[switch] for switch in switches)
    return different


def assert_same_launches(ours, theirs, *, few_rows):
    # The sum over experts is XLA's with us.
    (combine, *_), theirs = theirs[-1], theirs[:-1]
    assert combine._annotated_function.pyfunc.__name__.startswith("_combine")
    assert len(ours) == len(theirs)
    for mine, flashinfers in zip(ours, theirs, strict=True):
        expected = []
        if "GRID_N" in mine.arguments:
            # It matters with WRITE_AMAX only; and the last one leaves rows in place.
            is_last = mine is ours[-1] and not few_rows
            expected = ["OUT", "SCATTER", "GRID_N"] if is_last else ["GRID_N"]
        assert differences(mine, flashinfers) == expected


# FlashInfer fuses the activation for up to 64 tokens.
CASES = [
    (t, rows, "silu", 128, 8)
    for t in (1, 2, 3, 4, 5, 16, 33, 64, 65, 128, 257, 1024, 4096, 8192)
    for rows in (16, 32, 64, 128)
]
CASES += [(t, 16, a, 128, 8) for t in (1, 7, 200) for a in ACTIVATIONS]
CASES += [(t, 32, "silu", e, k) for t in (1, 300, 8192) for e, k in ((8, 2), (60, 4))]
CASES += [(16, 16, "silu", 384, 8), (20000, 64, "silu", 256, 8)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_launches_are_those_of_flashinfer(case, monkeypatch):
    t, rows, activation, e, k = case
    tiles = Tiles(rows, Gemm(128, 128, 2), Gemm(64, 128, 4), fused=t <= 64)
    theirs = flashinfer_launches(monkeypatch, t, k, e, 2048, 768, activation, tiles)
    ours = our_launches(t, k, e, 2048, 768, activation, tiles)
    assert_same_launches(ours, theirs, few_rows=t * k <= 24)


def test_launches_of_a_layer_that_needs_64_bits(monkeypatch):
    tiles = Tiles(128, Gemm(128, 128, 2), Gemm(64, 128, 2), fused=False)
    size = (256, 8, 256, 7168, 2048)
    theirs = flashinfer_launches(monkeypatch, *size, "silu", tiles)
    ours = our_launches(*size, "silu", tiles)
    assert any(launch.cubin.function == "_sorted_grouped_i64" for launch in ours)
    assert_same_launches(ours, theirs, few_rows=False)

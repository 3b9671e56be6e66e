"""The Hopper kernels' library itself, which compiles without a GPU: what its kernels
take, and what its functions refuse.
"""

import re

import jax.numpy as jnp
import pytest

from jmx8.kernels.sm90 import _build


@pytest.fixture(scope="session")
def built():
    """The library, built into the user's cache, or the one that is there."""
    if problem := _build.unbuildable():
        pytest.skip(f"cannot build: {problem}")
    return _build.build()


def plain_name(mangled: str) -> str:
    """Returns the function's name without namespaces and template arguments."""
    rest, name = re.sub(r"^_ZN?", "", mangled), ""
    while match := re.match(r"L?(\d+)", rest):
        end = match.end() + int(match[1])
        name, rest = rest[match.end() : end], rest[end:]
    return name


def stated_registers() -> dict[str, int]:
    text = "\n".join(p.read_text() for p in _build.sources() if p.name != "kernels.h")
    lines = re.findall(r"^// Registers: (\w+) <= (\d+)$", text, re.M)
    assert len(dict(lines)) == len(lines)
    return {name: int(registers) for name, registers in lines}


def test_kernels_take_no_more_than_their_files_state(built):
    limits, wrong = stated_registers(), []
    kernels = _build.record(built)["kernels"]
    for mangled, usage in kernels.items():
        limit = limits.get(plain_name(mangled), 0)
        if usage["registers"] > limit or usage["spilled"] or usage["serialized"]:
            wrong.append(f"{mangled}: {usage}, stated: {limit}")
    assert not wrong, "\n".join(wrong)
    assert {plain_name(mangled) for mangled in kernels} == set(limits)


@pytest.mark.parametrize(
    ("mangled", "name"),
    [
        ("_Z4copyPf", "copy"),
        ("_ZN4jmx84GemmINS_5ShapeILi8EEEEEvNS_4ArgsE", "Gemm"),
        (
            "_ZN34_GLOBAL__N__0bf5d2cf_10_permute_cu7PermuteEv",
            "Permute",
        ),
        ("_ZN4jmx8L5RouteEPKf", "Route"),
    ],
)
def test_plain_name_of_a_kernel(mangled, name):
    assert plain_name(mangled) == name


def test_functions_are_there(built):
    tvm_ffi = pytest.importorskip("tvm_ffi")
    module = tvm_ffi.load_module(str(built))
    for name in ("gemm", "permute", "mix", "moe", "route", "quantize"):
        assert module[name] is not None


# Operands on the host, so that a call that is right in all else is refused, too.
_BF16, _F32, _I32 = jnp.bfloat16, jnp.float32, jnp.int32
_E4M3, _E8M0 = jnp.float8_e4m3fn, jnp.float8_e8m0fnu
_GEMM = {
    "x": ((5, 64), _BF16),
    "w": ((6, 64), _E4M3),
    "scales": ((6, 2), _E8M0),
    "bias": None,
    "out": ((5, 6), _BF16),
    "slot_rows": None,
    "tiles": None,
    "num_tiles": None,
    "activation": 0,
    "alpha": 0.0,
    "beta": 0.0,
    "limit": 7.0,
    "kernel": 0,
    "tile_rows": 8,
    "variant": 0,
    "split_k": 1,
}
_GROUPED = _GEMM | {
    "w": ((3, 6, 64), _E4M3),
    "scales": ((3, 6, 2), _E8M0),
    "bias": ((3, 6), _F32),
    "out": ((10, 3), _F32),
    "slot_rows": ((10,), _I32),
    "tiles": ((4, 4), _I32),
    "num_tiles": ((1,), _I32),
    "activation": 1,
}
_PERMUTE = {
    "ids": ((5, 2), _I32),
    "slot_rows": ((10,), _I32),
    "slot_of_row": ((5, 2), _I32),
    "tiles": ((4, 4), _I32),
    "num_tiles": ((1,), _I32),
    "num_experts": 3,
    "tile_rows": 8,
    "row_divisor": 2,
}
_MOE = {
    "x": ((5, 64), _BF16),
    "w13": ((3, 80, 64), _E4M3),
    "w13_scales": ((3, 80, 2), _E8M0),
    "w13_bias": ((3, 80), _F32),
    "w2": ((3, 16, 64), _E4M3),
    "w2_scales": ((3, 16, 2), _E8M0),
    "w2_bias": ((3, 16), _BF16),
    "ids": ((5, 2), _I32),
    "weights": ((5, 2), _F32),
    "out": ((5, 16), _BF16),
    "slot_rows": ((10,), _I32),
    "slot_of_row": ((5, 2), _I32),
    "tiles": ((4, 4), _I32),
    "num_tiles": ((1,), _I32),
    "hidden": ((10, 64), _BF16),
    "rows": ((10, 16), _BF16),
    "row_divisor": 2,
    "activation": 1,
    "alpha": 0.0,
    "beta": 0.0,
    "limit": 7.0,
    "tile_rows": 8,
    "first_kernel": 0,
    "first_variant": 2,
    "first_split_k": 1,
    "second_kernel": 0,
    "second_variant": 2,
    "second_split_k": 1,
}
_MIXED_FIRST = {"first_kernel": 1, "first_variant": 8}
_MIXED_SECOND = {"second_kernel": 1, "second_variant": 8}
_MIX = {"x": ((5, 128), _BF16), "out": ((5, 128), _BF16)}
_ROUTE = {
    "logits": ((5, 8), _F32),
    "bias": ((8,), _F32),
    "ids": ((5, 2), _I32),
    "weights": ((5, 2), _F32),
    "scores": 0,
    "num_groups": 2,
    "topk_groups": 1,
    "renormalize": True,
    "scaling_factor": 1.0,
}
_QUANTIZE = {
    "x": ((2, 5, 64), _BF16),
    "elements": ((2, 5, 64), _E4M3),
    "scales": ((2, 5, 2), _E8M0),
}
_REFUSALS = [
    ("gemm", _GEMM, {}, "x must be in the memory of a CUDA device"),
    ("gemm", _GROUPED, {}, "x must be in the memory of a CUDA device"),
    ("permute", _PERMUTE, {}, "ids must be in the memory of a CUDA device"),
    ("moe", _MOE, {}, "first matmul: x must be in the memory"),
    ("route", _ROUTE, {}, "logits must be in the memory"),
    ("quantize", _QUANTIZE, {}, "x must be in the memory"),
    ("gemm", _GEMM, {"x": ((5, 64), _F32)}, "x must be bfloat16 [any, any], got float"),
    ("gemm", _GEMM, {"x": ((5, 48), _BF16)}, "x must have a multiple of 32 columns"),
    (
        *("gemm", _GEMM, {"x": ((5, 32), _BF16)}),
        "w must be float8_e4m3fn or uint8 [any, 32], got float8_e4m3fn [6, 64]",
    ),
    (
        "gemm",
        _GEMM,
        {"w": ((3, 6, 64), _E4M3)},
        "w must be float8_e4m3fn or uint8 [any",
    ),
    (
        *("gemm", _GEMM, {"scales": ((6, 64), _E8M0)}),
        "scales must be float8_e8m0fnu or uint8 [6, 2], got float8_e8m0fnu [6, 64]",
    ),
    ("gemm", _GEMM, {"scales": ((6, 2), _F32)}, "scales must be float8_e8m0fnu"),
    ("gemm", _GEMM, {"bias": ((5,), _BF16)}, "bias must be bfloat16 or float32 [6]"),
    (
        "gemm",
        _GEMM,
        {"out": ((4, 6), _BF16)},
        "out must have the rows of x, which are 5",
    ),
    (
        "gemm",
        _GEMM,
        {"out": ((5, 6), _I32)},
        "out must be bfloat16 or float32 [any, 6]",
    ),
    ("gemm", _GEMM, {"slot_rows": ((5,), _I32)}, "slot_rows must be None without"),
    ("gemm", _GEMM, {"activation": 6}, "activation must be the number of one"),
    ("gemm", _GEMM, {"kernel": 2}, "kernel must be 0 (mma) or 1 (wgmma)"),
    ("gemm", _GEMM, {"split_k": 0}, "tile_rows and split_k must be positive"),
    ("gemm", _GROUPED, {"num_tiles": None}, "tiles and num_tiles belong together"),
    ("gemm", _GROUPED, {"tiles": ((4, 3), _I32)}, "tiles must be int32 [any, 4]"),
    (
        "gemm",
        _GROUPED,
        {"bias": ((6,), _F32)},
        "bias must be bfloat16 or float32 [3, 6]",
    ),
    (
        "gemm",
        _GROUPED,
        {"out": ((10, 6), _F32)},
        "out must be bfloat16 or float32 [any, 3",
    ),
    ("gemm", _GROUPED, {"slot_rows": ((9,), _I32)}, "slot_rows must be int32 [10]"),
    ("gemm", _GROUPED, {"slot_rows": None}, "out must have the rows of x"),
    ("permute", _PERMUTE, {"ids": ((10,), _I32)}, "ids must be int32 [any, any]"),
    ("permute", _PERMUTE, {"slot_rows": ((9,), _I32)}, "slot_rows must be int32 [10]"),
    ("permute", _PERMUTE, {"tiles": ((3, 4), _I32)}, "tiles must have at least 4 rows"),
    (
        "permute",
        _PERMUTE,
        {"tile_rows": 0},
        "num_experts, tile_rows and row_divisor must be positive",
    ),
    ("moe", _MOE, {"second_kernel": 2}, "kernel must be 0 (mma) or 1 (wgmma)"),
    ("moe", _MOE, {"ids": ((5, 3), _I32)}, "slot_rows must be int32 [15]"),
    ("moe", _MOE, {"ids": ((5,), _I32)}, "ids must be int32 [any, any]"),
    ("moe", _MOE, {"weights": ((2, 5), _F32)}, "weights must be float32 [5, 2]"),
    ("moe", _MOE, {"out": ((5, 8), _BF16)}, "out must be bfloat16 [5, 16]"),
    ("moe", _MOE, {"rows": ((10, 24), _BF16)}, "second matmul: out must be bfloat16"),
    ("moe", _MOE, {"rows": ((10, 16), _F32)}, "rows must be bfloat16 [10, any]"),
    (
        "moe",
        _MOE,
        {"w13": ((3, 6, 32), _E4M3)},
        "first matmul: w must be float8_e4m3fn",
    ),
    (
        "moe",
        _MOE,
        {"w2": ((2, 16, 64), _E4M3)},
        "second matmul: scales must be float8_e8m0fnu or uint8 [2, 16, 2]",
    ),
    (
        "moe",
        _MOE,
        {"hidden": ((10, 32), _BF16)},
        "first matmul: out must have at least",
    ),
    ("moe", _MOE, _MIXED_FIRST, "a first matmul of mixed rows needs split_k 1, and a"),
    ("moe", _MOE, _MIXED_SECOND, "a second matmul of mixed rows needs a first one"),
    ("moe", _MOE, _MIXED_FIRST | _MIXED_SECOND, "rows must have room for x"),
    (
        "moe",
        _MOE | {"x": ((5, 96), _BF16), "w13": ((3, 80, 96), _E4M3)},
        {"w13_scales": ((3, 80, 3), _E8M0)} | _MIXED_FIRST | _MIXED_SECOND,
        "x and hidden must have multiples of 64 columns",
    ),
    ("mix", _MIX, {}, "x must be in the memory of a CUDA device"),
    ("mix", _MIX, {"out": ((5, 64), _BF16)}, "out must be bfloat16 [5, 128]"),
    ("mix", {"x": ((5, 96), _BF16), "out": ((5, 96), _BF16)}, {}, "x must have a mul"),
    ("route", _ROUTE, {"bias": ((5,), _F32)}, "bias must be float32 [8]"),
    ("route", _ROUTE, {"bias": ((8, 5), _F32)}, "bias must be float32 [5, 8]"),
    ("route", _ROUTE, {"num_groups": 3}, "num_groups must divide the experts"),
    ("route", _ROUTE, {"scores": 4}, "scores must be the number of one"),
    ("route", _ROUTE, {"ids": ((4, 2), _I32)}, "ids must be int32 [5, any]"),
    ("quantize", _QUANTIZE, {"x": ((5, 48), _BF16)}, "x must have a multiple of 32"),
    (
        "quantize",
        _QUANTIZE,
        {"scales": ((2, 5, 1), _E8M0)},
        "scales must be float8_e8m0",
    ),
    (
        "quantize",
        _QUANTIZE,
        {"elements": ((2, 5, 64), _BF16)},
        "elements must be float8",
    ),
]


@pytest.mark.cpu
@pytest.mark.parametrize(("name", "call", "change", "message"), _REFUSALS)
def test_what_the_functions_refuse(name, call, change, message, built):
    tvm_ffi = pytest.importorskip("tvm_ffi")
    arguments = [
        tvm_ffi.from_dlpack(jnp.zeros(*value)) if isinstance(value, tuple) else value
        for value in (call | change).values()
    ]
    with pytest.raises(ValueError, match=f"^{name}(: |, ){re.escape(message)}"):
        tvm_ffi.load_module(str(built))[name](*arguments)

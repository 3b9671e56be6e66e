"""The backend "sm90" of the ops through its functions, emulated on the host."""

import functools
import pathlib
import subprocess
import sys
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmx8 import (
    autotune,
    dequantize,
    explain,
    mx_matmul,
    mx_moe,
    quantize,
    quantize_params,
    route,
    SwiGLUOAI,
)
from jmx8._mx_array import quantize as reference_quantize
from jmx8.kernels import tactics
from jmx8.kernels.sm90 import configs, dense
from jmx8.nn import MXLinear
from jmx8.ops.routing import RoutingMethod

from .helpers import assert_bits_equal, assert_matmul_close


pytest.importorskip("jax_tvm_ffi")
from . import emulated_sm90


pytestmark = pytest.mark.cpu


@pytest.fixture
def calls(monkeypatch, tmp_path):
    monkeypatch.setattr(tactics, "path", lambda: tmp_path / "tactics.json")
    return emulated_sm90.use(monkeypatch)


def normal(seed, *shape, dtype=jnp.bfloat16) -> Any:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def assert_close(out, expected):
    """Sums in another order, rounded once more on the way at most."""
    assert out.dtype == expected.dtype and out.shape == expected.shape
    out, expected = (np.asarray(a, np.float64) for a in (out, expected))
    scale = np.sqrt(np.mean(expected**2))
    np.testing.assert_allclose(out, expected, rtol=2**-7, atol=2**-7 * scale)


def names_of(calls):
    return [name for name, _ in calls]


class TestMatmul:
    @pytest.mark.parametrize("m", [1, 7, 129])
    @pytest.mark.parametrize("n, k", [(161, 256), (3, 70)])
    @pytest.mark.parametrize("out_dtype", [jnp.bfloat16, jnp.float32])
    def test_is_the_product(self, calls, m, n, k, out_dtype):
        x, w = normal(0, m, k), reference_quantize(normal(1, n, k))
        out = jax.jit(lambda x, w: mx_matmul(x, w, out_dtype=out_dtype))(x, w)
        assert out.dtype == out_dtype
        assert_matmul_close(out, x, w, acc_bits=20)
        ((_, given),) = calls
        assert given["bias"] is None and given["tiles"] is None
        assert given["activation"] == 0

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float16])
    def test_bias_is_added_before_the_rounding(self, calls, dtype):
        x, w = normal(0, 5, 64), reference_quantize(normal(1, 8, 64))
        bias = normal(2, 8, dtype=dtype) * 100
        options = {"bias": bias, "out_dtype": jnp.float32}
        out = mx_matmul(x, w, **options)
        expected = mx_matmul(x, w, implementation="xla", **options)
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
        passed = "float32" if dtype == jnp.float16 else jnp.dtype(dtype).name
        assert calls[0][1]["bias"] == (passed, (8,))

    @pytest.mark.parametrize("m", [1, 9, 40])
    @pytest.mark.parametrize("groups", [(3,), (2, 2)])
    def test_groups_are_one_call(self, calls, m, groups):
        w = reference_quantize(normal(1, *groups, 40, 96))
        x, bias = normal(0, *groups, m, 96), normal(2, *groups, 40)
        out = mx_matmul(x, w, bias=bias)
        assert names_of(calls) == ["gemm"]
        assert_close(out, mx_matmul(x, w, bias=bias, implementation="xla"))

    @pytest.mark.parametrize("bias_axis", [None, 0])
    @pytest.mark.parametrize("w_axis", [None, 0])
    @pytest.mark.parametrize("x_axis", [None, 0])
    def test_vmap_is_one_call(self, calls, x_axis, w_axis, bias_axis):
        if x_axis == w_axis == bias_axis is None:
            return
        stack = lambda axis: () if axis is None else (3,)
        x = normal(0, *stack(x_axis), 5, 64)
        w = reference_quantize(normal(1, *stack(w_axis), 8, 64))
        bias = normal(2, *stack(bias_axis), 8)
        op = lambda x, w, b, implementation: mx_matmul(
            x, w, bias=b, implementation=implementation
        )
        run = lambda implementation: jax.vmap(
            functools.partial(op, implementation=implementation),
            (x_axis, w_axis, bias_axis),
        )(x, w, bias)
        out = run("sm90")
        assert names_of(calls) == ["gemm"]
        assert_close(out, run("xla"))

    def test_layer_adds_its_bias_in_the_kernel(self, calls):
        layer = MXLinear.from_weight(
            reference_quantize(normal(1, 8, 64)), normal(2, 8), activations="bf16"
        )
        x = normal(0, 2, 3, 64)
        out = jax.jit(jax.vmap(jax.vmap(layer)))(x)
        ((_, given),) = calls
        assert given["x"] == ("bfloat16", (6, 64)) and given["bias"] is not None
        expected = mx_matmul(x, layer.weight, bias=layer.bias, implementation="xla")
        assert_close(out, expected)

    def test_gradients_scan_and_shard_map(self, calls):
        x, w, bias = (
            normal(0, 4, 64),
            reference_quantize(normal(1, 64, 64)),
            normal(2, 64),
        )

        def loss(x, bias, implementation=None):
            step = lambda x, _: (
                mx_matmul(x, w, bias=bias, implementation=implementation) / 8,
                None,
            )
            out = jax.lax.scan(step, x, None, length=2)[0]
            return jnp.sum(out.astype(jnp.float32))

        got = jax.jit(jax.value_and_grad(loss, (0, 1)))(x, bias)
        expected = jax.value_and_grad(loss, (0, 1))(x, bias, "xla")
        jax.tree.map(assert_close, got, expected)
        assert names_of(calls) == ["gemm"] * 2
        mesh = jax.make_mesh((1,), ("m",), axis_types=(jax.sharding.AxisType.Auto,))
        spec = jax.sharding.PartitionSpec
        sharded = jax.shard_map(
            lambda x, w: mx_matmul(x, w),
            mesh=mesh,
            in_specs=(spec("m"), spec()),
            out_specs=spec("m"),
        )
        assert_bits_equal(jax.jit(sharded)(x, w), mx_matmul(x, w))

    def test_reasons(self, calls):
        w = reference_quantize(normal(1, 8, 64))
        reason = lambda x, **options: str(explain(mx_matmul, x, w, **options))
        assert "-> sm90" in reason(normal(0, 4, 64))
        assert "x is float16" in reason(normal(0, 4, 64, dtype=jnp.float16))
        assert "x is float32" in reason(normal(0, 4, 64, dtype=jnp.float32))
        assert "not float16" in reason(normal(0, 4, 64), out_dtype=jnp.float16)
        assert "nothing to compute" in reason(normal(0, 0, 64))

    def test_tuned_configuration_runs(self, calls):
        x, w, bias = (
            normal(0, 5, 64),
            reference_quantize(normal(1, 8, 64)),
            normal(2, 8),
        )
        run = lambda x, w, bias: mx_matmul(x, w, bias=bias)
        report = autotune(run, x, w, bias)
        (tuned,) = report.tuned
        ran = {
            tuple(given[f] for f in configs.GemmConfig._fields) for _, given in calls
        }
        assert ran == {config for (config,) in tuned.seconds} and len(ran) > 0
        calls.clear()
        run(x, w, bias)
        ((_, given),) = calls
        used = tuple(given[field] for field in configs.GemmConfig._fields)
        assert (used,) == tuned.tactic


E, H, I, T, K = 6, 64, 96, 9, 3


def moe_operands(activation="silu", e=E, h=H, i=I, t=T, bias=True, seed=0):
    rows = i if activation == "relu2" else 2 * i
    x = normal(seed, t, h)
    w13 = reference_quantize(normal(seed + 1, e, rows, h) * h**-0.5)
    w2 = reference_quantize(normal(seed + 2, e, h, i) * i**-0.5)
    ids = jax.random.randint(jax.random.key(seed + 3), (t, K), -1, e + 1)
    weights = jax.random.uniform(jax.random.key(seed + 4), (t, K))
    biases = {
        "w13_bias": normal(seed + 5, e, rows),
        "w2_bias": normal(seed + 6, e, h, dtype=jnp.float32),
    }
    return (x, w13, w2, ids, weights), biases if bias else {}


def assert_moe_agrees(operands, **options):
    run = lambda implementation: jax.jit(
        lambda *operands: mx_moe(*operands, implementation=implementation, **options)
    )(*operands)
    out = run("sm90")
    assert np.any(np.asarray(out, np.float32))
    assert_close(out, run("xla"))


class TestMoE:
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize(
        "activation",
        [
            *("silu", "gelu", "gelu_tanh", "swigluoai", "relu2"),
            SwiGLUOAI(1.0, 0.0, 0.5),
            SwiGLUOAI(limit=None),
        ],
    )
    def test_activations(self, calls, activation, bias):
        operands, biases = moe_operands(activation, bias=bias)
        assert_moe_agrees(operands, activation=activation, **biases)
        assert names_of(calls) == ["permute", "gemm", "gemm", "combine"]
        (_, sort), (_, first), (_, second), _ = calls
        assert sort["row_divisor"] == K and second["activation"] == 0
        assert first["slot_rows"] and second["slot_rows"] is None
        assert (first["bias"] is not None) == (second["bias"] is not None) == bias

    def test_router_weights_on_the_input(self, calls):
        operands, biases = moe_operands()
        assert_moe_agrees(operands, apply_router_weight_on_input=True, **biases)
        (_, sort), (_, first), _, (_, total) = calls
        assert sort["row_divisor"] == 1 and total["weights"] is None
        assert first["x"] == ("bfloat16", (T * K, H))

    @pytest.mark.parametrize("h, i", [(72, 40), (40, 7)])
    def test_sizes_that_are_padded(self, calls, h, i):
        operands, biases = moe_operands(h=h, i=i)
        assert_moe_agrees(operands, **biases)

    def test_many_rows_of_one_expert(self, calls):
        (x, w13, w2, ids, weights), biases = moe_operands(t=300)
        assert_moe_agrees((x, w13, w2, ids * 0 + 2, weights), **biases)

    def test_ids_that_repeat(self, calls):
        (x, w13, w2, _, weights), _ = moe_operands()
        ids = jnp.array([[1, 1, 4]] * T)
        assert_moe_agrees((x, w13, w2, ids, weights))

    def test_experts_of_another_device(self, calls):
        (x, w13, w2, ids, weights), _ = moe_operands()
        assert_moe_agrees((x, w13, w2, ids + 20, weights), local_expert_offset=20)
        nowhere = mx_moe(x, w13, w2, ids + 20, weights)
        assert "combine" in names_of(calls)
        np.testing.assert_array_equal(nowhere.astype(jnp.float32), 0)

    @pytest.mark.parametrize("dtype", [jnp.int8, jnp.int16])
    def test_ids_of_other_dtypes(self, calls, dtype):
        (x, w13, w2, _, weights), _ = moe_operands()
        ids = jnp.array([[1, 2, 100]] * T)
        expected = mx_moe(x, w13, w2, ids, weights)
        assert_bits_equal(mx_moe(x, w13, w2, ids.astype(dtype), weights), expected)

    def test_wide_ids_do_not_wrap(self, calls):
        (x, w13, w2, _, weights), _ = moe_operands()
        ids = np.array([[1, 2, 100]] * T)
        expected = mx_moe(x, w13, w2, jnp.asarray(ids), weights)
        with jax.enable_x64(True):
            wide = jnp.asarray(ids + (ids == 100) * (1 << 32), jnp.int64)
            assert_bits_equal(mx_moe(x, w13, w2, wide, weights), expected)

    @pytest.mark.parametrize("axes", [(0, None, 0, 0), (None, 0, None, None), (0,) * 4])
    def test_vmap_is_one_layer(self, calls, axes):
        (x, w13, w2, ids, weights), _ = moe_operands()
        stack = lambda a: jax.tree.map(lambda a: jnp.stack([a, a, a]), a)
        given = [
            a if axis is None else stack(a)
            for a, axis in zip((x, (w13, w2), ids, weights), axes, strict=True)
        ]
        run = lambda x, w, ids, weights: mx_moe(x, w[0], w[1], ids, weights)
        out = jax.vmap(run, axes)(*given)
        assert names_of(calls) == ["permute", "gemm", "gemm", "combine"]
        assert_close(out[1], run(x, (w13, w2), ids, weights))

    def test_gradient_is_that_of_the_reference(self, calls):
        (x, w13, w2, ids, weights), biases = moe_operands()

        def loss(x, weights, biases, implementation=None):
            out = mx_moe(
                x, w13, w2, ids, weights, **biases, implementation=implementation
            )
            return jnp.sum(out.astype(jnp.float32))

        got = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(x, weights, biases)
        expected = jax.value_and_grad(loss, (0, 1, 2))(x, weights, biases, "xla")
        jax.tree.map(assert_close, got, expected)
        assert names_of(calls) == ["permute", "gemm", "gemm", "combine"]

    def test_inside_scan_and_shard_map(self, calls):
        (x, w13, w2, ids, weights), _ = moe_operands()
        layer = lambda x: mx_moe(x, w13, w2, ids, weights)
        step = lambda x, _: (layer(x), None)
        out = jax.jit(lambda x: jax.lax.scan(step, x, None, length=2)[0])(x)
        assert_bits_equal(out, layer(layer(x)))
        mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
        spec = jax.sharding.PartitionSpec("d")
        sharded = jax.shard_map(
            lambda *operands: mx_moe(*operands),
            mesh=mesh,
            in_specs=(spec, spec, spec, spec, spec),
            out_specs=spec,
        )
        assert_bits_equal(jax.jit(sharded)(x, w13, w2, ids, weights), layer(x))

    def test_tuned_configuration_runs(self, calls):
        operands, biases = moe_operands()  # 6 experts, which are not tokens to round
        run = lambda *operands: mx_moe(*operands, **biases)
        (tuned,) = autotune(run, *operands).tuned
        assert tuned.tactic is not None and not tuned.left_out
        calls.clear()
        run(*operands)
        used = tuple(
            tuple(given[field] for field in configs.GemmConfig._fields)
            for name, given in calls
            if name == "gemm"
        )
        assert (used,) == tuned.tactic

    def test_reasons(self, calls):
        (x, w13, w2, ids, weights), _ = moe_operands()
        reason = lambda *operands: str(explain(mx_moe, *operands))
        assert "-> sm90" in reason(x, w13, w2, ids, weights)
        wide = x.astype(jnp.float32)
        assert "x is float32" in reason(wide, w13, w2, ids, weights)
        plain = jnp.zeros(w2.shape, jnp.bfloat16)
        assert "not MXFP8" in reason(x, w13, plain, ids, weights)
        assert "nothing to compute" in reason(x[:0], w13, w2, ids[:0], weights[:0])
        abstract = lambda **sizes: jax.eval_shape(lambda: moe_operands(**sizes)[0])
        assert "multiples of 8, not 36" in reason(*abstract(h=36))
        assert "at most 1024 experts" in reason(*abstract(e=1025))


class TestRoute:
    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
    @pytest.mark.parametrize("renormalize", [True, False])
    @pytest.mark.parametrize("method", get_args(RoutingMethod))
    def test_chooses_as_the_reference_does(self, calls, method, renormalize, dtype):
        logits = normal(0, 2, 5, 32, dtype=dtype)
        run = lambda implementation: jax.jit(
            lambda logits, bias: route(
                *(logits, method, 3),
                renormalize=renormalize,
                correction_bias=bias,
                num_groups=4,
                topk_groups=2,
                scaling_factor=2.5,
                implementation=implementation,
            )
        )(logits, normal(1, 32))
        ids, weights = run("sm90")
        expected_ids, expected = run("xla")
        np.testing.assert_array_equal(ids, expected_ids)
        np.testing.assert_allclose(weights, expected, rtol=1e-5)
        assert names_of(calls) == ["route"]
        assert calls[0][1]["bias"] == ("float32", (32,))

    @pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)])
    def test_vmap_is_one_call(self, calls, axes):
        logits, bias = normal(0, 3, 4, 16), normal(1, 3, 16, dtype=jnp.float32)
        given = [
            a if axis == 0 else a[0]
            for a, axis in zip((logits, bias), axes, strict=True)
        ]
        run = lambda implementation: jax.vmap(
            lambda logits, bias: route(
                *(logits, "sigmoid", 2),
                correction_bias=bias,
                implementation=implementation,
            ),
            axes,
        )(*given)
        ids, weights = run("sm90")
        assert names_of(calls) == ["route"]
        expected_ids, expected = run("xla")
        np.testing.assert_array_equal(ids, expected_ids)
        np.testing.assert_allclose(weights, expected, rtol=1e-5)

    def test_gradient(self, calls):
        loss = lambda logits, implementation: jnp.sum(
            route(logits, "softmax", 2, implementation=implementation)[1] ** 2
        )
        logits = normal(0, 4, 16, dtype=jnp.float32)
        got = jax.value_and_grad(loss)(logits, "sm90")
        expected = jax.value_and_grad(loss)(logits, "xla")
        jax.tree.map(assert_close, got, expected)
        assert names_of(calls) == ["route"]

    def test_reasons(self, calls):
        reason = lambda e, top_k, dtype=jnp.float32, t=4: str(
            explain(
                lambda x: route(x, "softmax", top_k),
                jax.ShapeDtypeStruct((t, e), dtype),
            )
        )
        assert "-> sm90" in reason(512, 16)
        assert "not 16 of 513" in reason(513, 16)
        assert "not 17 of 512" in reason(512, 17)
        assert "float16" in reason(8, 2, jnp.float16)
        assert "nothing to compute" in reason(8, 2, t=0)


class TestQuantize:
    @pytest.mark.parametrize("shape", [(32,), (5, 64), (2, 3, 96)])
    def test_bits_are_those_of_the_reference(self, calls, shape):
        x = normal(0, *shape)
        for run in (quantize, jax.jit(lambda x: quantize(x))):
            calls.clear()
            w = run(x)
            assert names_of(calls) == ["quantize"]
            jax.tree.map(assert_bits_equal, w, reference_quantize(x))

    def test_vmap_is_one_call(self, calls):
        x = normal(0, 2, 3, 4, 64)
        w = jax.vmap(jax.vmap(lambda x: quantize(x), 1), 0)(x)
        assert names_of(calls) == ["quantize"]
        expected = reference_quantize(jnp.moveaxis(x, 2, 1))
        jax.tree.map(assert_bits_equal, w, expected)

    def test_derivatives_are_those_of_the_reference(self, calls):
        x = normal(0, 4, 64)
        both = lambda quantize: (
            jax.grad(lambda x: jnp.sum(dequantize(quantize(x)) ** 2))(x),
            jax.jvp(lambda x: dequantize(quantize(x)), (x,), (x + 1,))[1],
        )
        jax.tree.map(assert_bits_equal, both(quantize), both(reference_quantize))

    @pytest.mark.parametrize(
        "shape, dtype, axis",
        [
            ((4, 64), jnp.float32, -1),
            ((4, 70), jnp.bfloat16, -1),
            ((0, 64), jnp.bfloat16, -1),
            ((64, 4), jnp.bfloat16, -2),
        ],
    )
    def test_what_the_kernel_does_not_take(self, calls, shape, dtype, axis):
        x = normal(0, *shape, dtype=dtype)
        w = quantize(x, axis=axis)
        jax.tree.map(assert_bits_equal, w, reference_quantize(x, axis=axis))
        assert calls == []

    def test_conversion_uses_it(self, calls):
        x = normal(0, 96, 160)  # that no other test has had traced
        w = quantize_params({"weight": x}, donate=False)["weight"]
        jax.tree.map(assert_bits_equal, w, reference_quantize(x))
        assert names_of(calls) == ["quantize"]

    def test_on_several_devices(self):
        root = pathlib.Path(__file__).parents[1]
        command = [sys.executable, "-m", "tests.sharded_sm90"]
        out = subprocess.run(
            command, capture_output=True, text=True, cwd=root, check=False
        )
        assert out.returncode == 0, out.stderr[-3000:]


class TestConfigs:
    def test_table_names_what_is_compiled(self):
        table = configs._table()
        for entry in table["dense"]:
            assert tuple(entry["config"]) in configs.CONFIGS
        for first, second in map(configs._pair, table["moe"]):
            assert first in configs.FIRST_CONFIGS and second in configs.CONFIGS
            assert first.tile_rows == second.tile_rows

    def test_small_products_have_one_tile(self):
        largest = max(entry["m"] for entry in configs._table()["dense"])
        for m in range(1, min(largest, 64) + 1):
            assert configs.dense_config(m, 4096, 4096).tile_rows >= m

    @pytest.mark.parametrize("num_rows", [1, 8, 1000, 1 << 20])
    def test_moe_configs_share_their_tiles(self, num_rows):
        first, second = configs.moe_configs(num_rows, 128, 2048, 768)
        assert first.tile_rows == second.tile_rows


@pytest.mark.parametrize("groups, m, tile_rows", [(1, 1, 8), (3, 17, 8), (2, 16, 16)])
def test_tiles_of_groups_are_those_of_permute(groups, m, tile_rows):
    tiles = dense._group_tiles(groups, m, tile_rows)
    ids = np.repeat(np.arange(groups, dtype=np.int32), m)[:, None]
    out = np.zeros(ids.size, np.int32), np.zeros(ids.shape, np.int32)
    expected, count = np.zeros((ids.size, 4), np.int32), np.zeros(1, np.int32)
    workspace = np.zeros(4 * (ids.size + groups) + 1, np.uint8)
    emulated_sm90.permute(
        ids, *out, expected, count, workspace, groups, tile_rows, row_divisor=1
    )
    as_sizes = lambda tiles: sorted(map(tuple, tiles[:, [0, 2]]))
    assert as_sizes(tiles) == as_sizes(expected[: count[0]])
    ends = np.cumsum(tiles[:, 2])
    np.testing.assert_array_equal(tiles[:, 1], ends - tiles[:, 2])

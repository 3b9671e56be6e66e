"""`mx_matmul` through the functions of `jmx8.kernels.sm90`, emulated on the host."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmx8 import (
    autotune,
    explain,
    mx_matmul,
)
from jmx8._mx_array import quantize as reference_quantize
from jmx8.kernels import tactics
from jmx8.kernels.sm90 import configs, dense
from jmx8.nn import MXLinear

from .helpers import assert_bits_equal, assert_matmul_close


pytest.importorskip("jax_tvm_ffi")
from . import emulated_sm90
from .emulated_sm90 import assert_close, names_of, normal, one_device_mesh


pytestmark = pytest.mark.cpu


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
        out = jax.block_until_ready(jax.jit(jax.vmap(jax.vmap(layer)))(x))
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
        mesh = one_device_mesh("m")
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
        jax.block_until_ready(run(x, w, bias))
        ((_, given),) = calls
        used = tuple(given[field] for field in configs.GemmConfig._fields)
        assert (used,) == tuned.tactic

    def test_tuned_configuration_is_for_all_rows_of_the_bucket(
        self, calls, monkeypatch
    ):
        """16 rows may suit tiles that 9 by themselves would not."""
        few, many = map(configs.dense_candidates, (9, 16))
        config = next(c for c in many if c not in few)
        monkeypatch.setattr(tactics, "lookup", lambda key: (tuple(config),))
        mx_matmul(normal(0, 9, 192), reference_quantize(normal(1, 8, 192)))
        ((_, given),) = calls
        assert config == tuple(given[field] for field in config._fields)


class TestConfigs:
    def test_table_names_what_is_compiled(self):
        table = configs._table()
        for entry in table["dense"]:
            assert tuple(entry["config"]) in configs.CONFIGS
        for first, second in map(configs._pair, table["moe"]):
            assert (first, second) in configs.MIXED_PAIRS or (
                first in configs.FIRST_CONFIGS and second in configs.CONFIGS
            )
            assert first.tile_rows == second.tile_rows

    def test_what_was_measured_is_chosen(self):
        for entry in configs._table()["dense"]:
            config = configs.dense_config(entry["m"], entry["n"], entry["k"])
            assert list(config) == entry["config"]

    def test_small_products_have_one_tile(self):
        largest = max(entry["m"] for entry in configs._table()["dense"])
        for m in range(1, min(largest, 64) + 1):
            assert configs.dense_config(m, 4096, 4096).tile_rows >= m

    @pytest.mark.parametrize("num_rows", [1, 8, 1000, 1 << 20])
    def test_moe_configs_share_their_tiles(self, num_rows):
        first, second = configs.moe_configs(num_rows, 128, 2048, 768)
        assert first.tile_rows == second.tile_rows

    @pytest.mark.parametrize("h, i", [(2048, 760), (2040, 768), (96, 96)])
    def test_only_whole_groups_of_columns_are_mixed(self, h, i):
        assert any(p in configs.MIXED_PAIRS for p in configs.moe_candidates(2048, 768))
        for pair in configs.moe_candidates(h, i):
            assert pair not in configs.MIXED_PAIRS
        for num_rows in (1, 1000, 1 << 20):
            pair = configs.moe_configs(num_rows, 128, h, i)
            assert pair not in configs.MIXED_PAIRS
            assert pair[0] in configs.FIRST_CONFIGS and pair[1] in configs.CONFIGS

    @pytest.mark.parametrize("num_rows", [1, 1000, 1 << 20])
    def test_a_ragged_dot_is_not_mixed(self, num_rows):
        config = configs.ragged_config(num_rows, 128, 1536, 2048)
        assert config in configs.FIRST_CONFIGS


@pytest.mark.parametrize("groups, m, tile_rows", [(1, 1, 8), (3, 17, 8), (2, 16, 16)])
def test_tiles_of_groups_are_those_of_permute(groups, m, tile_rows):
    tiles = dense._group_tiles(groups, m, tile_rows)
    ids = np.repeat(np.arange(groups, dtype=np.int32), m)[:, None]
    out = np.zeros(ids.size, np.int32), np.zeros(ids.shape, np.int32)
    expected, count = np.zeros((ids.size, 4), np.int32), np.zeros(1, np.int32)
    emulated_sm90.permute(ids, *out, expected, count, groups, tile_rows, row_divisor=1)
    as_sizes = lambda tiles: sorted(map(tuple, tiles[:, [0, 2]]))
    assert as_sizes(tiles) == as_sizes(expected[: count[0]])
    ends = np.cumsum(tiles[:, 2])
    np.testing.assert_array_equal(tiles[:, 1], ends - tiles[:, 2])

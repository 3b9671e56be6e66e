"""Tests of what the cuTile backends launch, and of its results on a Hopper GPU."""

import functools
import hashlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmx8 import dequantize, quantize
from jmx8.kernels.cutile import (
    _backend,
    _kernels,
    _launch,
    _permute,
    _pipeline,
    _tiles,
    dense,
    moe,
)
from jmx8.kernels.cutile._tiles import Gemm, Tiles


TILES = Tiles(16, Gemm(64, 128, 2), Gemm(64, 128, 2), fused=True)
MOE_OPTIONS = {"activation": "silu", "apply_router_weight_on_input": False}


def fake_target(arch="sm_90"):
    return _launch.Target(arch, lambda cubin: cubin.name.encode())


def moe_operands(t=3, k=2, e=4, h=64, i=128):
    shape = jax.ShapeDtypeStruct
    return (
        shape((t, h), jnp.bfloat16),
        _backend.abstract_weights(e, 2 * i, h),
        _backend.abstract_weights(e, h, i),
        shape((t, k), jnp.int32),
        shape((t, k), jnp.float32),
    )


def layer(tiles=TILES, arch="sm_90", **options):
    return functools.partial(
        _pipeline.moe, tiles=tiles, target=fake_target(arch), **MOE_OPTIONS | options
    )


def recorded(function, *operands):
    with _launch.record() as launches:
        # A function that JAX has not traced before, or nothing would be launched.
        out = jax.eval_shape(lambda *a: function(*a), *operands)
    return launches, out


class TestLaunches:
    @pytest.mark.parametrize("arch", ["sm_89", "sm_90", "sm_120"])
    def test_lowers_without_a_gpu(self, arch):
        pytest.importorskip("cuda.tile")
        run = jax.jit(layer(arch=arch))
        operands = moe_operands(t=20)
        launches, _ = recorded(layer(arch=arch), *operands)
        exported = jax.export.export(
            run,
            platforms=["cuda"],
            disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(TARGET)],
        )(*operands)
        text = exported.mlir_module()
        assert text.count(f"@{TARGET}(") == len(launches) == 7
        for launch in launches:
            assert f'function_name = "{launch.cubin.function}"' in text
            assert f'cubin_code = "{launch.cubin.name}"' in text

    def test_attributes_of_the_custom_call(self):
        pytest.importorskip("cuda.tile")
        kernel = _launch.Kernel(
            "moe",
            "_update",
            {
                "X": _launch.In("t"),
                "UNUSED": _launch.Unused(),
                "OUT": _launch.Out("tm", wide=True),
                "STATE": _launch.Out("t"),
                "n": _launch.Scalar(),
                "SIZE": _launch.Constant(int),
                "m": _launch.Scalar(),
            },
        )
        run = lambda x, state: kernel(
            (3, 2),
            fake_target(),
            X=x,
            OUT=_launch.Empty((5, 32), jnp.bfloat16),
            STATE=state,
            n=-1,
            SIZE=8,
            m=7,
        )
        x = jax.ShapeDtypeStruct((6,), jnp.int32)
        exported = jax.export.export(
            jax.jit(run),
            platforms=["cuda"],
            disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(TARGET)],
        )(x, x)
        text = exported.mlir_module()
        # Operands x and state are 0 and 1, results OUT and STATE 2 and 3.
        for attribute in (
            "buffer_ids = dense<[0, 0, 2, 1, 4, 5]> : tensor<6xi32>",
            "index_bitwidths = dense<[32, 32, 64, 32, 32, 32]> : tensor<6xi32>",
            "scalar_packed = dense<[4294967295, 7]> : tensor<2xui64>",
            "grid_x = 3 : i32, grid_y = 2 : i32, grid_z = 1 : i32",
            "num_inputs = 2 : i32, num_outputs = 2 : i32",
            "output_tuple_indices = [1], operand_index = 1",
        ):
            assert attribute in text
        (launch,), _ = recorded(run, x, x)
        digest = hashlib.sha256(launch.cubin.name.encode()).digest()
        assert f"cubin_id = dense<{list(digest)}> : tensor<32xui8>" in text

    def test_constants_of_different_types_are_different_kernels(self):
        cubins = {
            _launch.Cubin("moe", "f", "sm_90", (), (("constant", value),))
            for value in (1, 2)
        }
        names = {cubin.name for cubin in cubins}
        for value in (1.0, True):
            names.add(
                _launch.Cubin("moe", "f", "sm_90", (), (("constant", value),)).name
            )
        assert len(names) == 4

    def test_a_wrong_argument_is_refused(self):
        with pytest.raises(TypeError, match="expected the arguments"):
            _kernels.PACK((1, 1), fake_target(), X=jnp.zeros((2, 2)))

    def test_a_constant_of_another_type_is_refused(self):
        with pytest.raises(TypeError, match=r"expected a int, got 1\.0"):
            _kernels.PERMUTE_BLOCK_EXPERT(
                (1, 1),
                fake_target(),
                PAD_OFFSETS=jnp.zeros(5, jnp.int32),
                BLOCK_EXPERT=jnp.zeros(5, jnp.int32),
                BLOCK_SIZE=1.0,
            )

    def test_token_counts_share_kernels(self):
        """What is compiled depends on sizes of the model, not on the tokens."""
        gemms = [
            {
                launch.cubin
                for launch in recorded(layer(), *moe_operands(t=t))[0]
                if launch.kernel is _kernels.GEMM
            }
            for t in (17, 18, 31, 640)
        ]
        assert all(cubins == gemms[0] for cubins in gemms)

    def test_router_weights_on_the_input_make_one_row_for_each(self):
        run = layer(apply_router_weight_on_input=True)
        launches, out = recorded(run, *moe_operands(t=20))
        (pack,) = [launch for launch in launches if launch.kernel is _kernels.PACK]
        assert pack.arguments["X"].shape == (40, 64)
        assert pack.arguments["TOP_K"] == 1
        assert out.shape == (20, 64)

    def test_no_tokens_launch_nothing(self):
        launches, out = recorded(layer(), *moe_operands(t=0))
        assert launches == [] and out.shape == (0, 64)

    def test_large_arrays_are_indexed_with_64_bits(self):
        launches, _ = recorded(layer(), *moe_operands(t=1 << 21, h=2048))
        functions = {launch.cubin.function for launch in launches}
        assert {"_pack_sorted_i64", "_sorted_grouped_i64"} <= functions


TARGET = "cutile_launch"


class TestPermutation:
    @pytest.mark.parametrize("num_experts", [8, 60, 128])
    @pytest.mark.parametrize("num_rows", [25, 130, 5000, 40_000])
    def test_places_are_where_the_kernels_put_rows(self, num_experts, num_rows):
        """Computes in numpy what the kernels do, and compares `place_of` with it."""
        rng = np.random.default_rng(num_rows)
        ids = rng.integers(-3, num_experts + 3, num_rows)
        counting = _permute._histogram(num_rows, num_experts)
        chunks = np.arange(num_rows) // counting.chunk_rows
        assert chunks[-1] == counting.num_chunks - 1 < counting.padded_chunks
        is_local = (ids >= 0) & (ids < num_experts)
        counts = np.bincount(ids[is_local], minlength=num_experts)
        padded = -(-counts // 16) * 16
        first = np.cumsum(padded) - padded
        base = np.zeros((counting.padded_chunks, counting.num_bins), int)
        ranks = np.full(num_rows, -1)
        seen = np.zeros((counting.num_chunks, num_experts), int)
        for row in np.flatnonzero(is_local):
            ranks[row] = seen[chunks[row], ids[row]]
            seen[chunks[row], ids[row]] += 1
        base[: counting.num_chunks, :num_experts] = (
            first + np.cumsum(seen, axis=0) - seen
        )
        places = _permute.place_of_rows(
            jnp.asarray(np.where(is_local, ids, 1 << 30), jnp.int32),
            jnp.asarray(base.reshape(-1), jnp.int32),
            jnp.asarray(ranks, jnp.int32),
            counting,
        )
        expected = first[ids[is_local]] + [
            np.sum(ids[:row] == ids[row]) for row in np.flatnonzero(is_local)
        ]
        np.testing.assert_array_equal(np.asarray(places)[is_local], expected)

    def test_an_absent_id_is_stored_nowhere(self):
        """The kernel for many rows stores row r at `base[chunk, id] + rank`."""
        counting = _permute._histogram(1 << 24, 512)
        last = counting.num_bins * counting.padded_chunks
        # Out of bounds, so that base reads as 0, without overflow; rank is -1.
        assert _permute._NOWHERE >= last
        assert _permute._NOWHERE + last < 1 << 31

    def test_combine_leaves_out_absent_rows(self):
        rows = jnp.asarray([[[1.0]], [[jnp.nan]]], jnp.bfloat16)
        out = _pipeline.combine(
            rows, jnp.asarray([[0.5, 0.25]]), jnp.asarray([[True, False]])
        )
        assert out.tolist() == [[0.5]]


class TestSelection:
    def test_every_table_entry_is_valid(self):
        for arch in (*_backend.ARCHES.values(), "sm_90"):
            for t, e in itertools.product((1, 7, 300, 9000), (8, 128)):
                tiles = _tiles.moe_tiles(arch, (t, 2), e)
                assert tiles.rows in _tiles.BLOCK_ROWS
                rows, gemm = _tiles.dense_tiles(arch, t)
                assert rows in _tiles.BLOCK_ROWS
                assert gemm.n % 16 == 0 and gemm.k % 32 == 0

    def test_more_rows_take_larger_blocks(self):
        sizes = [_tiles.moe_tiles("sm_90", (t, 8), 128).rows for t in (1, 256, 8192)]
        assert sizes == sorted(sizes) and sizes[0] < sizes[-1]

    def test_a_fused_tile_that_does_not_divide_falls_back(self):
        launches, _ = recorded(layer(), *moe_operands(i=96))
        assert any(launch.kernel is _kernels.ACTIVATION for launch in launches)


# On the GPU.


def exact_moe(x, w13, w2, ids, weights):
    w13, w2 = (np.asarray(dequantize(w), np.float64) for w in (w13, w2))
    out = np.zeros(x.shape)
    for t, (row, experts) in enumerate(
        zip(np.asarray(x, np.float64), ids, strict=True)
    ):
        for e, weight in zip(experts, weights[t], strict=True):
            if 0 <= e < w2.shape[0]:
                gate, up = np.split(w13[e] @ row, 2)
                out[t] += float(weight) * (w2[e] @ (gate / (1 + np.exp(-gate)) * up))
    return out


@pytest.mark.gpu(9)
@pytest.mark.parametrize("t", [1, 3, 4, 40, 1000])
def test_moe_on_the_gpu(t):
    e, k, h, i = 8, 2, 256, 128
    keys = jax.random.split(jax.random.key(t), 5)
    normal = functools.partial(jax.random.normal, dtype=jnp.bfloat16)
    w13, w2 = (
        quantize(normal(keys[0], (e, 2 * i, h))),
        quantize(normal(keys[1], (e, h, i))),
    )
    x = normal(keys[2], (t, h))
    ids = jax.random.randint(keys[3], (t, k), -2, e + 2)
    ids = ids.at[0, 0].set(jnp.iinfo(jnp.int32).max)
    weights = jax.random.uniform(keys[4], (t, k))
    run = jax.jit(
        lambda x, w13, w2, ids, weights: moe.run(
            x, w13, w2, ids, weights, None, None, **MOE_OPTIONS
        )
    )
    out = run(x, w13, w2, ids, weights)
    exact = exact_moe(x, w13, w2, np.asarray(ids), np.asarray(weights))
    error = np.linalg.norm(np.asarray(out, np.float64) - exact)
    assert error <= 6e-3 * np.linalg.norm(exact)
    np.testing.assert_array_equal(out, run(x, w13, w2, ids, weights))


@pytest.mark.gpu(9)
@pytest.mark.parametrize("m", [1, 17, 64, 300])
@pytest.mark.parametrize("out_dtype", [jnp.bfloat16, jnp.float32])
def test_dense_on_the_gpu(m, out_dtype):
    from .helpers import assert_matmul_close

    x = jax.random.normal(jax.random.key(m), (m, 512), jnp.bfloat16)
    w = quantize(jax.random.normal(jax.random.key(1), (384, 512), jnp.bfloat16))
    out = jax.jit(lambda x, w: dense.run(x, w, out_dtype=out_dtype))(x, w)
    assert_matmul_close(out, x, w, acc_bits=20)

"""`mx_moe` through the functions of `jmx8.kernels.sm90`, emulated on the host."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmx8 import (
    autotune,
    explain,
    mx_moe,
    SwiGLUOAI,
)
from jmx8._mx_array import quantize as reference_quantize
from jmx8.kernels.sm90 import configs

from .helpers import assert_bits_equal


pytest.importorskip("jax_tvm_ffi")
from .emulated_sm90 import assert_close, names_of, normal, one_device_mesh


pytestmark = pytest.mark.cpu


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


def pair_of(given):
    """Returns the configurations of the two matmuls of a call."""
    sizes = {f"{nth}_tile_rows": given["tile_rows"] for nth in ("first", "second")}
    return tuple(
        tuple((given | sizes)[f"{nth}_{field}"] for field in configs.GemmConfig._fields)
        for nth in ("first", "second")
    )


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
        ((name, given),) = calls
        assert name == "moe" and given["row_divisor"] == K
        assert (given["w13_bias"] is not None) == (given["w2_bias"] is not None) == bias

    def test_router_weights_on_the_input(self, calls):
        operands, biases = moe_operands()
        assert_moe_agrees(operands, apply_router_weight_on_input=True, **biases)
        ((_, given),) = calls
        assert given["row_divisor"] == 1 and given["weights"] is None
        assert given["x"] == ("bfloat16", (T * K, H))

    @pytest.mark.parametrize("h, i", [(72, 40), (40, 7)])
    def test_sizes_that_are_padded(self, calls, h, i):
        operands, biases = moe_operands(h=h, i=i)
        assert_moe_agrees(operands, **biases)

    def test_many_rows_of_one_expert(self, calls):
        (x, w13, w2, ids, weights), biases = moe_operands(t=300)
        assert_moe_agrees((x, w13, w2, ids * 0 + 2, weights), **biases)

    @pytest.mark.parametrize("h, i, mixed", [(64, 128, True), (64, 96, False)])
    def test_columns_are_mixed_if_they_are_whole_groups(self, calls, h, i, mixed):
        operands, biases = moe_operands(h=h, i=i, t=300)
        assert_moe_agrees(operands, **biases)
        ((_, given),) = calls
        pair = pair_of(given)
        assert (pair in configs.MIXED_PAIRS) == mixed

    def test_ids_that_repeat(self, calls):
        (x, w13, w2, _, weights), _ = moe_operands()
        ids = jnp.array([[1, 1, 4]] * T)
        assert_moe_agrees((x, w13, w2, ids, weights))

    def test_experts_of_another_device(self, calls):
        (x, w13, w2, ids, weights), _ = moe_operands()
        assert_moe_agrees((x, w13, w2, ids + 20, weights), local_expert_offset=20)
        nowhere = mx_moe(x, w13, w2, ids + 20, weights)
        assert "moe" in names_of(calls)
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
        assert names_of(calls) == ["moe"]
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
        assert names_of(calls) == ["moe"]

    def test_inside_scan_and_shard_map(self, calls):
        (x, w13, w2, ids, weights), _ = moe_operands()
        layer = lambda x: mx_moe(x, w13, w2, ids, weights)
        step = lambda x, _: (layer(x), None)
        out = jax.jit(lambda x: jax.lax.scan(step, x, None, length=2)[0])(x)
        assert_bits_equal(out, layer(layer(x)))
        mesh = one_device_mesh("d")
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
        jax.block_until_ready(run(*operands))
        ((_, given),) = calls
        assert (pair_of(given),) == tuned.tactic

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

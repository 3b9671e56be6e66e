import dataclasses
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmx8 import dequantize, mx_moe, mx_moe_w8a8, quantize, route, SwiGLUOAI
from jmx8.kernels import xla_moe
from jmx8.kernels.xla_moe import select_tiling, TilingConfig

from .helpers import assert_bits_equal


E, H, I, T, K = 6, 70, 40, 13, 3  # k of both matmuls needs padding


@dataclasses.dataclass
class Layer:
    x: jax.Array
    w13: Any
    w2: Any
    ids: jax.Array
    weights: jax.Array
    w13_bias: jax.Array
    w2_bias: jax.Array

    def quantized(self):
        return dataclasses.replace(self, w13=quantize(self.w13), w2=quantize(self.w2))

    def __call__(self, op=mx_moe, **kwargs):
        return op(self.x, self.w13, self.w2, self.ids, self.weights, **kwargs)

    def biases(self):
        return {"w13_bias": self.w13_bias, "w2_bias": self.w2_bias}


def make_layer(dtype=jnp.float32, *, gated=True, num_tokens=T):
    keys = iter(jax.random.split(jax.random.key(0), 8))
    normal = lambda *shape: jax.random.normal(next(keys), shape, dtype)
    rows = 2 * I if gated else I
    ids, weights = route(normal(num_tokens, E), "softmax", K)
    return Layer(
        normal(num_tokens, H),
        normal(E, rows, H) / 8,
        normal(E, H, I) / 8,
        ids,
        weights,
        normal(E, rows),
        normal(E, H),
    )


def silu_gated(h):
    gate, up = np.split(h, 2)
    return gate / (1 + np.exp(-gate)) * up


def loop_over_tokens(layer, *, act=silu_gated, biases=True, weigh_input=False):
    """The layer written as its definition, in float64."""
    f64 = lambda a: np.asarray(a, np.float64)
    wide = lambda w: f64(w if isinstance(w, jax.Array) else dequantize(w))
    x, w13, w2, ids = f64(layer.x), wide(layer.w13), wide(layer.w2), layer.ids
    b13 = f64(layer.w13_bias) if biases else np.zeros(w13.shape[:2])
    b2 = f64(layer.w2_bias) if biases else np.zeros(w2.shape[:2])
    out = np.zeros_like(x)
    for t, chosen in enumerate(np.asarray(ids)):
        for e, weight in zip(chosen, f64(layer.weights)[t], strict=True):
            if 0 <= e < w13.shape[0]:
                row, factor = (x[t] * weight, 1) if weigh_input else (x[t], weight)
                out[t] += factor * (w2[e] @ act(w13[e] @ row + b13[e]) + b2[e])
    return out


def assert_close(out, exact, dtype=jnp.float32):
    # Float32: a few hundred roundings of 2**-24. bfloat16: the activation's output, the
    # expert's output and the result are rounded, and errors of the first pass w2.
    scale = np.max(np.abs(exact))
    limit = 1e-5 if dtype == jnp.float32 else 4 * float(jnp.finfo(dtype).eps)
    assert np.max(np.abs(np.asarray(out, np.float64) - exact)) <= limit * scale


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("quantized", [False, True])
def test_matches_a_loop_over_tokens(dtype, quantized):
    layer = make_layer(dtype)
    layer = layer.quantized() if quantized else layer
    out = jax.jit(lambda: layer(**layer.biases()))()
    assert out.dtype == dtype
    assert_close(out, loop_over_tokens(layer), dtype)


@pytest.mark.parametrize("tiling", [(1, 1), (2, 3), (4, 1), (16, 4), (32, 64)])
def test_any_tiling_gives_the_same_bits(tiling, monkeypatch):
    layer = make_layer().quantized()
    expected = layer()
    monkeypatch.setattr(xla_moe, "select_tiling", lambda *_: TilingConfig(*tiling))
    np.testing.assert_allclose(layer(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 33])
def test_any_number_of_tokens(num_tokens):
    layer = make_layer(num_tokens=num_tokens).quantized()
    out = layer()
    assert out.shape == (num_tokens, H)
    if num_tokens:
        assert_close(out, loop_over_tokens(layer, biases=False))


def test_all_tokens_on_one_expert_and_one_expert_twice():
    layer = make_layer()
    layer.ids = jnp.full_like(layer.ids, 2)
    assert_close(layer(), loop_over_tokens(layer, biases=False))


def test_expert_parallel_shards_add_up():
    layer = make_layer().quantized()
    part = lambda w, s: jax.tree.map(lambda a: a[s], w)
    parts = [
        dataclasses.replace(layer, w13=part(layer.w13, s), w2=part(layer.w2, s))(
            local_expert_offset=s.start
        )
        for s in (slice(0, 2), slice(2, 6))
    ]
    np.testing.assert_allclose(sum(parts), layer(), rtol=0, atol=1e-5)


def test_ids_from_elsewhere_contribute_nothing():
    layer = make_layer()
    layer.ids = layer.ids.at[3].set(jnp.array([-1, 2, 7]))
    layer.ids = layer.ids.at[5].set(jnp.array([6, 100, -5]))
    out = layer()
    assert_close(out, loop_over_tokens(layer, biases=False))
    assert not np.any(out[5])


def test_nan_of_one_expert_stays_with_its_tokens():
    layer = make_layer()
    layer.w2 = layer.w2.at[0].set(jnp.nan)
    is_nan = np.isnan(np.asarray(layer())).any(axis=1)
    np.testing.assert_array_equal(is_nan, np.any(np.asarray(layer.ids) == 0, axis=1))


def test_activations_pass_through():
    layer = make_layer(gated=False)
    relu2 = lambda h: np.maximum(h, 0) ** 2
    assert_close(
        layer(activation="relu2", **layer.biases()), loop_over_tokens(layer, act=relu2)
    )
    layer = make_layer()

    def clamped(h):
        gate, up = np.minimum(h[:I], 0.5), np.clip(h[I:], -0.5, 0.5)
        return gate / (1 + np.exp(-1.5 * gate)) * (up + 2)

    out = layer(activation=SwiGLUOAI(1.5, 2.0, 0.5), **layer.biases())
    assert_close(out, loop_over_tokens(layer, act=clamped))


def test_routing_weight_on_the_input():
    layer = make_layer()
    out = layer(apply_router_weight_on_input=True, **layer.biases())
    assert_close(out, loop_over_tokens(layer, weigh_input=True))


def test_w8a8_quantizes_both_inputs():
    layer = make_layer(jnp.bfloat16).quantized()
    out = layer(mx_moe_w8a8)
    rounded = dataclasses.replace(layer, x=dequantize(quantize(layer.x)))

    def act(h):
        round_to_bf16 = lambda a: jnp.asarray(a, jnp.bfloat16)
        h = round_to_bf16(silu_gated(np.asarray(round_to_bf16(h), np.float64)))
        return np.asarray(dequantize(quantize(h)), np.float64)

    exact = loop_over_tokens(rounded, act=act, biases=False)
    # An intermediate next to a rounding boundary may fall to the other side.
    assert np.mean(np.abs(np.asarray(out, np.float64) - exact)) <= 4e-3 * np.std(exact)
    assert jnp.any(out != layer())


def test_w8a8_quantizes_the_weighted_input():
    layer = make_layer(jnp.bfloat16).quantized()
    layer.ids, layer.weights = layer.ids[:, :1], layer.weights[:, :1]
    weights = layer.weights.astype(jnp.float32)
    weighted = (layer.x.astype(jnp.float32) * weights).astype(jnp.bfloat16)
    ones = jnp.ones_like(layer.weights)
    expected = dataclasses.replace(layer, x=weighted, weights=ones)(mx_moe_w8a8)
    out = layer(mx_moe_w8a8, apply_router_weight_on_input=True)
    assert_bits_equal(out, expected)


def test_two_runs_give_the_same_bits_and_leading_axes_are_tokens():
    layer = make_layer(jnp.bfloat16, num_tokens=12).quantized()
    out = layer()
    assert_bits_equal(layer(), out)
    shape = lambda a: a.reshape(3, 4, a.shape[-1])
    folded = mx_moe(
        shape(layer.x), layer.w13, layer.w2, shape(layer.ids), shape(layer.weights)
    )
    assert_bits_equal(folded.reshape(12, H), out)


def test_vmap_over_tokens_is_one_call():
    layer = make_layer().quantized()
    one = lambda x, i, w: mx_moe(x, layer.w13, layer.w2, i, w)
    out = jax.vmap(one)(layer.x, layer.ids, layer.weights)
    np.testing.assert_allclose(out, layer(), rtol=0, atol=1e-5)
    count = lambda f: str(jax.make_jaxpr(f)(layer.x, layer.ids, layer.weights)).count(
        "dot_general"
    )
    assert count(jax.vmap(one)) == count(one) == 2


def test_vmap_over_layers_merges_their_experts():
    layers = [make_layer().quantized() for _ in range(2)]
    layers[1].w2 = quantize(-make_layer().w2)
    layers[0].ids = layers[0].ids.at[0].set(jnp.array([-1, 2, 6]))
    stack = lambda name: jax.tree.map(
        lambda *a: jnp.stack(a), *[getattr(l, name) for l in layers]
    )
    out = jax.vmap(mx_moe, (None, 0, 0, 0, None))(
        layers[0].x, stack("w13"), stack("w2"), stack("ids"), layers[0].weights
    )
    for i in range(2):
        np.testing.assert_allclose(out[i], layers[i](), rtol=0, atol=1e-5)


def test_inside_scan_eval_shape_and_shard_map():
    layer = make_layer().quantized()
    run = lambda x: mx_moe(x, layer.w13, layer.w2, layer.ids, layer.weights)
    scanned = jax.jit(lambda x: jax.lax.scan(lambda x, _: (run(x), x), x, length=2)[0])
    np.testing.assert_allclose(scanned(layer.x), run(run(layer.x)), rtol=0, atol=1e-5)
    through = lambda f: jax.grad(lambda x: jnp.sum(f(x)))(layer.x)
    np.testing.assert_allclose(
        through(scanned), through(lambda x: run(run(x))), rtol=0, atol=1e-4
    )
    assert jax.eval_shape(run, layer.x).shape == (T, H)
    mesh = jax.make_mesh((1,), ("t",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = jax.sharding.PartitionSpec("t"), jax.sharding.PartitionSpec()
    sharded = jax.shard_map(
        mx_moe, mesh=mesh, in_specs=(rows, whole, whole, rows, rows), out_specs=rows
    )
    np.testing.assert_allclose(
        jax.jit(sharded)(layer.x, layer.w13, layer.w2, layer.ids, layer.weights),
        run(layer.x),
        rtol=0,
        atol=1e-5,
    )


def test_gradients_match_a_dense_layer():
    layer = make_layer()

    def dense(x, weights, w13):
        h = jnp.einsum("th,enh->ten", x, w13)
        h = jax.nn.silu(h[..., :I]) * h[..., I:]
        out = jnp.einsum("tei,ehi->teh", h, layer.w2)
        mask = jnp.sum(jax.nn.one_hot(layer.ids, E) * weights[..., None], axis=1)
        return jnp.sum(jnp.sin(jnp.einsum("teh,te->th", out, mask)))

    def sparse(x, weights, w13):
        return jnp.sum(jnp.sin(mx_moe(x, w13, layer.w2, layer.ids, weights)))

    args = (layer.x, layer.weights, layer.w13)
    with jax.default_matmul_precision("highest"):
        expected = jax.grad(dense, (0, 1, 2))(*args)
    for got, want in zip(jax.grad(sparse, (0, 1, 2))(*args), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_gradient_of_w8a8_is_that_of_w8a16():
    layer = make_layer().quantized()
    loss = lambda op: (
        lambda x: jnp.sum(op(x, layer.w13, layer.w2, layer.ids, layer.weights))
    )
    # Not bit-equal on a GPU: the sum over a token's experts has no order there.
    np.testing.assert_allclose(
        jax.grad(loss(mx_moe_w8a8))(layer.x),
        jax.grad(loss(mx_moe))(layer.x),
        rtol=0,
        atol=1e-5,
    )


@pytest.mark.parametrize("num_tokens", [1, 16, 128, 1024, 8192])
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_work_is_bounded_by_the_routing(num_tokens, platform):
    # Qwen3-30B-A3B: 128 experts, top-8. A dense expansion would compute 128 * tokens.
    rows, experts = num_tokens * 8, 128
    tiling = select_tiling(rows, experts, 1536 * 2048, platform)
    slots = jax.eval_shape(
        lambda ids: xla_moe._assign_slots(ids, experts, tiling)[1],
        jax.ShapeDtypeStruct((rows,), jnp.int32),
    ).size
    # At most one partly filled tile for each active expert, and one partly used chunk.
    waste = (min(experts, rows) + tiling.chunk_tiles) * tiling.tile_rows
    assert slots <= rows + waste
    if num_tokens >= 128:
        assert slots <= experts * num_tokens / 4


def test_bad_shapes_are_named():
    layer = make_layer().quantized()
    op = inspect.unwrap(mx_moe)  # without the tests' own type checks
    with pytest.raises(ValueError, match=r"w13 must be \(6, 40, 70\)"):
        layer(op, activation="relu2")
    with pytest.raises(ValueError, match=r"w13_bias must have shape \(6, 80\), got"):
        layer(op, w13_bias=layer.w2_bias)
    with pytest.raises(ValueError, match="unknown implementation 'cuda'"):
        layer(op, implementation="cuda")
    with pytest.raises(TypeError, match="topk_ids must have a integer dtype"):
        dataclasses.replace(layer, ids=layer.weights)(op)
    with pytest.raises(ValueError, match=r"topk_ids\.shape=\(13, 3\)"):
        dataclasses.replace(layer, weights=layer.weights[:, :2])(op)

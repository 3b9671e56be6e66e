import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmx8 import canonical, dequantize, mx_matmul_w8a8, quantize
from jmx8.nn import Experts, MXExperts, MXLinear, with_activations

from .helpers import assert_bits_equal


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_linear_is_a_drop_in(use_bias, dtype):
    args, key = (70, 9, use_bias, dtype), jax.random.key(0)
    linear, converted = eqx.nn.Linear(*args, key=key), MXLinear(*args, key=key)
    weight = canonical(converted.weight)
    assert_bits_equal(weight.elements, quantize(linear.weight).elements)
    assert (converted.in_features, converted.out_features) == (70, 9)
    assert converted.use_bias == use_bias
    widened = eqx.tree_at(lambda l: l.weight, linear, dequantize(weight, dtype))
    x = jax.random.normal(jax.random.key(1), (5, 70), dtype)
    out = jax.vmap(converted)(x)
    assert out.shape == (5, 9) and out.dtype == dtype
    tolerance = 1e-5 if dtype == jnp.float32 else 0.02
    np.testing.assert_allclose(
        out.astype(jnp.float32),
        jax.vmap(widened)(x).astype(jnp.float32),
        rtol=tolerance,
        atol=tolerance,
    )


def test_activations_choose_the_numerics():
    layer = MXLinear(64, 8, use_bias=False, activations="mxfp8", key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (5, 64))
    assert_bits_equal(layer(x), mx_matmul_w8a8(x, layer.weight))
    assert jnp.any(with_activations(layer, "bf16")(x) != layer(x))


def test_with_activations_shares_the_weights():
    experts = MXExperts.from_experts(Experts.init(2, 64, 32, key=jax.random.key(0)))
    layers = [MXLinear(64, 8, key=jax.random.key(0)), experts, jnp.ones(3)]
    changed = with_activations(layers, "mxfp8")
    for old, new in zip(jax.tree.leaves(layers), jax.tree.leaves(changed), strict=True):
        assert old is new
    assert [layer.activations for layer in changed[:2]] == ["mxfp8", "mxfp8"]
    assert [layer.activations for layer in layers[:2]] == ["auto", "auto"]

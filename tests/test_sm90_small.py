"""`route` and `quantize` through `jmx8.kernels.sm90`, emulated on the host."""

import pathlib
import subprocess
import sys
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmx8 import (
    dequantize,
    explain,
    quantize,
    quantize_params,
    route,
)
from jmx8._mx_array import quantize as reference_quantize
from jmx8.ops.routing import RoutingMethod

from .helpers import assert_bits_equal


pytest.importorskip("jax_tvm_ffi")
from .emulated_sm90 import assert_close, names_of, normal


pytestmark = pytest.mark.cpu


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

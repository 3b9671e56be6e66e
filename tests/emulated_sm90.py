"""The functions of `jmx8.kernels.sm90` in numpy, on host memory.

Written from what `csrc/kernels.h` says they read and write. What they do not write is
poisoned, so that nothing can depend on it.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import tvm_ffi

from jmx8.kernels.sm90 import configs, kernels, library, quantize as sm90_quantize
from jmx8.ops import _dispatch

from .emulated_flashinfer import host
from .helpers import model_quantize


_POISON = 0x7FFFFFFF


def use(monkeypatch):
    """Makes the kernels these functions; returns the list of calls, (name, given)."""
    monkeypatch.setattr(library, "why_not_here", lambda: None)
    # Without the traces of tests that do not emulate.
    _dispatch._vmappable.cache_clear()
    jitted = jax.jit(lambda x: sm90_quantize._quantize(x))
    monkeypatch.setattr(sm90_quantize, "_jitted", jitted)
    for function in (gemm, permute, moe, route, quantize):
        name = function.__name__.upper()
        monkeypatch.setattr(kernels, name, _emulated(getattr(kernels, name), function))
    _calls.clear()
    return _calls


_calls: list[tuple[str, dict[str, Any]]] = []


@functools.cache  # of what can be registered there are 1024 in a process
def _emulated(kernel, function):
    def called(*arguments):
        given = dict(zip(kernel.arguments, arguments, strict=True))
        is_tensor = lambda a: isinstance(a, tvm_ffi.Tensor)
        function(**{k: host(a) if is_tensor(a) else a for k, a in given.items()})
        of_tensor = lambda a: (str(a.dtype), tuple(a.shape))
        noted = {k: of_tensor(a) if is_tensor(a) else a for k, a in given.items()}
        _calls.append((function.__name__, noted))

    load = functools.partial(tvm_ffi.convert, called)
    return dataclasses.replace(kernel, load=load, platform="cpu")


def one_device_mesh(name: str) -> jax.sharding.Mesh:
    """Returns a mesh of the CPU, where these functions are."""
    kind = jax.sharding.AxisType.Auto
    return jax.make_mesh((1,), (name,), (kind,), devices=jax.devices("cpu")[:1])


def normal(seed, *shape, dtype=jnp.bfloat16) -> Any:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def assert_close(out, expected):
    """Sums in another order, rounded once more on the way at most."""
    assert out.dtype == expected.dtype and out.shape == expected.shape
    out, expected = (np.asarray(a, np.float64) for a in (out, expected))
    scale = np.sqrt(np.mean(expected**2))
    np.testing.assert_allclose(out, expected, rtol=2**-7, atol=2**-7 * scale)


def names_of(calls):
    """Returns the functions that were called, in order; waits for them."""
    jax.block_until_ready(jax.live_arrays())
    return [name for name, _ in calls]


def gemm(
    x, w, scales, bias, out, slot_rows, tiles, num_tiles,
    activation, alpha, beta, limit, kernel, tile_rows, variant, split_k,
):  # fmt: skip
    config = configs.GemmConfig(kernel, tile_rows, variant, split_k)
    assert config in configs.CONFIGS
    assert x.dtype == ml_dtypes.bfloat16 and x.ndim == 2
    assert w.shape == (*scales.shape[:-1], scales.shape[-1] * 32)
    assert w.shape[-1] == x.shape[1]
    gated = activation in (1, 2, 3, 4)
    assert out.shape[1] == w.shape[-2] // (2 if gated else 1)
    assert bias is None or bias.shape == w.shape[:-1]
    assert bias is None or bias.dtype in (ml_dtypes.bfloat16, np.float32)
    activate = functools.partial(
        _activate, activation=activation, alpha=alpha, beta=beta, limit=limit
    )
    if tiles is None:
        assert w.ndim == 2 and slot_rows is None and num_tiles is None
        assert len(out) == len(x)
        out[...] = _round(activate(_product(x, w, scales, bias)), out.dtype)
        return
    assert w.ndim == 3 and tiles.shape[1] == 4 and num_tiles.shape == (1,)
    assert tiles.dtype == num_tiles.dtype == np.int32 and num_tiles[0] <= len(tiles)
    assert config in configs.FIRST_CONFIGS or not (gated or slot_rows is not None)
    out[...] = np.nan
    slot_rows = np.arange(len(out)) if slot_rows is None else slot_rows
    for expert, first, count, _ in tiles[: num_tiles[0]]:
        assert 0 < count <= tile_rows and np.all(np.isnan(out[first : first + count]))
        rows = x[slot_rows[first : first + count]]
        of_expert = None if bias is None else bias[expert]
        product = _product(rows, w[expert], scales[expert], of_expert)
        out[first : first + count] = _round(activate(product), out.dtype)


def moe(
    x, w13, w13_scales, w13_bias, w2, w2_scales, w2_bias, ids, weights, out,
    slot_rows, slot_of_row, tiles, num_tiles, hidden, rows,
    row_divisor, activation, alpha, beta, limit, tile_rows,
    first_kernel, first_variant, first_split_k,
    second_kernel, second_variant, second_split_k,
):  # fmt: skip
    places = tiles, num_tiles
    permute(ids, slot_rows, slot_of_row, *places, len(w13), tile_rows, row_divisor)
    parameters = activation, alpha, beta, limit
    first = first_kernel, tile_rows, first_variant, first_split_k
    second = second_kernel, tile_rows, second_variant, second_split_k
    if (first, second) in configs.MIXED_PAIRS:  # only a layer mixes columns
        assert x.shape[1] % 64 == hidden.shape[1] % 64 == 0 and rows.size >= x.size
        first = second = configs._unmixed(configs.GemmConfig(*first))
    columns = w13.shape[1] // (2 if activation in (1, 2, 3, 4) else 1)
    given, hidden[:, columns:] = hidden[:, :columns], 0
    gemm(x, w13, w13_scales, w13_bias, given, slot_rows, *places, *parameters, *first)
    none = 0, 0.0, 0.0, math.inf
    gemm(hidden, w2, w2_scales, w2_bias, rows, None, *places, *none, *second)
    combine(rows, slot_of_row, weights, out)


def _product(x, w, scales, bias):
    codes = scales.view(np.uint8).astype(np.float64)
    wide = w.astype(np.float64) * np.repeat(2.0 ** (codes - 127), 32, axis=-1)
    return x.astype(np.float64) @ wide.T + (
        0 if bias is None else bias.astype(np.float64)
    )


def _round(a, dtype):
    return a.astype(np.float32).astype(dtype)


def _activate(a, *, activation, alpha, beta, limit):
    if activation in (0, 5):
        return np.maximum(a, 0) ** 2 if activation else a
    gate, up = np.split(a, 2, axis=-1)
    if activation == 4:
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
        return gate / (1 + np.exp(-alpha * gate)) * (up + beta)
    return up * gate * {1: _sigmoid, 2: _normal_cdf, 3: _tanh_cdf}[activation](gate)


def _sigmoid(a):
    return 1 / (1 + np.exp(-a))


def _normal_cdf(a):
    return (1 + np.vectorize(math.erf, otypes=[float])(a / math.sqrt(2))) / 2


def _tanh_cdf(a):
    return (1 + np.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3))) / 2


def permute(
    ids, slot_rows, slot_of_row, tiles, num_tiles, num_experts, tile_rows, row_divisor
):  # fmt: skip
    assert ids.dtype == np.int32 and slot_of_row.shape == ids.shape
    assert slot_rows.shape == (ids.size,) and num_tiles.shape == (1,)
    for a in (slot_rows, tiles):
        a[...] = _POISON
    slots, made, slot_of_row[...] = 0, 0, -1
    for expert in range(num_experts):
        (rows,) = np.nonzero(ids.reshape(-1) == expert)
        slot_rows[slots : slots + rows.size] = rows // row_divisor
        slot_of_row.reshape(-1)[rows] = slots + np.arange(rows.size)
        for first in range(0, rows.size, tile_rows):
            size = min(tile_rows, rows.size - first)
            tiles[made] = (expert, slots, size, 0)
            slots, made = slots + size, made + 1
    num_tiles[0] = made


def combine(rows, slot_of_row, weights, out):
    assert rows.dtype == out.dtype == ml_dtypes.bfloat16
    assert weights is None or weights.dtype == np.float32
    factors = np.ones(slot_of_row.shape) if weights is None else weights
    terms = rows[slot_of_row].astype(np.float64) * factors[..., None]
    terms = np.where(slot_of_row[..., None] < 0, 0, terms)
    out[...] = _round(np.sum(terms, axis=1), out.dtype)


def route(
    logits, bias, ids, weights,
    scores, num_groups, topk_groups, renormalize, scaling_factor,
):  # fmt: skip
    assert logits.dtype in (ml_dtypes.bfloat16, np.float32)
    assert bias is None or bias.shape in (logits.shape, logits.shape[1:])
    assert bias is None or bias.dtype == np.float32
    values = logits.astype(np.float64)
    softmax = lambda a: np.exp(a) / np.sum(np.exp(a), axis=-1, keepdims=True)
    values = {
        0: softmax,
        1: lambda a: a,
        2: _sigmoid,
        3: lambda a: np.sqrt(np.log1p(np.exp(a))),
    }[scores](values)
    choice = values + (0 if bias is None else bias)
    if num_groups > 1:
        groups = choice.reshape(len(choice), num_groups, -1)
        best_two = np.sum(np.sort(groups, axis=-1)[..., -2:], axis=-1)
        dropped = _best(best_two, num_groups)[:, topk_groups:]
        for group, drop in zip(groups, dropped, strict=True):
            group[drop] = -np.inf
        choice = groups.reshape(choice.shape)
    ids[...] = _best(choice, ids.shape[1])
    chosen = np.take_along_axis(values, ids, axis=-1)
    if scores == 1:
        chosen = softmax(chosen)
    elif renormalize:
        chosen = chosen / np.sum(chosen, axis=-1, keepdims=True)
    weights[...] = chosen * scaling_factor


def _best(a, count):
    return np.argsort(-a, axis=-1, kind="stable")[:, :count]


def quantize(x, elements, scales):
    assert x.dtype == ml_dtypes.bfloat16 and elements.shape == x.shape
    codes, scale_codes = model_quantize(x.astype(np.float64))
    elements.view(np.uint8)[...] = codes
    scales.view(np.uint8)[...] = scale_codes

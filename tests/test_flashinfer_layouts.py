"""Layouts, byte for byte against FlashInfer's own functions and its index formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmx8 import MXArray, quantize
from jmx8.kernels._prepared import prepare_weights
from jmx8.kernels.flashinfer import layouts, modules, prepare

from .helpers import assert_bits_equal


torch = pytest.importorskip("torch")
flashinfer = pytest.importorskip("flashinfer")


def random_bytes(*shape, seed=0):
    return np.random.default_rng(seed).integers(1, 256, shape, np.uint8)


def swizzle_by_formula(scales, tile_rows):
    """Places every byte of a matrix where the kernels' offset formula says."""
    rows, cols = scales.shape
    tiles = -(-cols // 4)
    out = np.zeros(-(-rows // tile_rows) * tile_rows * tiles * 4, np.uint8)
    m, k = np.indices(scales.shape)
    tile = (m // tile_rows) * tiles + k // 4
    if tile_rows == 128:
        offset = tile * 512 + (m % 32) * 16 + (m % 128 // 32) * 4 + k % 4
    else:
        offset = tile * 32 + (m % 8) * 4 + k % 4
    out[offset] = scales
    return out


@pytest.mark.parametrize("tile_rows", [128, 8])
def test_swizzle_follows_the_formula_for_all_remainders(tile_rows):
    # Rows and columns are padded one by one, so their remainders need not be crossed.
    for rows in range(1, tile_rows + 2):
        cols = rows % 9 + 1
        scales = random_bytes(rows, cols, seed=rows)
        swizzled, restored = round_trip(jnp.asarray(scales), tile_rows)
        assert_bits_equal(swizzled, swizzle_by_formula(scales, tile_rows))
        assert_bits_equal(restored, scales)


@functools.partial(jax.jit, static_argnums=1)
def round_trip(scales, tile_rows):
    swizzled, (rows, cols) = layouts.swizzle_scales(scales, tile_rows), scales.shape
    return swizzled, layouts.unswizzle_scales(swizzled, rows, cols, tile_rows)


def test_swizzle_is_that_of_flashinfers_quantizer():
    arch = "10.0a"  # what runs on the host is the same for every architecture
    path = modules.find(modules.QUANTIZATION, arch)
    if path is None:
        pytest.skip(f"FlashInfer's {modules.QUANTIZATION.name} is not built for {arch}")
    tvm_ffi = pytest.importorskip("tvm_ffi")
    modules.preload_libraries(path)
    quantize_on_host = tvm_ffi.load_module(str(path))["mxfp8_quantize_host"]
    swizzled_layout, linear_layout = 0, 2

    def scales_of(x, layout, size):
        codes = torch.zeros(x.shape, dtype=torch.uint8)
        scales = torch.zeros(size, dtype=torch.uint8)
        quantize_on_host(torch.from_numpy(x), codes, scales, layout)
        return scales.numpy()

    rng = np.random.default_rng(0)
    for rows in range(1, 130):
        cols = rows % 9 + 1
        blocks = rng.standard_normal((rows, cols, 32), np.float32)
        x = (blocks * 2.0 ** rng.integers(-40, 40, (rows, cols, 1))).astype(np.float32)
        x = x.reshape(rows, cols * 32)
        linear = scales_of(x, linear_layout, rows * cols).reshape(rows, cols)
        size = -(-rows // 128) * 128 * -(-cols // 4) * 4
        ours, _ = round_trip(jnp.asarray(linear), 128)
        assert_bits_equal(ours, scales_of(x, swizzled_layout, size))


def test_leading_axes_and_vmap_pad_each_element():
    scales = jnp.asarray(random_bytes(2, 3, 130, 5))
    swizzled = layouts.swizzle_scales(scales)
    assert swizzled.shape == (2, 3, 256 * 8)
    for index in np.ndindex(2, 3):
        expected = swizzle_by_formula(np.asarray(scales[index]), 128)
        assert_bits_equal(swizzled[index], expected)
    assert_bits_equal(jax.vmap(layouts.swizzle_scales)(scales), swizzled)
    assert_bits_equal(jax.jit(layouts.swizzle_scales)(scales), swizzled)


def test_wrong_sizes_are_named():
    with pytest.raises(ValueError, match=r"256 x 8 = 2048 bytes .*, got 2047"):
        layouts.unswizzle_scales(jnp.zeros(2047, jnp.uint8), 130, 5)
    with pytest.raises(ValueError, match="even number of rows, got 3"):
        layouts.swap_halves(3)
    with pytest.raises(ValueError, match="multiple of 32, got 48"):
        layouts.shuffle_rows(48)


def test_row_orders_are_flashinfers():
    for rows in (32, 64, 96, 128, 320, 768):
        weight = random_bytes(rows, 40, seed=rows)
        take = lambda order, w=weight: layouts.take_rows(jnp.asarray(w), order)
        theirs = torch.from_numpy(weight)
        shuffled = flashinfer.shuffle_matrix_a(theirs, 128)
        assert_bits_equal(take(layouts.shuffle_rows(rows)), shuffled.numpy())
        interleaved = flashinfer.reorder_rows_for_gated_act_gemm(theirs)
        assert_bits_equal(take(layouts.interleave_halves(rows)), interleaved.numpy())
        swapped = torch.cat([theirs[rows // 2 :], theirs[: rows // 2]])
        assert_bits_equal(take(layouts.swap_halves(rows)), swapped.numpy())
        for make in (
            layouts.shuffle_rows,
            layouts.interleave_halves,
            layouts.swap_halves,
        ):
            back = layouts.take_rows(take(make(rows)), layouts.invert(make(rows)))
            assert_bits_equal(back, weight)


def test_packed_words_have_the_bytes_in_order():
    scales = random_bytes(3, 24)
    words = layouts.pack_int32(jnp.asarray(scales))
    # What a torch view as int32 holds, on a little-endian machine.
    assert_bits_equal(words, torch.from_numpy(scales).view(torch.int32).numpy())
    assert_bits_equal(layouts.unpack_int32(words), scales)


def canonical(*shape, seed=0):
    values = np.random.default_rng(seed).standard_normal(shape) * 2.0 ** np.arange(
        -4, shape[-1] - 4
    ).clip(max=20)
    return quantize(jnp.asarray(values, jnp.bfloat16))


def as_bytes(a):
    return np.asarray(a).view(np.uint8)


def padded(a, rows, cols):
    """Pads the last two axes with zero bytes."""
    a = as_bytes(a)
    widths = [(0, 0)] * (a.ndim - 2)
    return np.pad(a, [*widths, (0, rows - a.shape[-2]), (0, cols - a.shape[-1])])


def padded_w13(a, rows, cols, *, gated):
    """Pads gate and up, each to `rows`, and puts up first."""
    if not gated:
        return padded(a, rows, cols)
    gate, up = np.split(as_bytes(a), 2, axis=1)
    return np.concatenate([padded(up, rows, cols), padded(gate, rows, cols)], axis=1)


def assert_same(restored: MXArray, original: MXArray):
    assert_bits_equal(restored.elements, original.elements)
    assert_bits_equal(restored.scales, original.scales)
    assert restored.shape == original.shape and restored.dtype == original.dtype


@pytest.mark.parametrize(
    ("shape", "padded_shape"),
    [
        ((40, 70), (128, 128)),
        ((130, 128), (160, 128)),
        ((512, 200), (512, 224)),
        ((2, 33, 160), (2, 128, 160)),
    ],
)
def test_dense_weights(shape, padded_shape):
    w = canonical(*shape)
    prepared = jitted_prepare(w, prepare.dense_cutlass())
    prepared_elements, prepared_scales = prepared.arrays
    n, k = padded_shape[-2:]
    assert prepared_elements.shape == padded_shape
    assert_bits_equal(prepared_elements, padded(w.elements, n, k))
    scales = padded(w.scales, n, k // 32).reshape(-1, n, k // 32)
    expected = np.stack([swizzle_by_formula(s, 128) for s in scales])
    assert_bits_equal(prepared_scales, expected.reshape(*shape[:-2], -1))
    assert_same(prepared.canonical(), w)


jitted_prepare = jax.jit(prepare_weights, static_argnums=1)


def prepared_moe(w13, w2, layout, *, gated):
    return jitted_prepare(w13, layout(gated)), jitted_prepare(w2, layout(False))


MOE_SHAPES = [(128, 256), (40, 70), (192, 96), (320, 300)]  # i, h


def moe_weights(inner_size, hidden_size, *, gated):
    rows = 2 * inner_size if gated else inner_size
    return canonical(3, rows, hidden_size), canonical(3, hidden_size, inner_size)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("inner_size", "hidden_size"), MOE_SHAPES)
def test_cutlass_moe_weights(inner_size, hidden_size, gated):
    w13, w2 = moe_weights(inner_size, hidden_size, gated=gated)
    prepared13, prepared2 = prepared_moe(w13, w2, prepare.moe_cutlass, gated=gated)
    i, h = -(-inner_size // 128) * 128, -(-hidden_size // 128) * 128
    elements13, words13 = prepared13.arrays
    elements2, words2 = prepared2.arrays
    assert_bits_equal(elements13, padded_w13(w13.elements, i, h, gated=gated))
    assert_bits_equal(elements2, padded(w2.elements, h, i))
    rows = 2 * i if gated else i
    for words, expected, shape in (
        (
            words13,
            padded_w13(w13.scales, i, h // 32, gated=gated),
            (3, rows, h // 128),
        ),
        (words2, padded(w2.scales, h, i // 32), (3, h, i // 128)),
    ):
        assert words.shape == shape and words.dtype == jnp.int32
        expected = np.stack([swizzle_by_formula(s, 128) for s in expected])
        assert_bits_equal(as_bytes(words).reshape(3, -1), expected)
    assert_same(prepared13.canonical(), w13)
    assert_same(prepared2.canonical(), w2)


def trtllm_by_flashinfer(matrix, *, gated):
    """Arranges the rows of one expert as FlashInfer's preparation does."""
    matrix = torch.from_numpy(np.ascontiguousarray(matrix))
    if gated:
        matrix = flashinfer.reorder_rows_for_gated_act_gemm(matrix)
    return flashinfer.shuffle_matrix_a(matrix, 128).numpy()


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("inner_size", "hidden_size"), MOE_SHAPES)
def test_trtllm_moe_weights(inner_size, hidden_size, gated):
    w13, w2 = moe_weights(inner_size, hidden_size, gated=gated)
    prepared13, prepared2 = prepared_moe(w13, w2, prepare.moe_trtllm, gated=gated)
    i, h = -(-inner_size // 128) * 128, -(-hidden_size // 128) * 128
    elements13 = padded_w13(w13.elements, i, h, gated=gated)
    scales13 = padded_w13(w13.scales, i, h // 32, gated=gated)
    for expert in range(3):
        for matrix, scales, elements, linear, is_gated in (
            (*prepared13.arrays, elements13, scales13, gated),
            (
                *prepared2.arrays,
                padded(w2.elements, h, i),
                padded(w2.scales, h, i // 32),
                False,
            ),
        ):
            expected = trtllm_by_flashinfer(elements[expert], gated=is_gated)
            assert_bits_equal(matrix[expert], expected)
            shuffled = trtllm_by_flashinfer(linear[expert], gated=is_gated)
            assert scales.shape == linear.shape and scales.dtype == jnp.uint8
            swizzled = swizzle_by_formula(shuffled, 128)
            assert_bits_equal(scales[expert].reshape(-1), swizzled)
    assert_same(prepared13.canonical(), w13)
    assert_same(prepared2.canonical(), w2)


@pytest.mark.parametrize("gated", [True, False])
def test_biases_are_in_the_order_of_the_rows(gated):
    w13, w2 = moe_weights(40, 70, gated=gated)
    # A bias that equals the first column of its weight must stay so.
    first_column = lambda a: jnp.asarray(np.asarray(a, np.float32)[..., 0])
    for weight_layout, bias_layout in (
        (prepare.moe_cutlass, prepare.bias_cutlass),
        (prepare.moe_trtllm, prepare.bias_trtllm),
    ):
        for w, is_gated in ((w13, gated), (w2, False)):
            bias = first_column(w.elements)
            prepared = jitted_prepare(bias, bias_layout(is_gated))
            weights = jitted_prepare(w, weight_layout(is_gated))
            assert_bits_equal(prepared.arrays[0], first_column(weights.arrays[0]))
            assert_bits_equal(prepared.canonical(), bias)

"""Tests of the Hopper kernels' library on a Hopper GPU, against float64."""

import functools
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from jmx8.kernels.sm90 import configs
from jmx8.kernels.sm90.configs import CONFIGS, GemmConfig

from . import sm90_calls as calls


pytestmark = pytest.mark.gpu(9)

ALL_PAIRS = [
    (first, second)
    for first in configs.FIRST_CONFIGS
    for second in CONFIGS
    if first.tile_rows == second.tile_rows
]


def name_of(config):
    return "-".join(map(str, config))


each_config = pytest.mark.parametrize("config", CONFIGS, ids=name_of)


def generator_of(seed):
    return torch.Generator().manual_seed(seed)


def assert_on_gpu(out, exact, error):
    """As `assert_within`, where the operands are."""
    difference = (out.double() - exact).abs()
    bound = error + torch.finfo(out.dtype).eps * exact.abs()
    assert bool((difference <= bound).all()), float((difference / bound).max())


@functools.cache
def problem(m, n, k, codes=(115, 131)):
    generator = generator_of(m)
    x = calls.random_rows(generator, m, k)
    w = calls.random_weight(generator, n, k, codes=codes)
    bias = torch.randn(n, generator=generator).cuda()
    return x, w, bias.bfloat16() if m % 2 else bias


@functools.cache
def expected(m, n, k, biased):
    x, w, bias = problem(m, n, k)
    return calls.product(x.double(), w.exact, bias if biased else None)


@each_config
def test_tails_of_every_axis(config: GemmConfig):
    kept = []
    for m in (1, 7, 8, 9, 63, 129, 300):
        for n, k in ((1, 32), (7, 96), (64, 64), (130, 160), (257, 1056), (384, 4096)):
            x, w, bias = problem(m, n, k)
            out = calls.gemm(x, w, config, bias=bias)
            assert_on_gpu(out, *expected(m, n, k, True))
            out = calls.gemm(x, w, config, out_dtype=torch.float32)
            assert_on_gpu(out, *expected(m, n, k, False))
            kept.append(calls.kept_bits(out, *expected(m, n, k, False)))
            again = calls.gemm(x, w, config, out_dtype=torch.float32)
            assert torch.equal(out, again)
    print(f"\n{name_of(config)}: {min(kept):.1f} bits of float32 sums are kept")


def test_more_tiles_of_rows_than_a_grid_has_blocks_in_one_dimension():
    x, w, _ = problem(65_538, 16, 32)
    out = calls.gemm(x, w, GemmConfig(0, 1, 2, 1))
    assert_on_gpu(out, *expected(65_538, 16, 32, False))


@functools.cache
def every_code():
    """Weights of each finite element times each scale, and x that picks one of them.

    Products that bfloat16 has no finite value for are left out.
    """
    finite = torch.tensor([c for c in range(256) if c & 0x7F != 0x7F])
    codes = torch.arange(255)
    elements = finite.to(torch.uint8)[:, None].expand(-1, 255 * 32).clone()
    values = elements.view(torch.float8_e4m3fn).double()
    scales = torch.exp2(codes.double() - 127).repeat_interleave(32)
    elements[(values * scales).abs() >= 2.0**128] = 0
    w = calls.Weight(
        elements.cuda(),
        codes.to(torch.uint8).expand(len(finite), -1).contiguous().cuda(),
    )
    x = torch.zeros(255, 255 * 32)
    factors = torch.exp2(-(codes.double() - 127).clamp(-125, 125))
    x[codes, 32 * codes + codes % 32] = factors.float()
    x = x.bfloat16().cuda()
    return x, w, x.double() @ w.exact.T, factors[:, None].cuda()


@each_config
def test_every_element_and_scale_code(config: GemmConfig):
    """Single products, which a float32 result holds exactly."""
    x, w, exact, factors = every_code()
    out = calls.gemm(x, w, config, out_dtype=torch.float32).double()
    assert torch.equal(out[10:], exact[10:])
    # The weight is a subnormal bfloat16 there, whose last bit is 2**-133.
    assert bool(((out - exact).abs() <= 2.0**-134 * factors)[:10].all())


@functools.cache
def scaled_problem(codes):
    generator = generator_of(codes[1])
    w = calls.random_weight(generator, 70, 32 * 40, codes=codes)
    w = calls.Weight(w.elements, w.scales[:1].expand(70, -1).contiguous())
    # Each block of x balances the scale of its block of w.
    exponents = (127 - w.scales[0].double()).clamp(-90, 90).repeat_interleave(32)
    noise = torch.randn(33, 32 * 40, generator=generator)
    x = (noise.cuda().double() * torch.exp2(exponents)).bfloat16()
    exact, error = calls.product(x.double(), w.exact, None)
    subnormal = 2.0**-134 * x.double().abs().sum(dim=1, keepdim=True)
    return x, w, exact, error + subnormal


@each_config
@pytest.mark.parametrize("codes", [(0, 30), (100, 140), (134, 246), (0, 246)])
def test_sums_over_all_scales(config: GemmConfig, codes):
    x, w, exact, error = scaled_problem(codes)
    out = calls.gemm(x, w, config, out_dtype=torch.float32)
    assert_on_gpu(out, exact, error)


@each_config
@pytest.mark.parametrize("codes", [(110, 120), (0, 246)])
def test_bfloat16_results_are_float32_ones_rounded(config: GemmConfig, codes):
    """Which other kernels compute: those are of whole words of scales and rows."""
    x, w, _, _ = scaled_problem(codes)
    bias = torch.randn(64, generator=generator_of(7)).cuda()
    w = calls.Weight(w.elements[:64].contiguous(), w.scales[:64].contiguous())
    x = x.repeat(9, 1)
    for m in (1, 9, 33, 297):
        for b in (None, bias):
            out = calls.gemm(x[:m], w, config, bias=b)
            wide = calls.gemm(x[:m], w, config, bias=b, out_dtype=torch.float32)
            np.testing.assert_array_equal(calls.bits(out), calls.bits(wide.bfloat16()))


@pytest.mark.parametrize("config", configs.FIRST_CONFIGS, ids=name_of)
@pytest.mark.parametrize("activation", calls.ACTIVATIONS)
def test_activations_in_the_epilogue(config: GemmConfig, activation):
    for m, n, k in ((1, 64, 64), (19, 208, 320), (200, 128, 512)):
        x, w, bias = problem(m, n, k, codes=(114, 118))
        out = calls.gemm(x, w, config, bias=bias, activation=activation)
        before = calls.product(x.double(), w.exact, bias)
        assert_on_gpu(out, *calls.activate(*before, activation))


def random_moe(generator, t, e, top_k, h, i, gated=True, spread=2):
    rows = 2 * i if gated else i
    ids = torch.randint(-spread, e + spread, (t, top_k), generator=generator)
    return (
        calls.random_rows(generator, t, h),
        calls.random_weight(generator, e, rows, h, codes=(116, 120)),
        calls.random_weight(generator, e, h, i, codes=(116, 120)),
        ids.int().cuda(),
        torch.rand(t, top_k, generator=generator).cuda(),
    )


def check_moe(operands, pair, activation="silu", biases=(None, None)):
    out = calls.moe(operands, pair, activation, biases)
    calls.assert_moe_close(out, operands, activation, biases)
    again = calls.moe(operands, pair, activation, biases)
    np.testing.assert_array_equal(calls.bits(out), calls.bits(again))


@pytest.mark.parametrize("activation", calls.ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_moe_layers(activation, bias):
    generator = generator_of(4)
    gated = activation != "relu2"
    for t in (1, 5, 70, 700):
        operands = random_moe(generator, t, 12, 3, 160, 96, gated)
        biases = (
            torch.randn(12, 192 if gated else 96, generator=generator).cuda(),
            torch.randn(12, 160, generator=generator).cuda().bfloat16(),
        )
        for pair in configs.moe_candidates(160, 96):
            check_moe(operands, pair, activation, biases if bias else (None, None))


@pytest.mark.parametrize("activation", calls.ACTIVATIONS)
@pytest.mark.parametrize("pair", configs.MIXED_PAIRS, ids=lambda pair: name_of(pair[0]))
def test_layers_of_mixed_columns(pair, activation):
    generator = generator_of(6)
    gated = activation != "relu2"
    for t, h, i in ((1, 64, 64), (5, 192, 128), (70, 128, 320), (700, 256, 64)):
        operands = random_moe(generator, t, 6, 3, h, i, gated)
        biases = (
            torch.randn(6, 2 * i if gated else i, generator=generator).cuda(),
            torch.randn(6, h, generator=generator).cuda().bfloat16(),
        )
        check_moe(operands, pair, activation, biases if t % 2 else (None, None))


def test_mix_moves_the_columns_of_each_64():
    x = calls.random_rows(generator_of(7), 37, 320)
    out = calls.empty(x.shape)
    calls.call("mix", x, out)
    c, s, h, e = torch.meshgrid(*map(torch.arange, (4, 4, 2, 2)), indexing="ij")
    columns, places = 16 * c + 4 * s + 2 * h + e, 16 * s + 8 * h + 2 * c + e
    expected = torch.empty_like(x).reshape(37, 5, 64)
    expected[..., places.reshape(-1)] = x.reshape(37, 5, 64)[..., columns.reshape(-1)]
    assert torch.equal(out, expected.reshape(37, 320))


@pytest.mark.parametrize("where", ["one", "few", "none"])
@pytest.mark.parametrize("t", [1, 8, 65, 1000])
def test_full_and_empty_experts(where, t):
    generator = generator_of(t)
    x, w13, w2, ids, weights = random_moe(generator, t, 40, 4, 128, 64)
    if where == "few":
        ids = ids % 3 * 13
    else:
        ids = torch.full_like(ids, 39 if where == "one" else 40)
    operands = (x, w13, w2, ids, weights)
    for pair in configs.moe_candidates(128, 64):
        out = calls.moe(operands, pair)
        calls.assert_moe_close(out, operands)
        assert where != "none" or not out.any()


def test_a_thousand_random_shapes():
    rng, generator = random.Random(0), generator_of(5)
    for _ in range(600):
        m = rng.choice([rng.randint(1, 20), rng.randint(1, 400)])
        n, k = rng.randint(1, 400), 32 * rng.randint(1, 40)
        x, w = calls.random_rows(generator, m, k), calls.random_weight(generator, n, k)
        config = rng.choice([rng.choice(CONFIGS), configs.dense_config(m, n, k)])
        out_dtype = rng.choice([torch.bfloat16, torch.float32])
        out = calls.gemm(x, w, config, out_dtype=out_dtype)
        calls.assert_product_close(out, x, w)
    for _ in range(400):
        t = rng.choice([rng.randint(1, 20), rng.randint(1, 400)])
        e, top_k = rng.randint(1, 40), rng.randint(1, 8)
        h, i = 32 * rng.randint(1, 10), 32 * rng.randint(1, 8)
        operands = random_moe(generator, t, e, top_k, h, i, spread=rng.choice([0, 9]))
        pair = rng.choice(
            [rng.choice(ALL_PAIRS), configs.moe_configs(t * top_k, e, h, i)]
        )
        out = calls.moe(operands, pair)
        calls.assert_moe_close(out, operands)


@pytest.mark.parametrize("e", [1, 3, 128, 512])
@pytest.mark.parametrize("rows", [(1, 8), (31, 1), (1000, 8), (9000, 8)])
@pytest.mark.parametrize("tile_rows", [8, 64])
def test_permute_sorts_by_expert(e, rows, tile_rows):
    ids = torch.randint(-2, e + 2, rows, generator=generator_of(e)).int()
    ids[0, 0] = torch.iinfo(torch.int32).max
    places = calls.permute(ids.cuda(), e, tile_rows, rows[1])
    flat = ids.reshape(-1).numpy()
    local = np.flatnonzero((flat >= 0) & (flat < e))
    order = local[np.argsort(flat[local], kind="stable")]
    slot_of_row = np.full(flat.size, -1)
    slot_of_row[order] = np.arange(order.size)
    np.testing.assert_array_equal(places.slot_of_row.cpu().reshape(-1), slot_of_row)
    slot_rows = places.slot_rows.cpu().numpy()[: order.size]
    np.testing.assert_array_equal(slot_rows, order // rows[1])
    tiles = places.tiles.cpu().numpy()[: int(places.num_tiles)]
    covered = []
    for expert, first, count, _ in tiles:
        assert 1 <= count <= tile_rows
        assert (flat[order[first : first + count]] == expert).all()
        covered += range(first, first + count)
    assert sorted(covered) == list(range(order.size))
    for expert in range(e):
        sizes = tiles[tiles[:, 0] == expert, 2]
        assert np.all(sizes[:-1] == tile_rows)
        assert sizes.size == -(-np.sum(flat == expert) // tile_rows)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_is_clean(tool):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not on the PATH")
    command = [sanitizer, f"--tool={tool}", "--error-exitcode=9", sys.executable]
    command += ["-m", "tests.sm90_sanitize"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert "all shapes ran" in run.stdout and "0 errors" in run.stdout

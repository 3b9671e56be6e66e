import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jmx8.convert import (
    convert_leaf,
    kept_row,
    quantize_leaf,
    quantize_params,
)

from .convert_helpers import (
    assert_same_bytes,
    normal,
    quantized,
    small_tree,
)


def numpy_statistics(x, w):
    """Recomputes a row in float64 from the bytes."""
    codes = np.asarray(w.scales).view(np.uint8).astype(np.int64)
    values = np.asarray(w.elements).astype(np.float64)
    blocks = values.reshape(*codes.shape, 32) * np.exp2(codes[..., None] - 127.0)
    y = blocks.reshape(values.shape)[..., : values.shape[-1] - w.padding]
    y = np.swapaxes(y, -1, -2) if w.transposed else y
    x = np.asarray(x).astype(np.float64)
    noise = np.sum((x - y) ** 2)
    sqnr = 10 * np.log10(np.sum(x**2) / noise) if noise else np.inf
    used = codes[np.abs(blocks).max(axis=-1) > 0] - 127
    return sqnr, np.abs(x).max(), used.min(), used.max()


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize(
    "shape, scale",
    [((32, 64), 1), ((3, 24, 40), 1e-3), ((64, 33), 1e30), ((2, 5), 1e-30)],
)
def test_report_numbers_match_numpy(shape, scale, axis):
    x = (
        normal(0, shape, jnp.float32)
        * scale
        * jnp.exp2(normal(1, shape, jnp.float32) * 4)
    )
    x = x.at[0, :].set(0)
    before = x.nbytes
    out, report = quantize_params(
        {"w": x}, contract=axis, return_report=True, donate=False
    )
    (row,) = report.rows
    sqnr, amax, low, high = numpy_statistics(x, out["w"])
    assert row.statistics is not None
    assert row.statistics.sqnr_db == pytest.approx(sqnr, abs=1e-3)
    assert row.statistics.amax == amax
    assert (row.statistics.exponent_min, row.statistics.exponent_max) == (low, high)
    assert (row.path, row.shape, row.dtype, row.axis) == ("w", shape, "float32", axis)
    assert (row.bytes_before, row.bytes_after) == (before, out["w"].nbytes)
    assert out["w"].nbytes == out["w"].elements.nbytes + out["w"].scales.nbytes


def test_gaussian_weights_have_the_expected_sqnr():
    _, row = convert_leaf("w", normal(0, (256, 512)), with_stats=True)
    assert row.statistics is not None and 31 < row.statistics.sqnr_db < 33


def test_exact_weights_have_infinite_sqnr():
    exact = jnp.exp2(jnp.arange(64.0) % 8).reshape(2, 32)
    zeros = jnp.zeros((2, 32))
    tree = {"a": {"weight": exact}, "b": {"weight": zeros}}
    _, report = quantize_params(tree, return_report=True)
    rows = [row.to_dict() for row in report.rows]
    assert [row["sqnr_db"] for row in rows] == ["inf", "inf"]
    # amax 128 = 2**7 gives the smallest scale s with 128 / s <= 448: 2**-1.
    assert (rows[0]["exponent_min"], rows[0]["exponent_max"]) == (-1, -1)
    assert (rows[1]["exponent_min"], rows[1]["exponent_max"]) == (None, None)
    assert rows[1]["amax"] == 0
    assert "none" in str(report)


def test_no_statistics_without_a_report(monkeypatch):
    from jmx8.convert import _leaf

    monkeypatch.setattr(_leaf, "measure", None)
    quantize_params(small_tree())


def test_report_reads_well():
    tree = {
        "embed": {"weight": jnp.ones((64, 64), jnp.bfloat16)},
        "layers": [{"up_proj": {"weight": normal(i, (64, 64))}} for i in range(2)],
        "norm": {"weight": jnp.ones(64)},
    }
    _, report = quantize_params(tree, return_report=True)
    rows: Any = report.converted
    db = [f"{row.statistics.sqnr_db:.1f}" for row in rows]
    amax = [f"{row.statistics.amax:.4g}" for row in rows]
    lines = str(report).splitlines()
    assert lines[0].split() == (
        "tensor shape before after SQNR dB amax exponents what".split()
    )
    assert lines[1].split() == (
        "embed/weight 64,64 8.0 KiB 8.0 KiB kept: embedding, kept by default".split()
    )
    assert (
        lines[2].split()[:6] == "layers/0/up_proj/weight 64,64 8.0 KiB 4.1 KiB".split()
    )
    assert lines[2].split()[6:8] == [db[0], amax[0]]
    assert lines[2].endswith("converted: name `weight`")
    assert lines[5] == ""
    assert lines[6] == "2 of 4 tensors converted to MXFP8, 24.2 KiB -> 16.5 KiB"
    worst = min(rows, key=lambda r: r.statistics.sqnr_db)
    assert lines[7] == f"lowest SQNR {worst.statistics.sqnr_db:.1f} dB: {worst.path}"
    assert lines[8:] == [
        "kept 1 (8.0 KiB): embedding, kept by default (embed/weight)",
        "kept 1 (256 B): fewer than 2 axes (norm/weight)",
    ]
    assert report.worst(1) == (worst,) and len(report.worst()) == 2
    assert all(line == line.rstrip() for line in lines)


def test_summary_tells_what_was_kept_by_patterns():
    tree = {f"m{i}": [{"norm": jnp.ones(3)}, {"norm": jnp.ones(3)}] for i in range(6)}
    _, report = quantize_params(tree, return_report=True)
    assert report.summary().splitlines()[1] == (
        "kept 12 (144 B): fewer than 2 axes "
        "(m0/*/norm, m1/*/norm, m2/*/norm, m3/*/norm, 2 more)"
    )


def test_report_is_json():
    _, report = quantize_params(small_tree(), return_report=True)
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["bytes_before"] == report.bytes_before
    assert data["bytes_after"] == report.bytes_after
    assert (data["num_converted"], data["num_kept"]) == (4, 6)
    row = next(row for row in data["rows"] if row["path"] == "layers/1/experts/w2")
    assert row["shape"] == [4, 40, 24] and row["action"] == "converted"
    assert row["axis"] == -1 and row["dtype"] == "bfloat16"
    assert set(row) == {
        "path",
        "shape",
        "dtype",
        "action",
        "reason",
        "axis",
        "bytes_before",
        "bytes_after",
        "sqnr_db",
        "amax",
        "exponent_min",
        "exponent_max",
    }


def test_one_leaf_at_a_time():
    x = normal(0, (32, 64))
    w, row = convert_leaf("a/b", x, -1, reason="because")
    assert_same_bytes(w, quantized(x))
    assert_same_bytes(quantize_leaf(x), w)
    assert (row.path, row.reason, row.statistics) == ("a/b", "because", None)
    row = kept_row("a/b", w, "already MXFP8")
    assert (row.action, row.dtype, row.shape) == ("kept", "bfloat16", (32, 64))
    assert row.bytes_before == row.bytes_after == w.nbytes

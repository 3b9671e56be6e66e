"""Choosing tactics by measuring, and the table that they are stored in."""

import collections
import json
import logging
import os
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmx8 import autotune, dequantize, explain, mx_matmul, quantize
from jmx8.kernels import tactics
from jmx8.ops import _dispatch, _tactics, matmul


pytestmark = pytest.mark.cpu

X = jax.random.normal(jax.random.key(0), (6, 64), jnp.bfloat16)
W = quantize(jax.random.normal(jax.random.key(1), (40, 64), jnp.bfloat16))


@pytest.fixture(autouse=True)
def table(monkeypatch, tmp_path):
    path = tmp_path / "tactics.json"
    monkeypatch.setattr(tactics, "path", lambda: path)
    return path


class Fake:
    """A backend with tactics, on the host; remembers which of them ran."""

    PARTS = (("slow", "fast", "wrong", "raises"), (0, 1))

    def __init__(self):
        self.ran = []

    def kernel(self, tactic, x, w):
        kind, second = tactic
        self.ran.append((tactic, x.shape))
        if kind == "raises":
            raise RuntimeError("no such tile\nline 2")
        time.sleep((kind == "slow") * 2e-3 + second * 1e-3)
        out = np.asarray(x, np.float32) @ np.asarray(w, np.float32).T
        out[-1, -1] += (kind == "wrong") * 4 * np.sqrt(np.mean(out**2))
        return out.astype(x.dtype)

    def run(self, x, w, *, out_dtype, tactic=("slow", 0)):
        out = jax.ShapeDtypeStruct((x.shape[0], w.shape[0]), out_dtype)
        kernel = lambda *operands: self.kernel(tactic, *operands)
        return jax.pure_callback(kernel, out, x, dequantize(w, jnp.float32))

    def backend(self, version="1.0"):
        return _dispatch.Backend(
            "fake",
            lambda x, w, **_: None,
            self.run,
            "has tactics",
            None,
            lambda x, w, **_: self.PARTS,
            version,
        )


@pytest.fixture
def install(monkeypatch):
    op = matmul._MATMUL

    def install(backend):
        changed = _dispatch.Op(op.name, (backend, *op.backends), op.fold, op.reference)
        monkeypatch.setattr(matmul, "_MATMUL", changed)
        return changed

    return install


@pytest.fixture
def fake(install):
    fake = Fake()
    install(fake.backend())
    return fake


def tactic_of(fake, x=X, w=W):
    """Returns the tactic that a new trace runs."""
    fake.ran.clear()
    jax.block_until_ready(jax.jit(lambda x, w: mx_matmul(x, w))(x, w))
    ((tactic, _),) = fake.ran
    return tactic


def test_fastest_that_is_right_is_stored_and_runs(fake, table):
    assert tactic_of(fake) == ("slow", 0)
    before = explain(mx_matmul, X, W)
    fake.ran.clear()
    report = autotune(lambda x, w: mx_matmul(x, w) + mx_matmul(x, w), X, W)
    (tuned,) = report.tuned  # two calls of one kind
    assert tuned.tactic == ("fast", 0) and tuned.default == ("slow", 0)
    assert set(tuned.seconds) == {("slow", 0), ("fast", 0), ("fast", 1)}
    assert tuned.seconds["fast", 0] < 2e-3 < tuned.seconds["slow", 0] < 1
    assert set(tuned.left_out) == {("wrong", 0), ("raises", 0)}
    assert tuned.left_out["wrong", 0] == "its result is not that of the default"
    assert "RuntimeError" in tuned.left_out["raises", 0]
    assert {shape for _, shape in fake.ran} == {(8, 64)}  # rounded up
    text = str(report)
    assert "mx_matmul(bfloat16[8,64], MXArray(bfloat16[40,64])) -> fake" in text
    assert "  left out ('wrong', 0): its result is not" in text
    assert f"stored in {table}" in text

    assert tactic_of(fake) == ("fast", 0)
    (choice,) = explain(mx_matmul, X, W).choices
    assert choice.reason == "has tactics; tuned: tactic=('fast', 0)"
    assert [c.reason for c in before.choices] == ["has tactics"]


def test_every_call_of_a_program_is_measured(fake):
    autotune(mx_matmul, X, W)
    counts = collections.Counter(tactic for tactic, _ in fake.ran)
    # Once to see that it is right and seven times to measure it, ten calls each: XLA
    # has not merged calls that are alike.
    assert counts["fast", 1] == 10 * (1 + 7)
    assert counts["wrong", 0] == 10


def test_table_holds_for_the_same_bucket_only(fake, install):
    autotune(mx_matmul, X, W)
    rows = lambda m, dtype=jnp.bfloat16: jnp.ones((m, 64), dtype)
    for m in (5, 7, 8):
        assert tactic_of(fake, rows(m)) == ("fast", 0)
    for x, w in (
        (rows(4), W),
        (rows(9), W),
        (rows(6, jnp.float32), W),
        (rows(6), quantize(jnp.ones((41, 64), jnp.bfloat16))),
    ):
        assert tactic_of(fake, x, w) == ("slow", 0)
    install(fake.backend("1.1"))
    assert tactic_of(fake) == ("slow", 0)


def test_vmap_and_eager_calls_look_up_what_they_run(fake):
    report = autotune(jax.vmap(lambda x: mx_matmul(x, W)), X)
    assert [t.call.partition(",")[0] for t in report.tuned] == ["mx_matmul(bfloat16[8"]
    fake.ran.clear()
    jax.block_until_ready(mx_matmul(X, W))
    assert fake.ran == [(("fast", 0), (6, 64))]


def test_default_that_fails_is_reported_and_nothing_stored(fake, table):
    fake.PARTS = (("raises", "fast"), (0, 1))
    report = autotune(mx_matmul, X, W)
    (tuned,) = report.tuned
    assert tuned.tactic is None and "RuntimeError" in tuned.left_out["raises", 0]
    assert "nothing stored" in str(report) and not table.exists()


def test_nothing_to_tune(table, fake, monkeypatch):
    report = autotune(mx_matmul, X[:0], W)
    assert "fake: has nothing to compute\nnothing was stored" in str(report)
    monkeypatch.undo()
    shapes = jax.eval_shape(lambda: X)
    report = autotune(mx_matmul, shapes, W)
    assert report.tuned == () and report.table is None
    assert "-> xla: has no tactics\nnothing was stored" in str(report)
    assert not table.exists()


def test_unknown_tactic_in_the_table_is_ignored(fake, caplog):
    op = matmul._MATMUL
    call = _dispatch.Call(op, op.backends[0], {"out_dtype": X.dtype}, (X, W))
    key = _tactics.tactic_key(call)
    tactics.store({key: ("fast", 1)})
    assert tactic_of(fake) == ("fast", 1)
    for tactic in (("fast", 2), ("fast",), (), ("fast", 1, 1), (("fast",), 1)):
        tactics.store({key: tactic})
        with caplog.at_level(logging.WARNING, "jmx8"):
            assert tactic_of(fake) == ("slow", 0)
        assert "fake has no such tactic" in caplog.text
        caplog.clear()


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[1]", b"7", b"\xff\xfe", b"[" * 100_000, b'{"k": 7, "l": [{}]}'],
    ids=lambda data: repr(data[:8]),
)
def test_foreign_table_is_ignored_with_a_warning(fake, table, caplog, data):
    table.write_bytes(data)
    with caplog.at_level(logging.WARNING, "jmx8"):
        assert tactic_of(fake) == ("slow", 0)
        assert tactic_of(fake) == ("slow", 0)
    assert "ignored" in caplog.text and str(table) in caplog.text
    assert len(caplog.records) == 1  # The table is read once.
    tactics.store({"k": (1, ("a", None, True), 0.5)})
    assert tactics.lookup("k") == (1, ("a", None, True), 0.5)
    assert list(json.loads(table.read_text())) == ["k"]


def test_unreadable_table_is_ignored_with_a_warning(fake, table, caplog):
    table.mkdir()
    with caplog.at_level(logging.WARNING, "jmx8"):
        assert tactic_of(fake) == ("slow", 0)
    assert "Is a directory" in caplog.text


def test_well_formed_entries_of_a_damaged_table_count(table):
    table.write_text('{"a": [1], "b": "x", "c": [[2, 3]]}')
    assert tactics.lookup("a") == (1,) and tactics.lookup("c") == ((2, 3),)
    assert tactics.lookup("b") is None


def test_processes_write_at_the_same_time_and_lose_nothing(fake, table):
    code = textwrap.dedent(
        """
        import sys
        from jmx8.kernels import tactics
        first, key = int(sys.argv[1]), sys.argv[2]
        assert tactics.lookup("before") == (1,)
        for i in range(first, first + 25):
            tactics.store({f"{key} {i}": (i,), key: ("fast", 1)})
        """
    )
    op = matmul._MATMUL
    call = _dispatch.Call(op, op.backends[0], {"out_dtype": X.dtype}, (X, W))
    key = _tactics.tactic_key(call)
    tactics.store({"before": (1,)})
    environment = {**os.environ, "JMX8_CACHE_DIR": str(table.parent)}
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(i), key], env=environment)
        for i in (0, 25, 50)
    ]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    tactics._read.cache_clear()
    assert [tactics.lookup(f"{key} {i}") for i in range(75)] == [
        (i,) for i in range(75)
    ]
    assert tactic_of(fake) == ("fast", 1)
    keys = list(json.loads(table.read_text()))
    assert keys == sorted(keys)

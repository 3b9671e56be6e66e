"""Writing that is interrupted, continued, refused and compared."""

import errno
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest

import jmx8.checkpoint.output
import jmx8.checkpoint.shards
from jmx8 import CheckpointError, quantize_checkpoint

from .mx_checkpoints import DENSE, random_weights, write_folder


CONFIG = DENSE | {"head_dim": 32, "num_hidden_layers": 1}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Makes a tiny checkpoint take several chunks and flushes for each tensor."""
    monkeypatch.setattr(jmx8.checkpoint.output, "CHUNK_BYTES", 4000)
    monkeypatch.setattr(jmx8.checkpoint.shards, "_FLUSH_BYTES", 3000)


@pytest.fixture
def source(tmp_path):
    folder = write_folder(tmp_path / "in", CONFIG, random_weights(CONFIG), num_shards=2)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def run(source, folder, **options):
    return quantize_checkpoint(source, folder, shard_bytes=20_000, **options)


def contents(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).digest() for p in folder.iterdir()}


def times(folder):
    return {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}


class Stop(BaseException):
    """What a killed process does not survive."""


class StoppingOS:
    """Stands in for `os`: the process is killed at the n-th call that changes a file.

    Half of what that call would write is written; nothing that follows has any effect.
    """

    changing = ("posix_fallocate", "pwrite", "fsync", "replace")

    def __init__(self, stop_at):
        self.stop_at = stop_at
        self.calls = 0

    def __getattr__(self, name):
        function = getattr(os, name)
        if name not in self.changing:
            return function

        def call(*args):
            self.calls += 1
            if self.calls >= self.stop_at:
                if name == "pwrite" and self.calls == self.stop_at:
                    file, data, offset = args
                    os.pwrite(file, data[: len(data) // 2], offset)
                raise Stop
            return function(*args)

        return call


def test_a_stop_at_any_moment_loses_nothing(source, tmp_path, monkeypatch):
    before, when = contents(source), times(source)
    counter: Any = StoppingOS(10**9)
    monkeypatch.setattr(jmx8.checkpoint.shards, "os", counter)
    run(source, tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    assert len([name for name in expected if name.endswith(".safetensors")]) >= 3
    assert counter.calls > 50
    # What a dead process cannot do either.
    discard = jmx8.checkpoint.shards.ShardWriter.discard
    finished = set()
    for stop_at in range(1, counter.calls + 1):
        target = tmp_path / f"stopped-{stop_at}"
        monkeypatch.setattr(jmx8.checkpoint.shards, "os", StoppingOS(stop_at))
        monkeypatch.setattr(
            jmx8.checkpoint.shards.ShardWriter, "discard", lambda self: self._close()
        )
        with pytest.raises(Stop):
            run(source, target)
        named = {
            name: digest
            for name, digest in contents(target).items()
            if not name.endswith(".partial")
        }
        # Whatever has its own name is whole, and config.json comes last.
        assert named.items() <= expected.items()
        assert "config.json" not in named or named == expected
        finished.add(len(named))
        monkeypatch.setattr(jmx8.checkpoint.shards, "os", os)
        monkeypatch.setattr(jmx8.checkpoint.shards.ShardWriter, "discard", discard)
        run(source, target)
        assert contents(target) == expected
    assert finished >= {0, 1, 2, 3, 4}
    assert (contents(source), times(source)) == (before, when)


def test_a_killed_process_is_continued(source, tmp_path):
    run(source, tmp_path / "whole")
    code = f"""
import jmx8.checkpoint.output, jmx8.checkpoint.shards, time
from jmx8 import quantize_checkpoint
write = jmx8.checkpoint.shards.ShardWriter.write
def slow(*args):
    time.sleep(0.02)
    write(*args)
jmx8.checkpoint.shards.ShardWriter.write = slow
quantize_checkpoint({str(source)!r}, {str(tmp_path / "out")!r}, shard_bytes=20_000)
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 240
    while not list((tmp_path / "out").glob("*.safetensors")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    finished = times(tmp_path / "out")
    assert "config.json" not in finished
    run(source, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    shards = {n: t for n, t in finished.items() if n.endswith(".safetensors")}
    assert shards.items() <= times(tmp_path / "out").items()  # not written again


def test_finished_output_is_left_alone(source, tmp_path):
    run(source, tmp_path / "out")
    (tmp_path / "out/mine.txt").write_text("x")
    before = times(tmp_path / "out"), os.stat(tmp_path / "out").st_mtime_ns
    calls = []
    report = run(source, tmp_path / "out", progress=lambda *args: calls.append(args))
    assert (times(tmp_path / "out"), os.stat(tmp_path / "out").st_mtime_ns) == before
    assert not calls and report.converted


def test_a_lost_file_is_written_again(source, tmp_path):
    run(source, tmp_path / "out")
    expected = contents(tmp_path / "out")
    for name in ("model-00002-of-00003.safetensors", "tokenizer.json"):
        assert (tmp_path / "out" / name).exists(), sorted(expected)
        (tmp_path / "out" / name).unlink()
        run(source, tmp_path / "out")
        assert contents(tmp_path / "out") == expected


def test_progress_counts_every_byte_once(source, tmp_path):
    calls = []
    run(source, tmp_path / "out", progress=lambda *args: calls.append(args))
    done, totals, names = zip(*calls, strict=True)
    assert (
        list(done) == sorted(done)
        and done[-1] == totals[0]
        and {*totals} == {totals[0]}
    )
    assert len(calls) > 2 * len({*names})
    (tmp_path / "out/model-00001-of-00003.safetensors").unlink()
    later = []
    run(source, tmp_path / "out", progress=lambda *args: later.append(args))
    assert later[0][0] > done[0] and later[-1][0] == done[-1]


@pytest.mark.parametrize("when", ["reserving", "writing"])
def test_a_full_disk_leaves_what_was_finished(source, tmp_path, monkeypatch, when):
    real = os.posix_fallocate if when == "reserving" else os.pwrite
    before = contents(source)

    class FullDisk(StoppingOS):
        def __getattr__(self, name):
            wanted = "posix_fallocate" if when == "reserving" else "pwrite"
            if name != wanted:
                return getattr(os, name)

            def call(*args):
                self.calls += 1
                if list((tmp_path / "out").glob("*.safetensors")):
                    raise OSError(errno.ENOSPC, "No space left on device")
                return real(*args)

            return call

    monkeypatch.setattr(jmx8.checkpoint.shards, "os", FullDisk(0))
    with pytest.raises(CheckpointError, match=r"No space left.*whole and stay.*again"):
        run(source, tmp_path / "out")
    monkeypatch.setattr(jmx8.checkpoint.shards, "os", os)
    found = contents(tmp_path / "out")
    assert "model-00001-of-00003.safetensors" in found
    assert not any(name.endswith(".partial") for name in found)
    run(source, tmp_path / "out")
    run(source, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert found.items() <= contents(tmp_path / "out").items()
    assert contents(source) == before


def test_a_disk_that_is_too_small_is_noticed_first(source, tmp_path, monkeypatch):
    class SmallDisk:
        def __getattr__(self, name):
            return getattr(os, name)

        def statvfs(self, path):
            status = os.statvfs(path)
            return os.statvfs_result((*status[:4], 1, *status[5:]))

    monkeypatch.setattr(jmx8.checkpoint.output, "os", SmallDisk())
    with pytest.raises(CheckpointError, match="Nothing was begun"):
        run(source, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_other_folders_are_refused(source, tmp_path):
    before = contents(source)
    for folder in (source, source / "out", source / ".." / "in"):
        with pytest.raises(CheckpointError, match="which is only read"):
            run(source, folder)
    (tmp_path / "used").mkdir()
    (tmp_path / "used/notes.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"holds 'notes\.txt' already"):
        run(source, tmp_path / "used")
    with pytest.raises(CheckpointError, match=r"File exists|Not a directory"):
        run(source, tmp_path / "used/notes.txt")
    assert contents(source) == before


def test_other_output_is_refused(source, tmp_path):
    run(source, tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(CheckpointError, match="made with another format;"):
        run(source, tmp_path / "out", format="mxfp8")
    with pytest.raises(CheckpointError, match="another choice of layers;"):
        run(source, tmp_path / "out", skip="*/k_proj")
    with pytest.raises(CheckpointError, match="another shard_bytes;"):
        quantize_checkpoint(source, tmp_path / "out")
    (source / "tokenizer.json").write_text('{"another": 1}')
    with pytest.raises(CheckpointError, match="another source;"):
        run(source, tmp_path / "out")
    assert contents(tmp_path / "out") == before
    (tmp_path / "out/.jmx8.json").write_text(json.dumps({"job": 3}))
    with pytest.raises(CheckpointError, match="holds other output"):
        run(source, tmp_path / "out")


def test_two_at_once_are_refused(source, tmp_path):
    (tmp_path / "out").mkdir()
    descriptor = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(CheckpointError, match="another process is writing"):
        run(source, tmp_path / "out")
    os.close(descriptor)
    run(source, tmp_path / "out")


def test_verify_finds_one_wrong_bit(source, tmp_path):
    run(source, tmp_path / "out", verify=True)
    shard = tmp_path / "out/model-00002-of-00003.safetensors"
    content = bytearray(shard.read_bytes())
    content[-7] ^= 4
    shard.write_bytes(content)
    run(source, tmp_path / "out")  # without, names and headers count
    with pytest.raises(
        CheckpointError, match=rf"{shard.name}.*differs from its source"
    ):
        run(source, tmp_path / "out", verify=True)
    content[-7] ^= 4
    shard.write_bytes(content)
    config = tmp_path / "out/config.json"
    config.write_text(config.read_text().replace("MXFP8", "MXFP4"))
    with pytest.raises(CheckpointError, match=r"config\.json: differs"):
        run(source, tmp_path / "out", verify=True)


def test_files_are_those_of_the_reference_implementation(source, tmp_path):
    safetensors = pytest.importorskip("safetensors")
    run(source, tmp_path / "out")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    names, total = {}, 0
    for path in sorted((tmp_path / "out").glob("*.safetensors")):
        with safetensors.safe_open(path, "numpy") as file:
            assert file.metadata() == {"format": "pt"}
            names |= dict.fromkeys(file.keys(), path.name)
            for name in file.keys():
                if name.endswith("weight_scale"):
                    assert file.get_tensor(name).dtype == np.uint8
        header = int.from_bytes(path.read_bytes()[:8], "little")
        assert header % 8 == 0
        total += path.stat().st_size - 8 - header
    assert index == {"metadata": {"total_size": total}, "weight_map": names}

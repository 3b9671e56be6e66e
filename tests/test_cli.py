"""The command line, run as a user runs it: in a process of its own."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from jmx8.data import HELDOUT_TEXT, TINY_QWEN3_MOE
from jmx8.kernels.flashinfer.modules import cached_path, NORM


def jmx8(*args, **kwargs):
    return subprocess.run(
        [sys.executable, "-m", "jmx8", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"COLUMNS": "120", "NO_COLOR": "1"},
        **kwargs,
    )


def succeed(*args, **kwargs):
    result = jmx8(*args, **kwargs)
    assert result.returncode == 0, result.stderr
    assert "\x1b" not in result.stdout + result.stderr  # plain when not a terminal
    return result.stdout


def test_help_names_every_command():
    text = succeed("--help")
    for command in ("demo", "generate", "inspect", "doctor", "build-kernels"):
        assert command in text
        assert "Usage" in succeed(command, "--help")
    assert succeed("--version").strip() == "0.1.0"


@pytest.mark.parametrize("framework", ["equinox", "nnx"])
def test_demo_shows_the_whole_job(framework):
    text = succeed("demo", "--windows", "4", "--framework", framework)
    for part in ("memory", "BF16", "MXFP8 W8A16", "MXFP8 W8A8", "continues the text"):
        assert part in text
    assert "dB  layers/" in text
    # Which backend that is, the device decides.
    assert re.search(r"\bmx_moe\(.* -> \w+: \w+", text)


def test_generate_is_reproducible_and_reads_stdin():
    options = ("-n", "12", "--temperature", "0.8", "--top-k", "50", "--seed", "3")
    text = succeed("generate", "import os\n", *options)
    assert text.strip()
    assert succeed("generate", "-", *options, input="import os\n") == text
    assert succeed("generate", "import os\n", *options, "--framework", "nnx") == text
    assert succeed("generate", "import os\n", *options[:-1], "4") != text


def test_inspect_tells_what_a_checkpoint_is():
    lines = succeed("inspect", "--sort", "bytes", "--limit", "2").splitlines()
    assert "qwen3_moe, format: none" in lines[0] and "parameters" in lines[1]
    assert lines[-3].split() == ["layer", "parameters", "quantized", "bytes"]
    facts = json.loads(succeed("inspect", "--json"))
    assert facts["num_bytes"] == 2 * facts["num_parameters"]
    assert {kind["stored_as"] for kind in facts["kinds"]} == {"bfloat16"}
    assert facts["num_files"] == 1 and not facts["problems"]


def test_inspect_does_not_wait_for_jax():
    code = """if True:
        import sys
        from jmx8.cli import app
        app(["inspect"], standalone_mode=False)
        print([m for m in ("jax", "equinox", "rich") if m in sys.modules])
    """
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.stdout.splitlines()[-1] == "[]", out.stderr


def test_inspect_measures_what_conversion_loses():
    table = succeed("inspect", "--sort", "sqnr", "--limit", "3")
    assert table.splitlines()[0].split()[:3] == ["tensor", "shape", "before"]
    assert "tensors converted to MXFP8" in table
    options = ("--json", "--measure", "--sort", "bytes", "--only", "*mlp*")
    facts = json.loads(succeed("inspect", *options))
    sizes = [row["bytes_after"] for row in facts["rows"]]
    assert sizes == sorted(sizes, reverse=True)
    assert {row["action"] for row in facts["rows"]} == {"converted", "kept"}
    assert facts["bytes_after"] < facts["bytes_before"]


def test_inspect_compares_two_checkpoints():
    text = succeed("inspect", "--compare", str(TINY_QWEN3_MOE), "--limit", "1")
    assert text.splitlines()[1].split()[-2:] == ["equal", "0"]
    equal, _, total, *_ = text.splitlines()[-1].split()
    assert equal == total and int(total) > 10
    facts = json.loads(succeed("inspect", "--compare", str(TINY_QWEN3_MOE), "--json"))
    assert facts["differing_layers"] == {}
    assert {row["sqnr_db"] for row in facts["weights"]} == {"inf"}


def test_inspect_sorts_by_error():
    facts = json.loads(succeed("inspect", "--json", "--sort", "sqnr"))
    errors = [row["sqnr_db"] for row in facts["rows"] if row["sqnr_db"] is not None]
    assert errors == sorted(errors) and len(errors) == facts["num_converted"]


def test_doctor_tells_which_backends_run():
    text = succeed("doctor")
    assert "compute capability" in text and "mx_moe_w8a8" in text
    assert re.search(r"\nsm90 kernels +(built|from the wheel|compiled at|no: )", text)
    facts = json.loads(succeed("doctor", "--json"))
    assert {"op": "mx_matmul", "backend": "xla", "problem": None} in facts["backends"]
    if not facts["devices"][0].startswith("gpu"):
        for row in facts["backends"]:
            assert (row["problem"] is None) == (row["backend"] == "xla"), row
    adapter = facts["ffi_adapter"]["answer"]
    assert adapter.startswith(("built, ", "compiled at", "no: the FFI bridge")), adapter


def test_build_kernels_skips_what_is_built(tmp_path, monkeypatch):
    monkeypatch.setenv("JMX8_CACHE_DIR", str(tmp_path))
    module = cached_path(NORM, "9.0a")
    module.parent.mkdir(parents=True)
    module.touch()
    text = succeed("build-kernels", "--arch", "9.0", "--module", "norm")
    assert "already built" in text and text.split()[:2] == ["norm", "9.0a"]


@pytest.fixture
def folder(tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(TINY_QWEN3_MOE, copy)
    return copy


def break_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def break_config(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["num_experts_per_tok"]
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    "damage, words",
    [
        (break_weights, ["model.safetensors"]),
        (break_config, ["config.json", "num_experts_per_tok"]),
        (lambda f: (f / "config.json").write_text("{"), ["config.json"]),
        (lambda f: (f / "tokenizer.json").unlink(), ["tokenizer.json", "no such file"]),
        (lambda f: (f / "model.safetensors").unlink(), ["holds no *.safetensors"]),
    ],
)
def test_bad_folder_is_one_line_and_exit_code_2(folder, damage, words):
    damage(folder)
    result = jmx8("generate", "x", "--model", folder, "-n", "1")
    assert result.returncode == 2
    assert result.stdout == "" and "Traceback" not in result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("jmx8: ") and all(word in line for word in words)


@pytest.mark.parametrize(
    "args, words",
    [
        (("generate", "x", "--temperature", "-1"), "temperature"),
        (("generate", "x", "-n", "100000"), "512"),
        (("inspect", "--only", "*typo*"), "typo"),
        (("inspect", "--sort", "size"), "sqnr"),
        (("build-kernels", "--arch", "Hopper"), "expected one like 10.0a"),
        (("build-kernels", "--arch", "9.0", "--module", "typo"), "typo"),
        (("demo", "--text", HELDOUT_TEXT.with_name("missing.txt")), "missing.txt"),
    ],
)
def test_bad_option_is_exit_code_2_without_traceback(args, words):
    result = jmx8(*args)
    assert result.returncode == 2 and result.stdout == ""
    assert words in result.stderr and "Traceback" not in result.stderr

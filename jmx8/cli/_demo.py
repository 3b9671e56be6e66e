"""`jmx8 demo`: the main job from end to end, on the checkpoint that ships with jmx8."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.table import Table

from .._device import default_device
from .._options import Framework
from .._text import format_bytes
from ..checkpoint import load
from ..convert import Report
from ..generation import generate, perplexity
from ..models import LanguageModel
from ..nn import with_activations
from ..ops._dispatch import explain
from ._console import load_tokenizer, loading_bar, out, working


_WINDOW = 256
_BATCH_SIZE = 4
_WRITTEN = 32  # tokens that are written for the speed


def run_demo(
    folder: Path, text: Path, *, num_windows: int, framework: Framework, quiet: bool
) -> None:
    """Loads a checkpoint twice, compares the two models, and lets one write."""
    tokenizer = load_tokenizer(folder)
    tokens = tokenizer.encode(text.read_text()).ids[: num_windows * _WINDOW]

    device = default_device()
    out.print(f"checkpoint   {folder.name}")
    out.print(f"device       {device.platform} ({device.device_kind})")
    with loading_bar("loading bfloat16", quiet) as advance:
        baseline = load(folder, framework=framework, dtype="bfloat16", progress=advance)
    with loading_bar("converting to MXFP8", quiet) as advance:
        converted, report = load(
            folder, framework=framework, progress=advance, return_report=True
        )
    _print_memory(report)

    models = {
        "BF16": baseline,
        "MXFP8 W8A16": with_activations(converted, "bf16"),
        "MXFP8 W8A8": with_activations(converted, "mxfp8"),
    }
    table = _compare(models, tokens, text.name, quiet)
    out.print()
    out.print(table)
    _print_continuation(models["MXFP8 W8A16"], tokenizer, tokens)
    _print_worst(report)
    _print_backends(converted)


def _print_memory(report: Report) -> None:
    before, after = report.bytes_before, report.bytes_after
    linear = report.converted
    linear_before = sum(row.bytes_before for row in linear)
    linear_after = sum(row.bytes_after for row in linear)
    out.print(
        f"memory       {format_bytes(before)} -> {format_bytes(after)} "
        f"({after / before:.0%}); the {len(linear)} converted tensors "
        f"{format_bytes(linear_before)} -> {format_bytes(linear_after)} "
        f"({linear_after / linear_before:.0%})"
    )


def _compare(
    models: Mapping[str, LanguageModel], tokens: list[int], text_name: str, quiet: bool
) -> Table:
    """Measures perplexity and speed of each model."""
    num_tokens = len(tokens) // _WINDOW * _WINDOW
    table = Table(title=f"{text_name}, {num_tokens:,} held-out tokens", box=None)
    table.add_column("")
    for column in ("perplexity", "against BF16", "tokens/s read", "tokens/s written"):
        table.add_column(column, justify="right")
    reference = None
    for name, model in models.items():
        with working(f"measuring {name}", quiet):
            value, read, write = _measure(model, tokens)
        reference = value if reference is None else reference
        table.add_row(
            name,
            f"{value:.4f}",
            f"{value / reference - 1:+.2%}",
            f"{num_tokens / read:,.0f}",
            f"{_WRITTEN / write:,.0f}",
        )
    return table


def _measure(model: LanguageModel, tokens: list[int]) -> tuple[float, float, float]:
    """Returns the perplexity, and the seconds to read the text and to write one."""
    read = lambda: perplexity(model, tokens, window=_WINDOW, batch_size=_BATCH_SIZE)
    write = lambda: generate(model, [tokens[:32]], max_new_tokens=_WRITTEN)
    write()
    return read(), _seconds(read), _seconds(write)


def _seconds(function: Callable[[], Any]) -> float:
    """Returns how long a call takes that has been compiled before."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _print_continuation(
    model: LanguageModel, tokenizer: Any, tokens: list[int]
) -> None:
    prompt = tokens[: _WINDOW // 4]
    (continuation,) = generate(model, [prompt], max_new_tokens=64)
    out.print("\nMXFP8 W8A16 continues the text, taking the likeliest token each time:")
    out.print(tokenizer.decode(prompt), style="dim", markup=False)
    out.print("---8<---")
    out.print(tokenizer.decode(continuation), markup=False)


def _print_worst(report: Report) -> None:
    out.print("\nlargest conversion errors (signal to quantization noise):")
    for row in report.worst(5):
        assert row.statistics is not None
        out.print(f"  {row.statistics.sqnr_db:5.1f} dB  {row.path}")


def _print_backends(model: LanguageModel) -> None:
    tokens = jax.ShapeDtypeStruct((_BATCH_SIZE, _WINDOW), jnp.int32)
    out.print("\nwhat ran, and why:")
    out.print(str(explain(lambda m, t: m(t), model, tokens)), markup=False)

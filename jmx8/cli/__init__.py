"""The command line: `jmx8 demo | generate | quantize | inspect | ...`.

What a command needs is imported when it runs: JAX and the console take longer than
`inspect` takes for a large checkpoint.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from .._options import Activations, FormatName, Framework, LoadDtype, SHARD_BYTES
from ..data import HELDOUT_TEXT, TINY_QWEN3_MOE
from ._inspect import print_description, SortKey


app = typer.Typer(
    help="MXFP8 inference for JAX: BF16 checkpoints in, MXFP8 models out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ModelFramework = Annotated[
    Framework, typer.Option(help="What the model is made of; same bits.")
]
Skip = Annotated[
    list[str],
    typer.Option(help="Keep layers of this path in BF16; glob or re:..., repeatable."),
]
Only = Annotated[
    list[str], typer.Option(help="Convert only layers of this path; repeatable.")
]
Requantize = Annotated[
    bool,
    typer.Option(
        "--requantize",
        help="Round FP8 blocks anew whose scales are not powers of two.",
    ),
]


def main() -> None:
    """Runs the command line. Bad input ends with one message and exit code 2."""
    try:
        app()
    except (ValueError, OSError) as error:
        from ._console import err

        err.print(f"jmx8: {error}", style="red", markup=False)
        sys.exit(2)


@app.callback(invoke_without_command=True)
def root(
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version.")
    ] = False,
) -> None:
    if show_version:
        from importlib.metadata import version

        print(version("jmx8"))
        raise typer.Exit


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(help="Checkpoint folder.")] = TINY_QWEN3_MOE,
    text: Annotated[Path, typer.Option(help="Text to measure on.")] = HELDOUT_TEXT,
    windows: Annotated[
        int, typer.Option(min=1, help="How many windows of 256 tokens to measure.")
    ] = 32,
    framework: ModelFramework = "equinox",
    quiet: Quiet = False,
) -> None:
    """Convert a checkpoint and compare it with BF16: memory, quality, speed."""
    from ._demo import run_demo

    run_demo(folder, text, num_windows=windows, framework=framework, quiet=quiet)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads stdin.")],
    folder: Annotated[
        Path, typer.Option("--model", "-m", help="Checkpoint folder.")
    ] = TINY_QWEN3_MOE,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1)] = 128,
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token.")
    ] = 0.0,
    top_k: Annotated[int | None, typer.Option()] = None,
    top_p: Annotated[float | None, typer.Option()] = None,
    seed: Annotated[int, typer.Option()] = 0,
    framework: ModelFramework = "equinox",
    dtype: LoadDtype = "mxfp8",
    activations: Annotated[
        Activations, typer.Option(help="bf16 is W8A16, mxfp8 is W8A8.")
    ] = "auto",
    skip: Skip = [],  # noqa: B006  (typer copies it)
    only: Only = [],  # noqa: B006
    requantize: Requantize = False,
    quiet: Quiet = False,
) -> None:
    """Continue a text. Nothing is added to the prompt, no chat template either."""
    from ..checkpoint import load
    from ..generation import generate as generate_tokens
    from ._console import load_tokenizer, loading_bar
    from ._generate import TextPrinter

    tokenizer = load_tokenizer(folder)
    with loading_bar("loading", quiet) as advance:
        model = load(
            folder,
            framework=framework,
            dtype=dtype,
            activations=activations,
            skip=skip or None,
            only=only or None,
            requantize=requantize,
            progress=advance,
        )
    text = sys.stdin.read() if prompt == "-" else prompt
    printer = TextPrinter(tokenizer)
    generate_tokens(
        model,
        [tokenizer.encode(text).ids],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop_tokens=model.config.eos_token_id,
        callback=lambda _, token: printer.add(token),
    )
    printer.finish()


@app.command()
def quantize(
    source: Annotated[Path, typer.Argument(help="Checkpoint folder; only read.")],
    folder: Annotated[
        Path, typer.Argument(help="Folder to write; new, or begun by the same command.")
    ],
    form: Annotated[
        FormatName, typer.Option("--format", "-f", help="mxfp8 is that of SGLang.")
    ] = "modelopt",
    skip: Skip = [],  # noqa: B006
    only: Only = [],  # noqa: B006
    requantize: Annotated[
        bool,
        typer.Option(
            "--requantize", help="Round FP8 anew whose scales are no powers of two."
        ),
    ] = False,
    shard_bytes: Annotated[
        int, typer.Option(min=1, help="Begin the next file after so many bytes.")
    ] = SHARD_BYTES,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read everything again and compare.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Write a checkpoint in MXFP8, or in MXFP8 of another format, byte for byte.

    Run the same command again after an interruption: it goes on after the last whole
    file.
    """
    from ..checkpoint import quantize_checkpoint
    from ._console import loading_bar

    with loading_bar("converting", quiet) as advance:
        report = quantize_checkpoint(
            source,
            folder,
            format=form,
            skip=skip or None,
            only=only or None,
            requantize=requantize,
            shard_bytes=shard_bytes,
            verify=verify,
            progress=advance,
        )
    if not quiet:
        print(report.summary())


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="Checkpoint folder.")] = TINY_QWEN3_MOE,
    sort: Annotated[
        SortKey, typer.Option(help="sqnr puts the worst first, exponent the widest.")
    ] = "name",
    limit: Annotated[
        int | None, typer.Option("--limit", "-n", min=1, help="Show so many rows.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Convert, and tell what that loses.")
    ] = False,
    compare: Annotated[
        Path | None,
        typer.Option(help="Checkpoint to compare with: SQNR, layers that differ."),
    ] = None,
    skip: Skip = [],  # noqa: B006
    only: Only = [],  # noqa: B006
    requantize: Requantize = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Tell what a checkpoint is: format, sizes, layers. No weight is read for it.

    With --measure, or what needs it (--skip, --only, --sort by sqnr, amax or exponent),
    all are read and converted, and every tensor is listed with its SQNR.
    """
    takes_weights = measure or skip or only or sort not in ("name", "bytes")
    if compare is None and not takes_weights:
        print_description(folder, sort, limit, as_json)
        return
    from ._measure import format_report, inspect_folder, print_comparison, sort_report

    if compare is not None:
        print_comparison(folder, compare, limit, as_json, quiet)
        return
    report = inspect_folder(
        folder, skip=skip, only=only, requantize=requantize, quiet=quiet
    )
    shown = sort_report(report, sort, limit)
    print(format_report(report, shown, as_json))


@app.command("build-kernels")
def build_kernels_command(
    arch: Annotated[
        str, typer.Option(help="What to build for, e.g. 10.0a for a B200.")
    ],
    module: Annotated[
        list[str],
        typer.Option(help="Build only this; repeatable. Default: what the ops use."),
    ] = [],  # noqa: B006
    model: Annotated[
        Path | None,
        typer.Option(help="Checkpoint folder to build the cuTile kernels for."),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", min=1, help="Compilers at a time.")
    ] = None,
) -> None:
    """Compile GPU kernels ahead, also on a machine that has no GPU.

    What is built lands in the cache (JMX8_CACHE_DIR, else ~/.cache/jmx8). A machine
    that has this folder needs no compiler, neither FlashInfer nor torch.
    """
    from ._build_kernels import build_kernels

    raise typer.Exit(build_kernels(arch, module, jobs, model=model))


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Show devices, versions, and which backends can run here and why not."""
    import json

    from ._doctor import diagnose, format_diagnosis

    facts = diagnose()
    print(json.dumps(facts, indent=1) if as_json else format_diagnosis(facts))

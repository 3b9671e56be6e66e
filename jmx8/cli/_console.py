"""What the commands share: the console, the progress bar, and reading a folder."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from tokenizers import Tokenizer

from ..checkpoint.errors import CheckpointError


# Results go to stdout, everything else to stderr, so that a result can be piped.
out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


class _SpeedColumn(ProgressColumn):
    """Bytes per second, lately."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed / 1e9:.2f} GB/s")


@contextlib.contextmanager
def loading_bar(label: str, quiet: bool) -> Iterator[Callable[[int, int, str], None]]:
    """Shows how far a checkpoint has been read, and how fast; on a terminal only."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        _SpeedColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("[dim]{task.fields[name]}"),
    )
    hidden = quiet or not err.is_terminal
    with Progress(*columns, console=err, disable=hidden, transient=True) as bar:
        task = bar.add_task(label, total=None, name="")

        def advance(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, name=name)

        yield advance


def working(label: str, quiet: bool) -> contextlib.AbstractContextManager[Any]:
    """Shows that something takes a while; on a terminal only."""
    if quiet or not err.is_terminal:
        return contextlib.nullcontext()
    return err.status(label)


def load_tokenizer(folder: Path) -> Tokenizer:
    """Reads `tokenizer.json`.

    Raises:
        CheckpointError: If it is missing or broken.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; the text needs a tokenizer")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001  (the library raises plain Exception)
        raise CheckpointError(f"{path}: not a tokenizer: {error}") from None

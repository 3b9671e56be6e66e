"""Text to train on: the sources and the documentation of Python's standard library.

    python -m benchmarks.stdlib_text build/corpus.json

collects it from the running interpreter, for a machine that has another one.
"""

import dataclasses
import importlib
import json
import os
import platform
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers


END_OF_TEXT = "<|endoftext|>"

# Held out whole: self-contained modules, half code and half prose, without a notice
# other than Python's own.
HELD_OUT = ("graphlib.py", "heapq.py", "queue.py", "sched.py", "statistics.py")
# Tests, generated tables, third-party packages and what is not part of every Python.
_SKIPPED_FOLDERS = frozenset(
    "__pycache__ dist-packages encodings ensurepip idle_test lib2to3 pydoc_data "
    "site-packages test tests turtledemo".split()
)
_SKIPPED_PREFIXES = ("config-", "_sysconfigdata")
_MAX_FILE_BYTES = 300_000


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Texts to train on, the held-out one, and the version of Python they are from."""

    python: str
    train: list[str]
    heldout: str


def stdlib_corpus() -> Corpus:
    """Reads the standard library of the running interpreter."""
    root = Path(sysconfig.get_path("stdlib"))
    texts = {file.relative_to(root).as_posix(): text for file, text in _sources(root)}
    heldout = "\n\n".join(texts.pop(name) for name in HELD_OUT)
    topics = importlib.import_module("pydoc_data.topics").topics
    documentation = [topics[name].strip() + "\n" for name in sorted(topics)]
    return Corpus(platform.python_version(), [*texts.values(), *documentation], heldout)


def _sources(root: Path) -> Iterator[tuple[Path, str]]:
    """Yields the Python files under a folder in one fixed order."""
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(
            name
            for name in subfolders
            if name not in _SKIPPED_FOLDERS and not name.startswith(_SKIPPED_PREFIXES)
        )
        for name in sorted(files):
            file = Path(folder, name)
            if file.suffix != ".py" or name.startswith(_SKIPPED_PREFIXES):
                continue
            if 0 < file.stat().st_size <= _MAX_FILE_BYTES:
                yield file, file.read_text("utf-8")


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Returns a byte-level BPE tokenizer whose token 0 is `END_OF_TEXT`."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: tokenizers.Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """Returns the tokens of all texts, each preceded by `END_OF_TEXT`."""
    tokens: list[int] = []
    for encoding in tokenizer.encode_batch(texts):
        tokens += [tokenizer.token_to_id(END_OF_TEXT), *encoding.ids]
    return np.array(tokens, np.int32)


if __name__ == "__main__":
    text = json.dumps(dataclasses.asdict(stdlib_corpus()), indent=1)
    Path(sys.argv[1]).write_text(text, "utf-8")

"""What is in a Hugging Face checkpoint folder: its config and its tensors, unread."""

import dataclasses
import os
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

from .errors import CheckpointError, read_json_object
from .formats import Format, MODELOPT_FILE, recognize
from .reader import SafetensorsFile, TensorInfo


_CONFIG = "config.json"
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MAX_NAME_BYTES = 255  # of every file system in use


class Source(NamedTuple):
    """One tensor on disk.

    Attributes:
        file: The file that holds it.
        info: What that file's header says about it.
    """

    file: SafetensorsFile
    info: TensorInfo

    def __str__(self) -> str:
        return f"{self.file.path}: {self.info.name}"


@dataclasses.dataclass(frozen=True)
class CheckpointFolder:
    """A checkpoint folder whose headers have been checked.

    Attributes:
        path: The folder.
        config: The content of its `config.json`.
        sources: Every tensor by name, ordered as the data lies on disk.
        modelopt: The content of its `hf_quant_config.json`, None if it has none.
    """

    path: Path
    config: dict[str, Any]
    sources: dict[str, Source]
    modelopt: dict[str, Any] | None = None

    @property
    def config_path(self) -> Path:
        return self.path / _CONFIG

    @property
    def format(self) -> Format | None:
        """The format that its configs name, None if they name none.

        Raises:
            CheckpointError: If they name one that is not read here.
        """
        found = recognize(self.config, self.config_path)
        if found is None and self.modelopt is not None:
            found = recognize(self.modelopt, self.path / MODELOPT_FILE)
        return found


def open_folder(folder: Path | str) -> CheckpointFolder:
    """Opens a Hugging Face checkpoint folder and checks it against itself.

    The tensors are those of the files that `model.safetensors.index.json` names. In a
    folder without an index they are those of `model.safetensors`; or of a whole set of
    `*-00001-of-00003.safetensors`; or of all `*.safetensors` files together. Files that
    an index or a set leaves out are not looked at. Nothing is ever unpickled.

    Args:
        folder: Path of the folder.

    Returns:
        Its config and where each tensor lies. No tensor has been read.

    Raises:
        CheckpointError: If anything is missing, malformed or contradictory. All files
            lie in the folder itself. Links that lead out of it are refused, but for
            those of Hugging Face's download cache, from `snapshots/*` to `blobs`.
    """
    path = Path(folder)
    if path.is_file():
        raise CheckpointError(f"{path}: needs a folder, got a file{_advice([path])}")
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder")
    config = read_json_object(path_inside(path, _CONFIG))
    modelopt = None
    if (path / MODELOPT_FILE).exists():
        modelopt = read_json_object(path_inside(path, MODELOPT_FILE))
    if (path / _INDEX).exists():
        sources = _open_indexed(path)
    else:
        sources = _open_all(path, _files_without_index(path))
    return CheckpointFolder(path, config, sources, modelopt)


def path_inside(folder: Path, name: str) -> Path:
    """Returns the path of a file of the folder, or raises if a link leads out of it."""
    if not os.path.islink(folder / name):
        return folder / name
    root = os.path.realpath(folder)
    target = Path(os.path.realpath(folder / name))
    parent = Path(root).parent
    allowed = [Path(root)]
    if parent.name == "snapshots":
        allowed.append(parent.parent / "blobs")
    if not any(target.is_relative_to(place) for place in allowed):
        raise CheckpointError(
            f"{folder / name}: a link that leads out of the folder, to {target}. Put "
            "the file itself there, or pass the folder that it is in"
        )
    return folder / name


def _files_without_index(path: Path) -> list[str]:
    """Returns the names of the files that make up a checkpoint without an index."""
    if (path / _SINGLE).exists():
        return [_SINGLE]
    found = sorted(file.name for file in path.glob("*.safetensors"))
    if not found:
        advice = _advice(sorted(path.iterdir()))
        raise CheckpointError(f"{path}: holds no *.safetensors file{advice}")
    sets: dict[tuple[str, int], list[str]] = {}
    for name in found:
        match = re.fullmatch(r"(.*-)\d{5}-of-(\d{5})\.safetensors", name)
        if match is not None:
            sets.setdefault((match[1], int(match[2])), []).append(name)
    if len(sets) > 1:
        raise CheckpointError(
            f"{path}: holds {len(sets)} sets of shards and no {_INDEX} that says which "
            "is meant"
        )
    for (prefix, count), names in sets.items():
        wanted = (f"{prefix}{i:05}-of-{count:05}.safetensors" for i in _first(count))
        missing = [name for name in wanted if name not in names]
        if missing or not count:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            name = missing[0] if missing else f"{prefix}*"
            raise CheckpointError(f"{path / name}: missing shard{more}")
        return names
    return found


def _first(count: int) -> range:
    return range(1, count + 1)


def _advice(files: list[Path]) -> str:
    """Returns how to convert what torch has pickled, if that is all there is."""
    pickled = [file for file in files if file.suffix in _PICKLED]
    if not pickled:
        return ""
    return (
        f"; {pickled[0].name} is a pickle, which can run any code and is never "
        f"opened here. If you trust it: {convert_command(pickled[0].parent)}"
    )


def convert_command(folder: Path) -> str:
    """Returns the command that writes a folder's pickled weights as safetensors."""
    return (
        'python -c "import sys, transformers; '
        "transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype='auto')"
        f'.save_pretrained(sys.argv[1])" {shlex.quote(str(folder))}'
    )


def _open_all(path: Path, names: list[str]) -> dict[str, Source]:
    """Returns the tensors of files, which must all have different names."""
    sources: dict[str, Source] = {}
    problems: list[str] = []
    for name in names:
        try:
            file = SafetensorsFile(path_inside(path, name))
        except CheckpointError as error:
            problems.extend(error.problems)
            continue
        for tensor, info in file.tensors.items():
            if tensor in sources:
                problems.append(
                    f"{file.path}: {tensor}: is in {sources[tensor].file.path.name} "
                    f"too, and there is no {_INDEX} that says which is meant"
                )
            sources[tensor] = Source(file, info)
    if problems:
        raise CheckpointError(problems)
    return sources


def _open_indexed(path: Path) -> dict[str, Source]:
    """Returns the tensors of an index and its shards, which must agree both ways."""
    index = path / _INDEX
    weight_map = read_json_object(path_inside(path, _INDEX)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index}: weight_map must map tensor names to file names"
        )
    problems = _misplaced_files(index, weight_map)
    if problems:
        raise CheckpointError(problems)
    files = {}
    for name in sorted(set(weight_map.values())):
        shard = path / name
        try:
            if not shard.exists():
                problems.append(f"{shard}: missing shard, named in {index}")
                continue
            files[name] = SafetensorsFile(path_inside(path, name))
        except CheckpointError as error:
            problems.extend(error.problems)
    for tensor, name in weight_map.items():
        if name in files and tensor not in files[name].tensors:
            problems.append(
                f"{path / name}: {tensor}: not in this file, in which {index} places it"
            )
    sources = {}
    for name, file in files.items():
        for tensor, info in file.tensors.items():
            if weight_map.get(tensor) == name:
                sources[tensor] = Source(file, info)
                continue
            place = weight_map.get(tensor, "no file")
            problems.append(f"{file.path}: {tensor}: {index} places it in {place}")
    if problems:
        raise CheckpointError(problems)
    return sources


def _misplaced_files(index: Path, weight_map: dict[str, Any]) -> list[str]:
    """Returns a problem per entry that is not the plain name of a file."""
    names = {name for name in weight_map.values() if isinstance(name, str)}
    plain = {name for name in names if _is_plain_name(name)}
    return [
        f"{index}: {tensor}: {name!r} is not the plain name of a file in this folder"
        for tensor, name in weight_map.items()
        if not isinstance(name, str) or name not in plain
    ]


def _is_plain_name(name: str) -> bool:
    # Backslashes and colons separate on Windows; a NUL no system can open.
    if name in ("", ".", "..") or any(c in name for c in "/\\:\0"):
        return False
    try:
        return len(os.fsencode(name)) <= _MAX_NAME_BYTES
    except UnicodeEncodeError:  # a lone surrogate
        return False

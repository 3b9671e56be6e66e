"""What is in a Hugging Face checkpoint folder: its config and its tensors, unread."""

import dataclasses
from pathlib import Path
from typing import Any

from .errors import CheckpointError, read_json_object
from .reader import SafetensorsFile, TensorInfo


_CONFIG = "config.json"
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


@dataclasses.dataclass(frozen=True)
class Source:
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
    """

    path: Path
    config: dict[str, Any]
    sources: dict[str, Source]

    @property
    def config_path(self) -> Path:
        return self.path / _CONFIG


def open_folder(folder: Path | str) -> CheckpointFolder:
    """Opens a Hugging Face checkpoint folder and checks it against itself.

    The tensors are those of the files that `model.safetensors.index.json` names. In a
    folder without an index they are those of `model.safetensors`, or of the only
    `*.safetensors` file. Files that the index does not name are not looked at.

    Args:
        folder: Path of the folder.

    Returns:
        Its config and where each tensor lies. No tensor has been read.

    Raises:
        CheckpointError: If anything is missing, malformed or contradictory. An index
            may name files in this folder only; a symbolic link that lies there is
            followed, as Hugging Face's download cache consists of them.
    """
    path = Path(folder)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder")
    config = read_json_object(path / _CONFIG)
    if (path / _INDEX).exists():
        return CheckpointFolder(path, config, _open_indexed(path))
    file = SafetensorsFile(_single_file(path))
    sources = {name: Source(file, info) for name, info in file.tensors.items()}
    return CheckpointFolder(path, config, sources)


def _single_file(path: Path) -> Path:
    if (path / _SINGLE).exists():
        return path / _SINGLE
    found = sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if not found:
        raise CheckpointError(f"{path}: holds no *.safetensors file")
    names = ", ".join(file.name for file in found)
    raise CheckpointError(
        f"{path}: holds several safetensors files and no {_INDEX} that says which "
        f"belong together: {names}"
    )


def _open_indexed(path: Path) -> dict[str, Source]:
    """Returns the tensors of an index and its shards, which must agree both ways."""
    index = path / _INDEX
    weight_map = read_json_object(index).get("weight_map")
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
        if not shard.is_file():
            problems.append(f"{shard}: missing shard, named in {index}")
            continue
        try:
            files[name] = SafetensorsFile(shard)
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
    return [
        f"{index}: {tensor}: {name!r} is not the plain name of a file in this folder"
        for tensor, name in weight_map.items()
        if not _is_plain_name(name)
    ]


def _is_plain_name(name: Any) -> bool:
    # Backslashes and colons separate on Windows; a NUL no system can open.
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and not any(c in name for c in "/\\:\0")
    )

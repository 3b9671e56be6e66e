"""What a checkpoint is, from its config and the headers of its files alone."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .errors import CheckpointError
from .folder import CheckpointFolder, open_folder
from .formats import E8M0_DTYPES
from .stored import find_weights, Weight


_MXFP8 = "MXFP8"


@dataclass(frozen=True)
class Kind:
    """Weights that are alike but for the numbers in their names.

    Attributes:
        pattern: Their names, with `*` for a number.
        stored_as: How they are stored: "MXFP8", "FP8 128x128" or a dtype.
        shape: Their shape `[..., n, k]`.
        count: How many there are.
        num_bytes: Bytes of all of them, scales included.
    """

    pattern: str
    stored_as: str
    shape: tuple[int, ...]
    count: int
    num_bytes: int


@dataclass(frozen=True)
class Layer:
    """The weights that share a name up to the first number in it.

    Attributes:
        name: That part of the name, `model.layers.0`; for others the module's name.
        num_parameters: How many numbers they stand for.
        num_quantized: How many of those are quantized.
        num_bytes: Bytes on disk, scales included.
    """

    name: str
    num_parameters: int
    num_quantized: int
    num_bytes: int


@dataclass(frozen=True)
class Description:
    """What a checkpoint is.

    Attributes:
        path: The folder.
        model_type: The config's `model_type`, if it is a string.
        format: The name of the format that the config or the weights are in, "none", or
            "unknown".
        num_files: How many files its weights are in.
        kinds: What is stored how, in the order of the names.
        layers: The layers, likewise.
        problems: Why jmx8 does not read it. Each tensor is then a weight of its own.
    """

    path: str
    model_type: str | None
    format: str
    num_files: int
    kinds: tuple[Kind, ...]
    layers: tuple[Layer, ...]
    problems: tuple[str, ...] = ()

    @property
    def num_parameters(self) -> int:
        return sum(layer.num_parameters for layer in self.layers)

    @property
    def num_bytes(self) -> int:
        return sum(layer.num_bytes for layer in self.layers)

    def totals(self) -> dict[str, tuple[int, int]]:
        """Returns how many weights are stored how, and how many bytes they take."""
        result: dict[str, tuple[int, int]] = {}
        for kind in self.kinds:
            count, num_bytes = result.get(kind.stored_as, (0, 0))
            result[kind.stored_as] = count + kind.count, num_bytes + kind.num_bytes
        return result

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as values that `json.dumps` takes."""
        totals = {"num_parameters": self.num_parameters, "num_bytes": self.num_bytes}
        return asdict(self) | totals


def describe(folder: Path | str) -> Description:
    """Describes a checkpoint folder of any model without reading a weight.

    Args:
        folder: Path of the folder.

    Returns:
        What it is, be it read by jmx8 or not.

    Raises:
        CheckpointError: If files are missing, malformed or contradictory.
    """
    return describe_open(open_folder(folder))


def describe_open(checkpoint: CheckpointFolder) -> Description:
    """Describes a checkpoint whose headers have been read already."""
    problems: list[str] = []
    form, name = None, "none"
    try:
        form = checkpoint.format
    except CheckpointError as error:
        problems += error.problems
        name = "unknown"
    try:
        weights = list(find_weights(checkpoint).values())
    except CheckpointError as error:
        problems += error.problems
        weights = [Weight(name, source) for name, source in checkpoint.sources.items()]
    if form is not None:
        name = form.name
    elif any(weight.scales is not None for weight in weights):
        name = "not named in config.json"
    model_type = checkpoint.config.get("model_type")
    return Description(
        path=str(checkpoint.path),
        model_type=model_type if isinstance(model_type, str) else None,
        format=name,
        num_files=len({id(source.file) for source in checkpoint.sources.values()}),
        kinds=tuple(_kinds(weights)),
        layers=tuple(_layers(weights)),
        problems=tuple(problems),
    )


def stored_as(weight: Weight) -> str:
    """Returns how a weight is stored: "MXFP8", "FP8 128x128", or a dtype."""
    if weight.scales is None:
        return str(weight.source.info.dtype)
    if 1 in weight.block:
        return _MXFP8
    kind = "E8M0" if weight.scales.info.dtype in E8M0_DTYPES else "float"
    return f"FP8 {weight.block[0]}x{weight.block[1]}, {kind} scales"


def layer_name(weight: str) -> str:
    """Returns the layer of a weight: `model.layers.0`, `lm_head`."""
    match = re.match(r"(.*?\.\d+)\.", weight)
    return match[1] if match else weight.rpartition(".")[0] or weight


def natural_order(name: str) -> list[Any]:
    """Returns a key that sorts layer 10 after layer 9."""
    parts = re.split(r"(\d+)", name)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]


def _kinds(weights: Iterable[Weight]) -> Iterator[Kind]:
    found: dict[tuple[str, str, tuple[int, ...]], list[int]] = {}
    for weight in weights:
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", weight.name)
        key = pattern, stored_as(weight), weight.shape
        found.setdefault(key, []).append(weight.nbytes)
    for key in sorted(found, key=lambda key: (natural_order(key[0]), key[1:])):
        yield Kind(*key, len(found[key]), sum(found[key]))


def _layers(weights: Iterable[Weight]) -> Iterator[Layer]:
    found: dict[str, list[Weight]] = {}
    for weight in weights:
        found.setdefault(layer_name(weight.name), []).append(weight)
    for name in sorted(found, key=natural_order):
        members = found[name]
        yield Layer(
            name,
            sum(weight.size for weight in members),
            sum(weight.size for weight in members if weight.scales is not None),
            sum(weight.nbytes for weight in members),
        )

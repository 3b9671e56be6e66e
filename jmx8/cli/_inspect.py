"""`jmx8 inspect`: what a checkpoint is. Imports no JAX, which would take longer."""

import dataclasses
import gc
import json
from pathlib import Path
from typing import Literal

from .._text import format_bytes, format_table
from ..checkpoint.describe import describe, Description


SortKey = Literal["name", "bytes", "sqnr", "amax", "exponent"]
_MAX_PROBLEMS = 5


def print_description(folder: Path, sort: SortKey, limit: int | None, as_json: bool):
    """Prints what a checkpoint is; reads headers only."""
    gc.disable()  # a quarter of the time for a large checkpoint, and nothing to collect
    found = describe(folder)
    if sort == "bytes":
        layers = sorted(found.layers, key=lambda layer: -layer.num_bytes)
        found = dataclasses.replace(found, layers=tuple(layers))
    if as_json:
        layers = found.to_dict()["layers"][:limit]
        print(json.dumps(found.to_dict() | {"layers": layers}, indent=1))
    else:
        print(format_description(found, limit))


def format_description(found: Description, limit: int | None) -> str:
    """Returns a description as text, with the first `limit` layers."""
    parts = [
        f"{found.path}: {found.model_type or 'no model_type'}, format: {found.format}",
        f"{found.num_parameters:,} parameters, {format_bytes(found.num_bytes)} in "
        f"{found.num_files} files",
    ]
    for name, (count, num_bytes) in found.totals().items():
        parts.append(f"  {name}: {count} weights, {format_bytes(num_bytes)}")
    for problem in found.problems[:_MAX_PROBLEMS]:
        parts.append(f"jmx8 does not read it: {problem}")
    if len(found.problems) > _MAX_PROBLEMS:
        parts.append(f"... and {len(found.problems) - _MAX_PROBLEMS} more problems")
    kinds = [("weights", "stored as", "shape", "count", "bytes")]
    kinds += [
        (
            kind.pattern,
            kind.stored_as,
            ",".join(map(str, kind.shape)),
            str(kind.count),
            format_bytes(kind.num_bytes),
        )
        for kind in found.kinds
    ]
    layers = [("layer", "parameters", "quantized", "bytes")]
    layers += [
        (
            layer.name,
            f"{layer.num_parameters:,}",
            f"{layer.num_quantized / max(1, layer.num_parameters):.1%}",
            format_bytes(layer.num_bytes),
        )
        for layer in found.layers[:limit]
    ]
    tables = [format_table(kinds, left=(0, 1, 2)), format_table(layers, left=(0,))]
    return "\n\n".join(["\n".join(parts), *tables])

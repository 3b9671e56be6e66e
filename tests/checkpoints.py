"""Small checkpoint folders for tests, written with the `safetensors` package."""

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from .mx_checkpoints import DENSE as DENSE, MOE as MOE, shapes as shapes


def random_tensors(
    config: dict[str, Any], dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Returns random tensors of the shapes that a config asks for."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (0.1 * torch.randn(shape, generator=generator)).to(dtype)
        for name, shape in shapes(config).items()
    }


def write_checkpoint(
    path: Path,
    config: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    *,
    num_shards: int = 1,
) -> Path:
    """Writes a checkpoint folder; several shards get an index."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    if num_shards == 1:
        safetensors.torch.save_file(tensors, path / "model.safetensors")
        return path
    weight_map = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        # Every n-th tensor: the experts of a layer are spread over all shards.
        part = {name: tensors[name] for name in list(tensors)[shard::num_shards]}
        safetensors.torch.save_file(part, path / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path

"""`save`: from a model in memory to a checkpoint folder in MXFP8."""

from pathlib import Path
from typing import Any

import jax

from .._mx_array import MXArray
from .._options import FormatName, SHARD_BYTES
from ..convert._walk import unpack
from ..kernels._prepared import is_prepared
from .carry import carried_files, check_apart, CONFIG, config_files
from .describe import natural_order
from .errors import CheckpointError, read_json_object
from .formats import WRITABLE
from .items import array_item, Item, Target
from .names import find_table
from .output import make_shards, Output, write_output
from .stream import Progress


def save(
    model: Any,
    folder: Path | str,
    *,
    source: Path | str,
    format: FormatName = "modelopt",
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Writes a model as a checkpoint folder that `load` and engines for MXFP8 read.

    MXFP8 weights are written as they are, in their canonical form, everything else in
    its dtype; experts one by one. Parameters go to the host one matrix after the other.
    Files get their names when they are whole and on the disk, `config.json` last.

    Args:
        model: A model of a family that `load` knows, in any framework, or the
            `nnx.State` of one.
        folder: Folder to write; new or empty.
        source: Checkpoint folder, whose `config.json`, tokenizer and further files are
            carried over; its weights are not looked at.
        format: See `quantize_checkpoint`. Engines refuse layers whose number of columns
            is not a multiple of 32, which `load` reads.
        shard_bytes: Size after which the next file begins.
        progress: Called after every matrix with the bytes that are done, the bytes in
            all, and a tensor's name.

    Raises:
        CheckpointError: If `source` is of another model, `folder` holds something, or
            the disk is full.
        ValueError: If the model is of no known family, or an argument has no such
            value.
    """
    if format not in WRITABLE:
        raise ValueError(f"save: format must be one of {[*WRITABLE]}, got {format!r}.")
    source, folder, form = Path(source), Path(folder), WRITABLE[format]
    check_apart(source, folder)
    config = read_json_object(source / CONFIG)
    items = _items(model)
    _check_config(model, config, source / CONFIG)
    output = Output(
        folder,
        form,
        items,
        make_shards(items, form, shard_bytes),
        carried_files(source) | config_files(config, None, form, items),
        job=None,
    )
    write_output(output, progress)


def _items(model: Any) -> tuple[Item, ...]:
    is_weight = lambda node: isinstance(node, MXArray) or is_prepared(node)
    tree = unpack(model).tree
    nodes, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_weight)
    leaves = {
        jax.tree_util.keystr(keys, simple=True, separator="/"): leaf
        for keys, leaf in nodes
    }
    table = find_table({path: leaf.shape for path, leaf in leaves.items()})
    if table is None:
        raise ValueError(
            f"save: the model, {type(model).__name__}, is of no family that has names "
            "in checkpoints. Save its arrays with Orbax, or `quantize_checkpoint` the "
            "checkpoint that it was made from"
        )
    result = []
    for path, leaf in leaves.items():
        slots = table.alternatives(path, leaf.shape)[0]
        targets = tuple(Target(slot.start, slot.name, slot.shape) for slot in slots)
        result.append(array_item(path, leaf, targets))
    # Frameworks order the fields of a layer each in its own way.
    return tuple(sorted(result, key=lambda item: natural_order(item.targets[0].name)))


def _check_config(model: Any, config: dict[str, Any], where: Path) -> None:
    """Checks that a config describes the model, as far as the model knows."""
    own = getattr(model, "config", None)
    if own is not None and type(own).from_hf(config) != own:
        raise CheckpointError(
            f"{where}: describes another model than the one to save; pass the folder "
            "that it was loaded from"
        )

"""`quantize_checkpoint`: from one checkpoint folder to another, in any format."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, get_args, Literal

import jax

from .._mxfp8 import BLOCK_SIZE
from .._options import FormatName, SHARD_BYTES
from ..convert import Patterns, Report, ReportRow
from ..convert._rules import Decision, make_rules
from ..convert._walk import Leaf
from .carry import carried_files, check_apart, config_files
from .errors import CheckpointError
from .folder import CheckpointFolder, open_folder
from .formats import Format, MODELOPT_FILE, WRITABLE
from .ignore import listed_modules
from .items import ELEMENTS, Item, Target
from .output import make_shards, Output, verify_output, write_output
from .stored import find_weights, settle_scales, Weight
from .stream import Progress


assert get_args(FormatName) == tuple(WRITABLE)

# What engines run in BF16, besides what `DEFAULT_SKIP` keeps.
_KEPT_BY_ENGINES = {
    "vision or audio tower": r"(?i)(^|/)(visual|vision|vit|audio)[^/]*/",
    "gate of linear attention": r"(^|/)linear_attn/in_proj_(a|b|ba)/",
    "head for further tokens": r"(^|/)(mtp[^/]*|eh_proj|nextn[^/]*)/",
    "indexer": r"(^|/)weights_proj/",
}

# Families whose stacks `[e, 2i, h]` hold the gates' rows before the others'.
_STACKING_FAMILIES = ("qwen2_moe", "qwen3_moe")
_UNKNOWN_STACK = (
    "stack of experts, which is taken apart only for model_type "
    f"{' and '.join(_STACKING_FAMILIES)}"
)
_STACK = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)(\.weight)?")


def quantize_checkpoint(
    source: Path | str,
    folder: Path | str,
    *,
    format: FormatName = "modelopt",
    skip: Patterns = None,
    only: Patterns = None,
    on_nonfinite: Literal["raise", "keep"] = "raise",
    requantize: bool = False,
    shard_bytes: int = SHARD_BYTES,
    verify: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Writes a checkpoint folder in MXFP8.

    Any model can be converted: what is a linear layer is told by the names and shapes
    of tensors. Experts in one stack are converted only for families whose order of axes
    and rows is known, Qwen's; others stay as they are, and the report says so. A
    checkpoint that is in MXFP8 already is written in the other format without a change
    of any element or scale; what is unquantized in it stays so.

    Tensors are read, converted and written a few rows at a time, so memory does not
    grow with the model. Files get their names when they are whole and on the disk. The
    same call after an interruption goes on after the last whole file, gives the same
    bytes, and does nothing if nothing is missing. `source` is only read.

    Args:
        source: Folder with `config.json` and `*.safetensors` files.
        folder: Folder to write; new, empty, or begun by the same call.
        format: "modelopt", "compressed-tensors", or "mxfp8", which is that of SGLang.
        skip: Patterns of weights to keep; globs or regular expressions on the name with
            slashes for dots and without `model.` in front, as for `load`. Besides
            them, `DEFAULT_SKIP`, the checkpoint's own lists, and layers that no engine
            runs in MXFP8 are kept.
        only: Patterns of the weights to convert; then only `skip` and the checkpoint's
            lists apply besides.
        on_nonfinite: "raise" refuses NaN and infinity in what is converted; "keep"
            converts them as `quantize` says.
        requantize: Whether FP8 weights whose scales are not powers of two are rounded
            anew instead of refused.
        shard_bytes: Size after which the next file begins.
        verify: Whether to read everything again when it is written, or was before, and
            compare.
        progress: Called after every chunk with the bytes read so far, the bytes in all,
            and the name of the tensor; once more from 0 if `verify`.

    Returns:
        One row per tensor of `source`, without errors of rounding.

    Raises:
        CheckpointError: If `source` is no such folder, `folder` holds something else,
            the disk is full, or, if `verify`, anything differs.
        ValueError: If a pattern matches nothing, or an argument has no such value.
    """
    _check_arguments(format, on_nonfinite, shard_bytes)
    checkpoint = open_folder(source)
    folder = Path(folder)
    check_apart(checkpoint.path, folder)
    form = WRITABLE[format]
    weights = _all_weights(checkpoint, requantize=requantize)
    stacks = _stacks(checkpoint, weights)
    decisions = _decide(checkpoint, weights, stacks.keys(), skip, only)
    items = tuple(
        _item(weight, decision, stacks.get(weight.name))
        for weight, decision in zip(weights, decisions, strict=True)
    )
    carried = carried_files(checkpoint.path)
    job = _job(checkpoint, items, carried) | {
        "format": format,
        "on_nonfinite": on_nonfinite,
        "shard_bytes": shard_bytes,
    }
    output = Output(
        folder,
        form,
        items,
        make_shards(items, form, shard_bytes),
        carried | config_files(checkpoint.config, checkpoint.modelopt, form, items),
        job,
        check_finite=on_nonfinite == "raise",
    )
    write_output(output, progress)
    if verify:
        verify_output(output, progress)
    return Report(
        tuple(_row(d, i, form) for d, i in zip(decisions, items, strict=True))
    )


def _check_arguments(form: Any, on_nonfinite: Any, shard_bytes: Any) -> None:
    if form not in WRITABLE:
        raise ValueError(
            f"quantize_checkpoint: format must be one of {[*WRITABLE]}, got {form!r}."
        )
    if on_nonfinite not in ("raise", "keep"):
        raise ValueError(
            'quantize_checkpoint: on_nonfinite must be "raise" or "keep", got '
            f"{on_nonfinite!r}."
        )
    if shard_bytes < 1:
        raise ValueError(
            f"quantize_checkpoint: shard_bytes must be positive, got {shard_bytes}."
        )


def _all_weights(checkpoint: CheckpointFolder, *, requantize: bool) -> list[Weight]:
    """Returns the weights, and the scales of a quantized key-value cache."""
    weights = find_weights(checkpoint)
    used = {id(s) for w in weights.values() for s in (w.source, w.scales)}
    for name, source in checkpoint.sources.items():
        if id(source) not in used:
            weights[name] = Weight(name, source)
    return list(settle_scales(weights.values(), requantize=requantize).values())


# --- What is converted ----------------------------------------------------------------


def _decide(
    checkpoint: CheckpointFolder,
    weights: Sequence[Weight],
    stacks: Collection[str],
    skip: Patterns,
    only: Patterns,
) -> list[Decision]:
    """Returns the decision for every weight; an axis of -1 means that it is MXFP8."""
    leaves = [_leaf(weight) for weight in weights]
    if any(weight.scales is not None for weight in weights):
        if skip is not None or only is not None:
            raise ValueError(
                "quantize_checkpoint: skip and only choose what is converted, but "
                f"{checkpoint.path} is quantized already. Leave them out."
            )
        return list(map(_decide_quantized, leaves, weights))
    modules: dict[str, list[str]] = {}
    for leaf, weight in zip(leaves, weights, strict=True):
        modules.setdefault(leaf.path.rpartition("/")[0], []).append(weight.name)
    listed = listed_modules(checkpoint, modules)
    if only is None:
        listed += [_search(*item) for item in _KEPT_BY_ENGINES.items()]
    given = [skip] if isinstance(skip, str) or callable(skip) else list(skip or ())
    rules = make_rules([*given, *listed], only)
    decisions = [
        _restrict(rules.decide(leaf), weight.shape, weight.name in stacks)
        for leaf, weight in zip(leaves, weights, strict=True)
    ]
    mistakes = rules.mistakes(decisions)
    if mistakes:
        lines = (f"quantize_checkpoint: {line}" for line in mistakes)
        raise ValueError("\n".join(lines))
    return decisions


def _leaf(weight: Weight) -> Leaf:
    path = weight.name.removeprefix("model.").replace(".", "/")
    dtype = weight.source.info.dtype
    return Leaf(path, jax.ShapeDtypeStruct(weight.shape, dtype))


def _decide_quantized(leaf: Leaf, weight: Weight) -> Decision:
    if weight.scales is None:
        return Decision(leaf, None, "unquantized in the checkpoint")
    if weight.requantized:
        return Decision(leaf, -1, "rounded anew, its scales are no powers of two")
    return Decision(leaf, -1, "MXFP8 in the checkpoint")


def _restrict(decision: Decision, shape: tuple[int, ...], is_stack: bool) -> Decision:
    """Keeps what is no linear layer, or none that engines take."""
    keep = lambda reason: dataclasses.replace(
        decision, axis=None, reason=reason, problem=""
    )
    if decision.axis is None and not decision.problem:
        return decision
    k = shape[-1]
    if not is_stack and (len(shape) > 2 or decision.axis != -1):
        has_experts = len(shape) == 3 and "experts" in decision.leaf.path
        return keep(
            _UNKNOWN_STACK if has_experts else "by name and shape no linear layer"
        )
    if k % BLOCK_SIZE:
        return keep(f"{k} columns, which engines want to be a multiple of {BLOCK_SIZE}")
    reason = decision.reason if decision.axis else "stack of experts"
    return dataclasses.replace(decision, axis=-1, reason=reason, problem="")


def _search(name: str, expression: str) -> Callable[[str, Any], bool]:
    found = re.compile(expression).search
    matches = lambda path, leaf: found(path) is not None
    matches.__name__ = name
    return matches


# --- What is written ------------------------------------------------------------------


def _stacks(
    checkpoint: CheckpointFolder, weights: Sequence[Weight]
) -> dict[str, tuple[Weight, tuple[Target, ...]]]:
    """Returns the stacks of experts, seen as `[e, n, k]`, and their experts' weights.

    Engines take one matrix per expert. Only of some families it is known how the rows
    of a stack are ordered; the stacks of others are no linear layers here.
    """
    config = checkpoint.config
    if config.get("model_type") not in _STACKING_FAMILIES:
        return {}
    found = [
        (match, weight)
        for weight in weights
        if len(weight.shape) == 3 and (match := _STACK.fullmatch(weight.name))
    ]
    hidden = config.get("hidden_size")
    # A square stack tells nothing, so one that is not decides for all of them.
    turned = any(
        weight.shape[2 if match[2] == "gate_up_proj" else 1] != hidden
        for match, weight in found
        if weight.scales is None
    )
    result = {}
    for match, weight in found:
        if turned and weight.scales is None:
            weight = dataclasses.replace(weight, transposed=True)
        result[weight.name] = weight, _experts(match, weight.shape)
    return result


def _experts(match: re.Match[str], shape: tuple[int, ...]) -> tuple[Target, ...]:
    prefix, kind = match[1], match[2]
    names = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
    count, rows, k = shape
    part = rows // len(names)
    return tuple(
        Target(expert * rows + i * part, f"{prefix}.{expert}.{name}.weight", (part, k))
        for expert in range(count)
        for i, name in enumerate(names)
    )


def _item(
    weight: Weight,
    decision: Decision,
    stack: tuple[Weight, tuple[Target, ...]] | None,
) -> Item:
    label = str(weight)
    if decision.axis is None:
        targets = (Target(0, weight.name, weight.source.info.shape),)
        dtype = weight.source.info.dtype
        return Item(label, targets, dtype, weight.iter_rows, weight.nbytes)
    targets = (Target(0, weight.name, weight.shape),)
    if stack is not None:
        weight, targets = stack
    elif weight.transposed:
        raise CheckpointError(
            f"{label}: is stored as [..., k, n], and of this model it is not known how "
            "engines want it"
        )
    return Item(label, targets, None, weight.iter_rows, weight.nbytes)


def _job(
    checkpoint: CheckpointFolder, items: Sequence[Item], carried: Iterable[str]
) -> dict[str, Any]:
    """Returns what tells one conversion from another, as JSON values."""
    plan = [(item.targets, str(item.dtype), Path(item.label).name) for item in items]
    names = {"config.json", *carried}
    paths = {source.file.path for source in checkpoint.sources.values()}
    paths |= {checkpoint.path / name for name in names}
    if (checkpoint.path / MODELOPT_FILE).exists():
        paths.add(checkpoint.path / MODELOPT_FILE)
    status = {path.name: path.stat() for path in sorted(paths)}
    return {
        "source": {name: [s.st_size, s.st_mtime_ns] for name, s in status.items()},
        "choice of layers": hashlib.sha256(json.dumps(plan).encode()).hexdigest(),
    }


def _row(decision: Decision, item: Item, form: Format) -> ReportRow:
    value = decision.leaf.value
    is_converted = decision.axis is not None and value.dtype != ELEMENTS
    return ReportRow(
        path=decision.leaf.path,
        shape=tuple(value.shape),
        dtype=str(value.dtype),
        action="converted" if is_converted else "kept",
        reason=decision.reason,
        axis=None if decision.axis is None else -1,
        bytes_before=item.num_bytes,
        bytes_after=sum(info.nbytes for info in item.tensors(form)),
    )

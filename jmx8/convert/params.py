"""Conversion of a pytree's weights to MXFP8."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, overload

from .._kernel_axes import KernelAxes
from ._leaf import (
    buffers,
    convert_leaf,
    count_nonfinite,
    free,
    is_concrete,
    is_deleted,
    kept_row,
    sharding_problem,
)
from ._patterns import Patterns
from ._rules import AXIS_UNKNOWN, Contract, Decision, make_rules, Rules
from ._walk import rebuild, unpack, walk
from .report import Report, ReportRow


@overload
def quantize_params(
    tree: Any,
    *,
    skip: Patterns = ...,
    only: Patterns = ...,
    contract: Contract = ...,
    on_nonfinite: Literal["raise", "keep"] = ...,
    donate: bool = ...,
    return_report: Literal[False] = ...,
) -> Any: ...


@overload
def quantize_params(
    tree: Any,
    *,
    skip: Patterns = ...,
    only: Patterns = ...,
    contract: Contract = ...,
    on_nonfinite: Literal["raise", "keep"] = ...,
    donate: bool = ...,
    return_report: Literal[True],
) -> tuple[Any, Report]: ...


def quantize_params(
    tree: Any,
    *,
    skip: Patterns = None,
    only: Patterns = None,
    contract: Contract = None,
    on_nonfinite: Literal["raise", "keep"] = "raise",
    donate: bool = True,
    return_report: bool = False,
) -> Any:
    """Converts the matmul weights of a pytree to MXFP8, leaf by leaf.

    A leaf is selected by its path, such as `layers/0/mlp/up_proj/weight`. Patterns are
    globs (`layers/0`, which includes everything below it, or `*/q_proj`), regular
    expressions (`re:layers/[0-3]/`, found anywhere) or functions of path and leaf.
    Kept in any case: leaves that are not float arrays, have 8 bits or fewer, or have
    fewer than 2 axes; and Equinox's own layers other than `Linear`, by their type.
    Leaves that are an `MXArray` already pass through. The same array in two places is
    converted once.

    Args:
        tree: Any pytree: dicts, lists, Equinox modules, Flax variables, `nnx.State`, or
            an `nnx.Module`, of which a new one is returned. Leaves are jax or numpy
            arrays, `ShapeDtypeStruct`s, which give `MXArray`s of `ShapeDtypeStruct`s,
            or tracers. A `NamedSharding` is kept; so are the sharding names of Flax,
            in the order of the axes of the stored elements.
        skip: Patterns of leaves to keep, besides `DEFAULT_SKIP`: embeddings, norms,
            biases, routers and `lm_head`, by name.
        only: Patterns of the leaves to convert. `DEFAULT_SKIP` does not apply then;
            `skip` does.
        contract: The axis that a matmul contracts: -1 for weights `[..., n, k]`, -2 for
            `[..., k, n]`. A tuple of axes, or `KernelAxes` if some are batch axes, for
            a kernel with several of a kind, `[heads, head_dim, embed]`: the `MXArray`
            is that of the kernel flattened to `[*batch, k, n]`. "keep" for what is not
            multiplied. One for every leaf, a mapping of patterns to them of which the
            first match counts, or a function of path and leaf; `jmx8.flax.contract_of`
            makes one of a Linen model. None, no match, or a function's None: inferred,
            which takes the layers of an `nnx.Module`, an `eqx.nn.Linear` or
            `jmx8.nn.Experts`, a 2-D `kernel` (-2) or `weight` (-1), a 3-D `w13`, `w2`
            or `experts/.../weight` (-1), or a 3-D `kernel` of Flax's attention.
        on_nonfinite: "raise" refuses NaN and infinity in what is to be converted;
            "keep" quantizes them as `quantize` says. Abstract and traced leaves have
            no values to check.
        donate: Whether to free each jax array once it is converted, so that at most
            one leaf is held twice. `tree` cannot be used afterwards.
        return_report: Whether to return a `Report` too, which costs one more pass over
            every leaf.

    Returns:
        The tree with `MXArray`s as leaves, or that and a `Report`.

    Raises:
        ValueError: If a glob or regular expression matches nothing, an axis cannot be
            inferred, the contracted axis is sharded inside a block, or values are not
            finite. Every leaf concerned is listed, and nothing is converted.
        TypeError: If a pattern or `contract` is of the wrong type.
    """
    unpacked = unpack(tree)
    rules = make_rules(skip, only, contract, known=unpacked.known)
    new_tree, report = convert_tree(
        "quantize_params",
        unpacked.tree,
        rules,
        on_nonfinite=on_nonfinite,
        donate=donate,
        with_stats=return_report,
        repack=unpacked.repack,
    )
    return (new_tree, report) if return_report else new_tree


def convert_tree(
    caller: str,
    tree: Any,
    rules: Rules,
    *,
    on_nonfinite: str,
    donate: bool,
    with_stats: bool,
    repack: Callable[[Any, Mapping[str, Any]], Any] = lambda tree, axes: tree,
) -> tuple[Any, Report]:
    """Converts the leaves that `rules` choose; `caller` is named in errors.

    `repack` gets the tree and the axes of what was converted, by path.
    """
    if on_nonfinite not in ("raise", "keep"):
        raise ValueError(
            f'{caller}: on_nonfinite must be "raise" or "keep", got {on_nonfinite!r}.'
        )
    leaves = walk(tree)
    decisions = [rules.decide(leaf) for leaf in leaves if leaf.is_array]
    _check(caller, rules, decisions)
    if on_nonfinite == "raise":
        _check_finite(caller, decisions)
    done = iter(_convert_all(decisions, donate, with_stats))
    rows: list[ReportRow] = []
    values: list[Any] = []
    for leaf in leaves:
        if leaf.is_array:
            value, row = next(done)
            rows.append(row)
        else:
            value = leaf.value
        values.append(value)
    axes = {d.leaf.path: d.axis for d in decisions if d.axis is not None}
    return repack(rebuild(tree, values), axes), Report(tuple(rows))


def _check(caller: str, rules: Rules, decisions: list[Decision]) -> None:
    mistakes = rules.mistakes(decisions)
    if mistakes:
        raise ValueError("\n".join(f"{caller}: {line}" for line in mistakes))
    unknown = [d for d in decisions if d.problem == AXIS_UNKNOWN]
    if unknown:
        lines = [f"  {d.leaf.path}  {tuple(d.leaf.value.shape)}" for d in unknown]
        raise ValueError(
            f"{caller}: neither name nor module type says which axis a matmul "
            f"contracts, for {len(unknown)} of the leaves to convert:\n"
            + "\n".join(lines)
            + "\nPass `contract`, an axis or a mapping of patterns to axes: -1 for "
            "[..., n, k], used as x @ w.T, or -2 for [..., k, n], used as x @ w. Or "
            "keep them with `skip`."
        )
    problems = [(d.leaf.path, d.problem) for d in decisions if d.problem]
    for d in decisions:
        if d.axis is not None and (found := sharding_problem(d.leaf.value, d.axis)):
            problems.append((d.leaf.path, found))
        if d.axis is not None and is_deleted(d.leaf.value):
            problems.append((d.leaf.path, "has been deleted, perhaps by donation."))
    if problems:
        raise ValueError(
            "\n".join(f"{caller}: {path}: {text}" for path, text in problems)
        )


def _check_finite(caller: str, decisions: list[Decision]) -> None:
    lines = []
    for d in decisions:
        if d.axis is not None and is_concrete(d.leaf.value):
            nan, inf = count_nonfinite(d.leaf.value)
            if nan or inf:
                lines.append(f"  {d.leaf.path}: {nan} NaN, {inf} infinite")
    if lines:
        raise ValueError(
            f"{caller}: weights must be finite, but {len(lines)} of them are not:\n"
            + "\n".join(lines)
            + '\nNothing was converted. Pass on_nonfinite="keep" to quantize them.'
        )


def _convert_all(
    decisions: Sequence[Decision], donate: bool, with_stats: bool
) -> list[tuple[Any, ReportRow]]:
    """Converts or keeps each leaf; one that comes twice is converted once."""
    keys = [_key(d) for d in decisions]
    # What still has to be read, and therefore cannot be freed.
    kept = frozenset().union(*(source for source, *_, axis in keys if axis is None))
    unread = Counter(
        buffer
        for source, *_, axis in set(keys)
        if axis is not None
        for buffer in source
    )
    counted: set[Any] = set()
    done: dict[Any, tuple[Any, ReportRow]] = {}
    results: list[tuple[Any, ReportRow]] = []
    for key, d in zip(keys, decisions, strict=True):
        if key in done:
            results.append(_again(d, *done[key]))
            continue
        source, *_, axis = key
        result, row = _convert(d, with_stats)
        if source in counted:
            row = dataclasses.replace(row, bytes_before=0)
        counted.add(source)
        done[key] = result, row
        results.append(done[key])
        unread.subtract(source if axis is not None else ())
        if (
            donate
            and axis is not None
            and not any(unread[buffer] or buffer in kept for buffer in source)
        ):
            free(d.leaf.value, after=result)
    return results


def _key(
    d: Decision,
) -> tuple[frozenset[Any], tuple[int, ...], str, int | KernelAxes | None]:
    """Returns what is equal for leaves of which one conversion does."""
    x = d.leaf.value
    return buffers(x), tuple(x.shape), str(x.dtype), d.axis


def _convert(d: Decision, with_stats: bool) -> tuple[Any, ReportRow]:
    path, value = d.leaf.path, d.leaf.value
    if d.axis is None:
        return value, kept_row(path, value, d.reason)
    return convert_leaf(path, value, d.axis, reason=d.reason, with_stats=with_stats)


def _again(d: Decision, result: Any, first: ReportRow) -> tuple[Any, ReportRow]:
    """Returns what becomes of a leaf whose array was met before."""
    row = dataclasses.replace(
        first,
        path=d.leaf.path,
        reason=f"shared with {first.path}",
        bytes_before=0,
        bytes_after=0,
    )
    return (d.leaf.value if d.axis is None else result), row

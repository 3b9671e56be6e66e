"""Which leaves are converted, and along which axis."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp

from .._kernel_axes import KernelAxes, matmul_axes
from .._mx_array import MXArray
from .._unpacked import Known
from ..nn import Experts
from ._patterns import (
    compile_patterns,
    first_match,
    idle_patterns,
    PathPattern,
    Pattern,
    Patterns,
)
from ._walk import Leaf


# The contracted axis of a leaf, or axes, as a tuple if it has no batch axes; "keep" for
# one that no matmul contracts.
Axes = int | tuple[int, ...] | KernelAxes | Literal["keep"]

# For all leaves, by pattern, or by function, which returns None for a leaf whose axis
# is to be inferred.
Contract = (
    Axes
    | Mapping[str, Axes]
    | Mapping[Pattern, Axes]
    | Callable[[str, Any], Axes | None]
    | None
)

# What is kept unless `only` asks for it: a reason and a pattern. Components of a path
# may be separated by dots too, as in a flat dict of checkpoint names.
DEFAULT_SKIP: Mapping[str, str] = MappingProxyType(
    {
        "embedding": r"re:(?i)embed|(^|[/.])(wte|wpe)([/.]|$)",
        "norm": r"re:(?i)norm(?!al)|(^|[/.])ln(\d+|_[^/.]*)?([/.]|$)",
        "bias": r"re:(?i)(^|[/._])bias(es)?([/.]|$)",
        "router": r"re:(?i)(^|[/.])(shared_)?(experts?_)?gate([/.]|$)|router",
        "lm_head": r"re:(^|[/.])lm_head([/.]|$)",
    }
)

_COMPILED_DEFAULTS = {
    name: compile_patterns("DEFAULT_SKIP", pattern)[0]
    for name, pattern in DEFAULT_SKIP.items()
}

# Subclasses of these inherit a `__call__` that does not multiply by `weight`.
_KEPT_MODULES = (
    eqx.nn.Embedding,
    eqx.nn.Conv,
    eqx.nn.ConvTranspose,
    eqx.nn.GRUCell,
    eqx.nn.LSTMCell,
)

# The kernels of Flax's attention: [embed, heads, head_dim] and back.
_ATTENTION = {"query": (0,), "key": (0,), "value": (0,), "out": (0, 1)}

# Flax's convolutions call themselves `Conv_0`, and others do alike.
_CONVOLUTION = re.compile(r"(?i)conv[^/.]*[/.]kernel$")

# Layers of this name are `[n, k]` in some models and GPT-2's `[k, n]` in others.
_EITHER_WAY = frozenset({"c_attn", "c_fc", "c_proj", "q_attn"})


# The problem of a leaf whose axis has to be stated; all such are listed together.
AXIS_UNKNOWN = "contracted axis unknown"


@dataclass(frozen=True)
class Decision:
    """What to do with a leaf.

    Attributes:
        leaf: The leaf.
        axis: The axis to quantize along, -1 or -2, or axes. None if the leaf is kept.
        reason: Why it is kept, or how the axis is known.
        problem: What is wrong with the request for this leaf, if anything.
    """

    leaf: Leaf
    axis: int | KernelAxes | None
    reason: str
    problem: str = ""


@dataclass(frozen=True)
class Rules:
    """The caller's choice, compiled. `decide` applies it.

    Attributes:
        skip: Patterns of leaves to keep.
        only: Patterns of leaves to convert, instead of all but the defaults.
        contract: Patterns with the axis of what they match, or a function.
        layers_only: Whether only weights of modules count for which there is an MXFP8
            module.
        known: By path, what the layer that has a leaf says: the axes and the layer's
            name, or why the leaf is kept.
    """

    skip: tuple[PathPattern, ...]
    only: tuple[PathPattern, ...] | None
    contract: tuple[tuple[PathPattern, Axes], ...] | Callable[[str, Any], Any]
    layers_only: bool = False
    known: Known = field(default_factory=dict)

    def decide(self, leaf: Leaf) -> Decision:
        """Returns the decision for a leaf that is an array."""
        said = self.known.get(leaf.path)
        reason = said if isinstance(said, str) else ""
        reason = reason_to_keep(leaf) or reason or self._reason_not_chosen(leaf)
        if not reason and self.layers_only and not is_layer_weight(leaf):
            reason = "not the weight of an eqx.nn.Linear or Experts"
        if reason:
            return Decision(leaf, None, reason)
        known = _axis_of_layer(leaf, said)
        stated = self._stated_axis(leaf)
        if stated == "keep":
            return Decision(leaf, None, "kept by contract")
        if stated is None:
            axis, reason = known or _axis_of_name(leaf) or (None, "")
            if axis is None and _CONVOLUTION.search(leaf.path):
                return Decision(leaf, None, "convolution, by its name")
            return Decision(leaf, axis, reason, "" if axis else AXIS_UNKNOWN)
        axis = _normalize(stated, len(leaf.value.shape))
        if axis is None:
            shape = tuple(leaf.value.shape)
            problem = (
                f"contract gives {stated!r}, not one of the last 2 axes of {shape} nor "
                "a tuple of axes of it."
            )
            return Decision(leaf, None, "", problem)
        if known and known[0] != axis:
            problem = f"contract gives {stated}, but {known[1]} contracts {known[0]}."
            return Decision(leaf, None, "", problem)
        return Decision(leaf, axis, f"{_words(axis)} by contract")

    def _reason_not_chosen(self, leaf: Leaf) -> str:
        found = first_match(self.skip, leaf.path, leaf.value)
        if found:
            return f"skip: {found}"
        if self.only is not None:
            chosen = first_match(self.only, leaf.path, leaf.value)
            return "" if chosen else "not in only"
        for name, pattern in _COMPILED_DEFAULTS.items():
            if pattern.matches(leaf.path, leaf.value):
                return f"{name}, kept by default"
        return ""

    def _stated_axis(self, leaf: Leaf) -> Any:
        if not isinstance(self.contract, tuple):
            return self.contract(leaf.path, leaf.value)
        for pattern, axis in self.contract:
            if pattern.matches(leaf.path, leaf.value):
                return axis
        return None

    def mistakes(self, decisions: list[Decision]) -> list[str]:
        """Returns a line for every pattern that cannot be what the caller meant."""
        leaves = [(d.leaf.path, d.leaf.value) for d in decisions]
        lines = idle_patterns("skip", self.skip, leaves)
        lines += idle_patterns("only", self.only or (), leaves)
        if isinstance(self.contract, tuple):
            by_axis = [pattern for pattern, _ in self.contract]
            lines += idle_patterns("contract", by_axis, leaves)
        for pattern in self.only or ():
            lines += _refusal(pattern, decisions)
        return lines + (_torn_experts(decisions) if self.layers_only else [])


def make_rules(
    skip: Patterns,
    only: Patterns,
    contract: Any = None,
    *,
    layers_only: bool = False,
    known: Known = MappingProxyType({}),
) -> Rules:
    """Compiles what the caller passed.

    Raises:
        TypeError: If a pattern or `contract` is of the wrong type.
        ValueError: If a pattern is malformed.
    """
    idle = DEFAULT_SKIP.values()
    skipped = compile_patterns("skip", skip, may_be_idle=idle)
    chosen = None if only is None else compile_patterns("only", only, may_be_idle=idle)
    return Rules(skipped, chosen, _compile_contract(contract), layers_only, known)


def _compile_contract(contract: Any) -> Any:
    if contract is None:
        return ()
    if isinstance(contract, int | tuple | KernelAxes) and contract is not True:
        return lambda path, leaf: contract
    if isinstance(contract, Mapping):
        return tuple(
            (compile_patterns("contract", [pattern])[0], axis)
            for pattern, axis in contract.items()
        )
    if callable(contract):
        return contract
    raise TypeError(
        "contract: an axis, a mapping of patterns to axes, or a function of path and "
        f"leaf, got {contract!r} of type {type(contract).__name__}."
    )


def is_layer_weight(leaf: Leaf) -> bool:
    """Whether `quantize_model` has a module for the one that holds the leaf."""
    if type(leaf.owner) is eqx.nn.Linear:
        return leaf.field == "weight"
    return type(leaf.owner) is Experts and leaf.field in ("w13", "w2")


def reason_to_keep(leaf: Leaf) -> str:
    """Returns why a leaf cannot be converted, whoever asks; "" if it can."""
    value, owner = leaf.value, leaf.owner
    if isinstance(value, MXArray):
        return "already MXFP8"
    if not jnp.issubdtype(value.dtype, jnp.floating):
        return f"not a float array: {value.dtype}"
    if jnp.finfo(value.dtype).bits <= 8:
        return f"already 8 bits or fewer: {value.dtype}"
    if len(value.shape) < 2:
        return "fewer than 2 axes"
    if 0 in value.shape:
        return "empty"
    if leaf.wrapper is not None:
        return f"inside eqx.nn.{type(leaf.wrapper).__name__}"
    if isinstance(owner, eqx.nn.Linear):
        if "scalar" in (owner.in_features, owner.out_features):
            return "eqx.nn.Linear with a scalar feature"
    elif type(owner).__module__.startswith("equinox.nn"):
        return f"eqx.nn.{type(owner).__name__}"
    elif isinstance(owner, _KEPT_MODULES):
        return f"{type(owner).__name__}, not a matmul"
    return ""


def _axis_of_layer(leaf: Leaf, said: Any) -> tuple[Any, str] | None:
    if said is not None:
        axes, layer = said
        return _normalize(axes, len(leaf.value.shape)), layer
    if isinstance(leaf.owner, eqx.nn.Linear) and leaf.field == "weight":
        return -1, "eqx.nn.Linear"
    if isinstance(leaf.owner, Experts) and leaf.field in ("w13", "w2"):
        return -1, "Experts"
    return None


def _words(axis: Any) -> str:
    if not isinstance(axis, KernelAxes):
        return f"axis {axis}"
    batch = f" for each index of {axis.batch}" if axis.batch else ""
    return f"axes {axis.contracted}{batch}"


def _axis_of_name(leaf: Leaf) -> tuple[Any, str] | None:
    """Returns the axis where name and number of axes leave no doubt."""
    components = re.split("[/.]", leaf.path)
    # Flax boxes its parameters: `kernel/value`.
    if components[-1] == "value":
        components.pop()
    *modules, name = components or [""]
    axes = len(leaf.value.shape)
    if name == "kernel" and axes == 2:
        return -2, "name `kernel`"
    if name == "kernel" and axes == 3 and modules and modules[-1] in _ATTENTION:
        return KernelAxes(_ATTENTION[modules[-1]]), f"name `{modules[-1]}/kernel`"
    if name == "weight" and axes == 2 and not _EITHER_WAY.intersection(modules):
        return -1, "name `weight`"
    if name == "weight" and axes == 3 and "experts" in modules:
        return -1, "name `experts/.../weight`"
    if name in ("w13", "w2") and axes == 3:
        return -1, f"name `{name}`"
    return None


def _normalize(axis: Any, ndim: int) -> int | KernelAxes | None:
    """Returns -1, -2, axes that have to be flattened, or None if none of these."""
    if isinstance(axis, tuple):
        axis = KernelAxes(axis)
    if isinstance(axis, KernelAxes):
        try:
            axis = axis.normalize(ndim)
        except ValueError:
            return None
        return -2 if axis == matmul_axes(ndim) else axis
    if isinstance(axis, bool) or not hasattr(axis, "__index__"):
        return None
    axis = int(axis)
    axis = axis - ndim if axis >= 0 else axis
    return axis if axis in (-1, -2) else None


def _refusal(pattern: PathPattern, decisions: list[Decision]) -> list[str]:
    """Returns a line if `only` asks by name for nothing but what is kept anyway."""
    matched = [d for d in decisions if pattern.matches(d.leaf.path, d.leaf.value)]
    if pattern.may_be_idle or not matched:
        return []
    if any(_becomes_mx(d) or d.problem for d in matched):
        return []
    path, reason = matched[0].leaf.path, matched[0].reason
    return [
        f"only: {pattern} matches nothing that can be converted; `{path}`: {reason}."
    ]


def _torn_experts(decisions: list[Decision]) -> list[str]:
    """Returns a line for every Experts of which only one weight would be MXFP8."""
    lines = []
    by_owner: dict[int, list[Decision]] = {}
    for d in decisions:
        if isinstance(d.leaf.owner, Experts) and is_layer_weight(d.leaf):
            by_owner.setdefault(id(d.leaf.owner), []).append(d)
    for weights in by_owner.values():
        kept = [d for d in weights if not _becomes_mx(d)]
        if kept and len(kept) < len(weights):
            lines.append(
                "an Experts is converted whole or kept whole, but one weight of it, "
                f"`{kept[0].leaf.path}`, is kept: {kept[0].reason}."
            )
    return lines


def _becomes_mx(d: Decision) -> bool:
    return d.axis is not None or isinstance(d.leaf.value, MXArray)

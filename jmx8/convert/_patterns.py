"""Patterns that select the leaves of a pytree by path."""

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any


# A glob, a regular expression after `re:`, or a function of path and leaf.
Pattern = str | Callable[[str, Any], bool]
Patterns = Pattern | Iterable[Pattern] | None


@dataclass(frozen=True)
class PathPattern:
    """One compiled pattern.

    Paths look like `layers/0/self_attn/q_proj/weight`: dict keys, attributes and
    indices joined by slashes. A pattern is one of

    - a glob (`fnmatch`, case-sensitive), which must match the whole path, or the path
      of a module that holds the leaf: `layers/0` selects everything in that layer.
      `*` also matches slashes, so `*/q_proj` selects every `q_proj` below the root.
    - a regular expression after `re:`, found anywhere in the path (`re.search`);
      anchor it with `^` and `$`.
    - a function of the path and the leaf that returns a bool.

    Attributes:
        source: The pattern as it was given.
        matches: Whether a path and its leaf match.
        may_be_idle: Whether matching nothing is no mistake.
    """

    source: Pattern
    matches: Callable[[str, Any], bool]
    may_be_idle: bool = False

    def __str__(self) -> str:
        if isinstance(self.source, str):
            return f"`{self.source}`"
        return getattr(self.source, "__name__", repr(self.source))


def compile_patterns(
    argument: str, patterns: Any, *, may_be_idle: Iterable[str] = ()
) -> tuple[PathPattern, ...]:
    """Compiles one pattern or several.

    Args:
        argument: Name of the argument that they came in, for messages.
        patterns: A pattern, an iterable of patterns, or None for no pattern.
        may_be_idle: Strings among the patterns that may match nothing. Functions
            always may.

    Raises:
        TypeError: If a pattern is neither a string nor callable.
        ValueError: If a pattern is empty, or not a regular expression after `re:`.
    """
    if patterns is None:
        return ()
    if isinstance(patterns, str) or callable(patterns):
        patterns = (patterns,)
    if not isinstance(patterns, Iterable):
        raise TypeError(_wrong_type(argument, patterns))
    idle = frozenset(may_be_idle)
    return tuple(_compile(argument, pattern, idle) for pattern in patterns)


def _compile(argument: str, pattern: Any, idle: frozenset[str]) -> PathPattern:
    if not isinstance(pattern, str):
        if not callable(pattern):
            raise TypeError(_wrong_type(argument, pattern))
        function: Any = pattern
        return PathPattern(
            function, lambda path, leaf: bool(function(path, leaf)), may_be_idle=True
        )
    expression = pattern.removeprefix("re:")
    if not expression.strip("/"):
        raise ValueError(
            f"{argument}: pattern `{pattern}` is empty. Use `*` for everything."
        )
    if expression is pattern:
        glob = pattern.strip("/")
        # `fnmatch.translate` anchors at the end, so the pattern's own module is one
        # more alternative: `*` crosses slashes.
        expression = f"^(?:{fnmatch.translate(glob)}|{fnmatch.translate(glob + '/*')})"
    try:
        found = re.compile(expression).search
    except re.error as error:
        raise ValueError(
            f"{argument}: `{pattern}` is not a regular expression: {error}."
        ) from error
    return PathPattern(
        pattern,
        lambda path, leaf: found(path) is not None,
        may_be_idle=pattern in idle,
    )


def _wrong_type(argument: str, pattern: Any) -> str:
    return (
        f"{argument}: a pattern is a glob, a regular expression after `re:`, or a "
        f"function of path and leaf, got {pattern!r} of type {type(pattern).__name__}."
    )


def first_match(
    patterns: Sequence[PathPattern], path: str, leaf: Any
) -> PathPattern | None:
    """Returns the first of the patterns that matches, or None."""
    return next((p for p in patterns if p.matches(path, leaf)), None)


def idle_patterns(
    argument: str,
    patterns: Sequence[PathPattern],
    leaves: Sequence[tuple[str, Any]],
) -> list[str]:
    """Returns one line for every pattern that matches nothing but should."""
    lines = []
    for pattern in patterns:
        if pattern.may_be_idle or any(pattern.matches(*leaf) for leaf in leaves):
            continue
        lines.append(
            f"{argument}: {pattern} matches no tensor.{_hint(pattern, leaves)}"
        )
    return lines


def _hint(pattern: PathPattern, leaves: Sequence[tuple[str, Any]]) -> str:
    wanted = str(pattern.source).removeprefix("re:").replace(".", "/").strip("*/^$")
    # The commonest mistake is a name without what is above it.
    below = compile_patterns("", f"*/{wanted}") if wanted else ()
    if any(first_match(below, *leaf) for leaf in leaves):
        return f" Globs match whole paths. Did you mean `*/{wanted}`?"
    near = difflib.get_close_matches(wanted, [path for path, _ in leaves], n=1)
    return f" The nearest path is `{near[0]}`." if near else ""

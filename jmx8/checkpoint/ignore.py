"""The modules that a checkpoint asks not to convert."""

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Set
from pathlib import Path
from typing import Any

from .errors import CheckpointError
from .folder import CheckpointFolder
from .formats import MODELOPT_FILE


# What the list is called by Hugging Face and SGLang, by vLLM, by compressed-tensors and
# newer ModelOpt, and by older ModelOpt.
_LISTS = ("modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules")

# How many times a regular expression may repeat something. Names have some 60
# characters, and to find that none of 60**n ways to share them out matches takes long.
_MAX_REPEATS = 6


def listed_modules(
    checkpoint: CheckpointFolder, modules: Mapping[str, Iterable[str]]
) -> list[Callable[[str, Any], bool]]:
    """Returns `ignored_modules` of `config.json`, or else of ModelOpt's own file.

    Args:
        checkpoint: The folder with both files.
        modules: For every module's path, the names of its tensors.
    """
    listed = ignored_modules(checkpoint.config, checkpoint.config_path, modules)
    if listed or checkpoint.modelopt is None:
        return listed
    path = checkpoint.path / MODELOPT_FILE
    return ignored_modules(checkpoint.modelopt, path, modules, "quantization")


def ignored_modules(
    config: Mapping[str, Any],
    where: Path,
    modules: Mapping[str, Iterable[str]],
    key: str = "quantization_config",
) -> list[Callable[[str, Any], bool]]:
    """Returns patterns of the parameters that a checkpoint's own lists exclude.

    The lists are those of `quantization_config` in `config.json`, or of `quantization`
    in ModelOpt's own file. An entry is

    - a regular expression after `re:`, which must match the start of a name;
    - a glob if it has a `*` or `?`, which must match a whole name;
    - otherwise a sequence of whole components of a name, dots between them:
      `model.layers.0`, `self_attn.q_proj` and `lm_head` select what is inside, and
      `mlp.gate` does not select `mlp.gate_proj`.

    Names are those of tensors in the checkpoint, with and without the last component
    (`.weight`) and with and without `model.` in front. A module is kept whole as soon
    as one of its names is listed: one expert keeps all experts of its layer, which are
    one stack and are converted together or not at all.

    Args:
        config: Content of the file.
        where: Path of that file, for messages.
        modules: For every module's path, the names of its tensors.
        key: Where in the file the lists are.

    Returns:
        Functions of a parameter's path and value, one per entry that selects anything.
        Their `__name__` says where the entry is.

    Raises:
        CheckpointError: If a list is not one of strings, or a regular expression is
            malformed, or so made that matching it may take forever.
    """
    spellings = {path: _spellings(names) for path, names in modules.items()}
    patterns = []
    for name, entry in _entries(config, where, key):
        matches = _compile(entry, f"{where}: {key}.{name}")
        chosen = frozenset(
            path for path, names in spellings.items() if any(map(matches, names))
        )
        if chosen:
            patterns.append(
                module_pattern(f"`{entry}` in {where.name}'s {name}", chosen)
            )
    return patterns


def _entries(config: Mapping[str, Any], where: Path, key: str) -> list[tuple[str, str]]:
    quantization = config.get(key)
    if quantization is None:
        return []
    if not isinstance(quantization, dict):
        raise CheckpointError(f"{where}: {key} must be an object")
    result = []
    for name in _LISTS:
        entries = quantization.get(name)
        if entries is None:
            continue
        if not isinstance(entries, list) or not all(
            isinstance(entry, str) for entry in entries
        ):
            raise CheckpointError(f"{where}: {key}.{name} must be a list of strings")
        result += [(name, entry) for entry in entries]
    return result


def _spellings(names: Iterable[str]) -> list[str]:
    """Returns a module's names in every form that a list may use."""
    result = []
    for name in names:
        bare = name.removeprefix("model.")
        result += dict.fromkeys(
            (name, bare, name.rpartition(".")[0], bare.rpartition(".")[0])
        )
    return list(dict.fromkeys(result))


def _compile(entry: str, where: str) -> Callable[[str], bool]:
    if entry.startswith("re:"):
        if _may_take_forever(entry):
            raise CheckpointError(
                f"{where}: {entry!r} repeats what repeats itself, or more than "
                f"{_MAX_REPEATS} times, and could take forever to match; list the "
                "modules in several simpler entries"
            )
        try:
            expression = re.compile(entry.removeprefix("re:"))
        except re.error as error:
            raise CheckpointError(
                f"{where}: {entry!r} is not a regular expression: {error}"
            ) from None
        return lambda name: expression.match(name) is not None
    if "*" in entry or "?" in entry:
        glob = re.compile(fnmatch.translate(entry))
        return lambda name: glob.match(name) is not None
    components = f".{entry.strip('.')}."
    return lambda name: components in f".{name}."


def _may_take_forever(expression: str) -> bool:
    """Tells whether a regular expression is one that may backtrack without end.

    That is: a repeated group has a choice or a repetition in it, or there are many
    repetitions one after the other.
    """
    plain = re.sub(r"\\.", "x", expression)  # what is escaped repeats nothing
    plain = re.sub(r"\[\^?\]?[^\]]*\]", "x", plain)
    open_groups, repeats = [False], 0
    for i, c in enumerate(plain):
        if c == "(":
            open_groups.append(False)
        elif c == ")" and len(open_groups) > 1:
            branches = open_groups.pop()
            if branches and plain[i + 1 : i + 2] in ("*", "+", "{"):
                return True
            open_groups[-1] |= branches
        elif c in "*+{|":
            open_groups[-1] = True
            repeats += c != "|"
    return repeats > _MAX_REPEATS


def module_pattern(name: str, modules: Set[str]) -> Callable[[str, Any], bool]:
    """Returns a pattern of the parameters of modules, which reports call by a name."""

    def is_listed(path: str, leaf: Any) -> bool:
        return path.rpartition("/")[0] in modules

    is_listed.__name__ = name
    return is_listed

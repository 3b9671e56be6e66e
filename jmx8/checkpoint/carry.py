"""The files of a checkpoint that are not weights: carried over, or written anew."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .errors import CheckpointError
from .folder import path_inside
from .formats import Format, MODELOPT_FILE
from .items import Item


CONFIG = "config.json"

# Tokenizers, chat templates, the code, the cards and the licences of models.
_SUFFIXES = frozenset(".json .jinja .txt .model .tiktoken .py .md .vocab .spm".split())
_NAMES = re.compile(r"(?i)(licen[sc]e|notice|use_policy).*")
_WRITTEN_ANEW = re.compile(rf"{CONFIG}|{MODELOPT_FILE}|.*\.index\.json")

_FP8_CACHE = {"num_bits": 8, "type": "float", "dynamic": False}

# Weights of this name are no linear layers, so no engine looks for them in a list.
_EMBEDDING = re.compile(r"(?i)(^|\.)\w*embed\w*(\.|$)|(^|\.)(wte|wpe)(\.|$)")


def carried_files(source: Path) -> dict[str, bytes]:
    """Returns the contents of the files that a conversion does not change, by name."""
    result = {}
    for path in sorted(source.iterdir()):
        name = path.name
        wanted = path.suffix in _SUFFIXES or _NAMES.fullmatch(name)
        if not wanted or name.startswith(".") or _WRITTEN_ANEW.fullmatch(name):
            continue
        if path.is_file():
            result[name] = path_inside(source, name).read_bytes()
    return result


def config_files(
    config: Mapping[str, Any],
    modelopt: Mapping[str, Any] | None,
    form: Format,
    items: Iterable[Item],
) -> dict[str, bytes]:
    """Returns `config.json`, and what else a format wants, by name.

    Args:
        config: Content of the source's `config.json`; what it says about an earlier
            quantization is replaced, but for that of the key-value cache.
        modelopt: Content of its `hf_quant_config.json`, None if it has none.
        form: The format.
        items: Everything that is written.
    """
    kept = kept_modules(items)
    quantization = form.quantization_config(kept)
    side_files = form.side_file_contents(kept)
    cache = _cache_scheme(config, modelopt)
    if cache is not None:
        quantization["kv_cache_scheme"] = cache
        for content in side_files.values():
            content["quantization"]["kv_cache_quant_algo"] = "FP8"
    new = {key: x for key, x in config.items() if key != "quantization_config"}
    contents = {CONFIG: new | {"quantization_config": quantization}, **side_files}
    return {name: _json(content) for name, content in contents.items()}


def _cache_scheme(
    config: Mapping[str, Any], modelopt: Mapping[str, Any] | None
) -> Mapping[str, Any] | None:
    """Returns how the key-value cache is quantized, which may be as FP8 or not at all.

    Raises:
        CheckpointError: If it is quantized as anything else.
    """
    quantization = config.get("quantization_config")
    scheme = None
    if isinstance(quantization, Mapping):
        scheme = quantization.get("kv_cache_scheme")
    if scheme is None and modelopt is not None:
        name = (modelopt.get("quantization") or {}).get("kv_cache_quant_algo")
        scheme = name and _FP8_CACHE if name in (None, "FP8") else {"name": name}
    if scheme is None:
        return None
    if not isinstance(scheme, Mapping) or any(
        scheme.get(key) != _FP8_CACHE[key] for key in ("num_bits", "type")
    ):
        raise CheckpointError(
            f"{CONFIG}: the scheme of the key-value cache must be FP8, got {scheme}"
        )
    return scheme


def kept_modules(items: Iterable[Item]) -> list[str]:
    """Returns the modules that a format's list of unquantized layers has to name.

    `lm_head` is among them also where it is tied and no tensor is called so: engines
    make the layer nevertheless.
    """
    kept = ["lm_head"]
    for item in items:
        for target in item.targets:
            module = re.sub(r"\.(weight|gate_up_proj|down_proj)$", "", target.name)
            if item.dtype is None:
                if module == "lm_head":
                    kept.remove("lm_head")
            elif len(target.shape) >= 2 and not _EMBEDDING.search(module):
                kept.append(module)
    return list(dict.fromkeys(kept))


def check_apart(source: Path, folder: Path) -> None:
    """Checks that nothing is written into the source.

    Raises:
        CheckpointError: If `folder` is `source` or inside it.
    """
    inner, outer = folder.resolve(), source.resolve()
    if inner == outer or outer in inner.parents:
        raise CheckpointError(
            f"{folder}: lies in {source}, which is only read; name another folder"
        )


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()

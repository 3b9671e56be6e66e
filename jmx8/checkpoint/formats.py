"""How MXFP8 checkpoints are stored: one record per format, for reading and writing.

All of them store a weight `[..., n, k]` as a tensor of E4M3 elements and, beside it, a
tensor of scales, one for each block of rows and columns. A scale is a power of two:
byte c stands for `2**(c - 127)`, and an element is multiplied by it, also where the
name ends in `_inv`. They differ in how the scales are called and in what `config.json`
says.
"""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from .errors import CheckpointError


# Side file of ModelOpt, which older versions write instead of `quantization_config`.
MODELOPT_FILE = "hf_quant_config.json"

# What scales that are exponents may be stored as; the bytes are the same.
E8M0_DTYPES = (np.dtype(np.uint8), np.dtype(ml_dtypes.float8_e8m0fnu))


@dataclasses.dataclass(frozen=True)
class Format:
    """One way to store MXFP8.

    Attributes:
        name: What it is called on the command line and in messages.
        scale_suffix: What follows a weight's name in the name of its scales:
            `q_proj.weight` has `q_proj.weight_scale`.
        block: Rows and columns of a block of elements that share a scale.
        scale_dtypes: Dtypes that its scales may have; the first is written.
        config: `quantization_config` of a checkpoint, without the ignore lists.
        ignore_keys: Under which keys of it unquantized modules are listed.
        side_files: Further JSON files, by name, without the list of modules.
    """

    name: str
    scale_suffix: str
    block: tuple[int, int] = (1, 32)
    scale_dtypes: tuple[np.dtype, ...] = E8M0_DTYPES
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ignore_keys: tuple[str, ...] = ()
    side_files: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def scale_name(self, weight: str) -> str:
        """Returns the name of the scales of a weight, `experts.down_proj` included."""
        return f"{weight}{self.scale_suffix}"

    def quantization_config(self, kept: Sequence[str]) -> dict[str, Any]:
        """Returns what `config.json` holds as `quantization_config`.

        Args:
            kept: Full names of the modules that are not quantized, such as `lm_head`
                and `model.layers.0.mlp.gate`. Every reader takes these literally.
        """
        config = copy.deepcopy(dict(self.config))
        return config | {key: list(kept) for key in self.ignore_keys}

    def side_file_contents(self, kept: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Returns the JSON objects to write beside `config.json`, by file name."""
        contents = copy.deepcopy(dict(self.side_files))
        for content in contents.values():
            content["quantization"]["exclude_modules"] = list(kept)
        return contents


def _float8(**fields: Any) -> dict[str, Any]:
    return {"num_bits": 8, "type": "float", "group_size": 32} | fields


_CT_FLOAT8 = _float8(
    strategy="group", symmetric=True, scale_dtype="torch.uint8", zp_dtype="torch.uint8"
)

MODELOPT = Format(
    name="modelopt",
    scale_suffix="_scale",
    config={
        "quant_method": "modelopt",
        "quant_algo": "MXFP8",
        "config_groups": {
            "group_0": {
                "input_activations": _float8(dynamic=True),
                "weights": _float8(dynamic=False),
                "targets": ["Linear"],
            }
        },
        # Readers take this for the name of the format, and refuse any other.
        "producer": {"name": "modelopt"},
    },
    ignore_keys=("ignore",),
    side_files={
        MODELOPT_FILE: {
            "producer": {"name": "modelopt"},
            "quantization": {
                "quant_algo": "MXFP8",
                "kv_cache_quant_algo": None,
                "group_size": 32,
            },
        }
    },
)
COMPRESSED_TENSORS = Format(
    name="compressed-tensors",
    scale_suffix="_scale",
    config={
        "quant_method": "compressed-tensors",
        "format": "mxfp8-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": _CT_FLOAT8 | {"dynamic": False},
                "input_activations": _CT_FLOAT8 | {"dynamic": True},
            }
        },
    },
    ignore_keys=("ignore",),
)
MXFP8 = Format(
    name="mxfp8",
    scale_suffix="_scale_inv",
    config={
        "quant_method": "mxfp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [1, 32],
        "scale_fmt": "ue8m0",
    },
    # Some readers know only the one, some only the other.
    ignore_keys=("modules_to_not_convert", "ignored_layers"),
)
# DeepSeek's. Where its scales are powers of two it is MXFP8 with repeated scales.
FP8_BLOCKS = Format(
    name="fp8-blocks",
    scale_suffix="_scale_inv",
    block=(128, 128),
    scale_dtypes=(np.dtype(np.float32), *E8M0_DTYPES),
)

# Every suffix that scales may have. That of a stack of experts, whose own name does not
# end in `.weight`, may say so.
_SUFFIXES = ("_scale", "_scale_inv")
_STACK_SUFFIXES = (*_SUFFIXES, "_weight_scale", "_weight_scale_inv")

# What follows a module's name in the names of torchao's elements and scales.
TORCHAO_NAMES = ("._weight_qdata", "._weight_scale")
# What torchao's tensors become in a file. Not written: it wants metadata of its own.
TORCHAO = Format(
    name="torchao",
    scale_suffix=TORCHAO_NAMES[1],
    scale_dtypes=E8M0_DTYPES[::-1],
)

WRITABLE: Mapping[str, Format] = {
    form.name: form for form in (MODELOPT, COMPRESSED_TENSORS, MXFP8)
}


def scale_names(weight: str) -> list[str]:
    """Returns every name that the scales of a weight may have, in any format."""
    suffixes = _SUFFIXES if weight.endswith("weight") else _STACK_SUFFIXES
    return [weight + suffix for suffix in suffixes]


def recognize(config: Mapping[str, Any], path: Path) -> Format | None:
    """Returns the format that a checkpoint's config names.

    Args:
        config: Content of `config.json` or of `hf_quant_config.json`.
        path: Path of that file, for messages.

    Returns:
        The format, or None if the config names none. Some layers may be unquantized all
        the same, or all of them.

    Raises:
        CheckpointError: If it names one that is not read here.
    """
    key = "quantization"
    if path.name != MODELOPT_FILE:
        key = "quantization_config"
    quantization = config.get(key)
    if quantization is None:
        return None
    if not isinstance(quantization, Mapping):
        raise CheckpointError(f"{path}: {key} must be an object")
    method = quantization.get("quant_method")
    if path.name == MODELOPT_FILE:
        method = "modelopt"
    if method is None:
        return None
    found, wanted = _by_method(method, quantization)
    if found is None:
        raise CheckpointError(
            f"{path}: {key}: {wanted}; read are ModelOpt's MXFP8, compressed-tensors "
            "mxfp8-quantized, mxfp8, and fp8 with weight_block_size [128, 128]. Load "
            "the unquantized checkpoint, which is converted on the way"
        )
    return found


def _by_method(
    method: Any, quantization: Mapping[str, Any]
) -> tuple[Format | None, str]:
    """Returns the format of a quant_method, and what is not read if there is none."""
    if method == "modelopt":
        # Of mixed precisions every tensor is looked at by itself.
        algorithm = quantization.get("quant_algo")
        known = algorithm in ("MXFP8", "MIXED_PRECISION")
        return (MODELOPT if known else None), f"quant_algo {algorithm!r} is not read"
    if method == "compressed-tensors":
        layout = quantization.get("format")
        known = layout in ("mxfp8-quantized", "mixed-precision")
        return (COMPRESSED_TENSORS if known else None), f"format {layout!r} is not read"
    if method == "torchao":
        return TORCHAO, ""
    if method in ("mxfp8", "fp8"):
        default = [1, 32] if method == "mxfp8" else None
        block = quantization.get("weight_block_size", default)
        found = {"[1, 32]": MXFP8, "[128, 128]": FP8_BLOCKS}.get(str(block))
        return found, f"{method} with weight_block_size {block!r} is not read"
    return None, f"quant_method {method!r} is not read"

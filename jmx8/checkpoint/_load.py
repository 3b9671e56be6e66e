"""`load`: from a Hugging Face checkpoint folder to a model in MXFP8."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import (
    Any,
    get_args,
    Literal,
    overload,
    TYPE_CHECKING,
    TypedDict,
    Unpack,
)

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._mx_array import MXArray
from .._options import Activations, Framework, LoadDtype
from ..convert import (
    combine_pieces,
    kept_row,
    measure_piece,
    Patterns,
    Piece,
    quantize_model,
    Report,
)
from ..models import ConfigError, Qwen3, Qwen3Config
from ..nn import prepare
from .errors import CheckpointError
from .folder import CheckpointFolder, open_folder
from .ignore import listed_modules, module_pattern
from .names import NameTable, QWEN3
from .plan import check_copies, make_plan, Plan
from .stored import find_weights, Weight
from .stream import Progress, read_parameters


if TYPE_CHECKING:
    from ..models import qwen3_nnx


@dataclasses.dataclass(frozen=True)
class _Family:
    config: type[Qwen3Config]
    model: type[Qwen3]
    names: NameTable


_FAMILIES = {
    "qwen3": _Family(Qwen3Config, Qwen3, QWEN3),
    "qwen3_moe": _Family(Qwen3Config, Qwen3, QWEN3),
}


class _Options(TypedDict, total=False):
    dtype: LoadDtype
    skip: Patterns
    only: Patterns
    activations: Activations
    on_nonfinite: Literal["raise", "keep"]
    requantize: bool
    progress: Progress | None


@overload
def load(
    folder: Path | str,
    *,
    framework: Literal["equinox"] = ...,
    return_report: Literal[False] = ...,
    **options: Unpack[_Options],
) -> Qwen3: ...


@overload
def load(
    folder: Path | str,
    *,
    framework: Literal["equinox"] = ...,
    return_report: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Qwen3, Report]: ...


@overload
def load(
    folder: Path | str,
    *,
    framework: Literal["nnx"],
    return_report: Literal[False] = ...,
    **options: Unpack[_Options],
) -> "qwen3_nnx.Qwen3": ...


@overload
def load(
    folder: Path | str,
    *,
    framework: Literal["nnx"],
    return_report: Literal[True],
    **options: Unpack[_Options],
) -> "tuple[qwen3_nnx.Qwen3, Report]": ...


def load(
    folder: Path | str,
    *,
    framework: Framework = "equinox",
    dtype: LoadDtype = "mxfp8",
    skip: Patterns = None,
    only: Patterns = None,
    activations: Activations = "auto",
    on_nonfinite: Literal["raise", "keep"] = "raise",
    requantize: bool = False,
    progress: Progress | None = None,
    return_report: bool = False,
) -> Any:
    """Loads a Hugging Face checkpoint folder and converts it on the way.

    Tensors are read a few rows at a time, in the order in which they lie on disk, and
    converted on the default device. The unconverted model is never in memory: the peak
    is the size of the result and some chunks of 4 MiB. The tensors of the experts of a
    layer become one stack. Weights that the kernels of this device want laid out are,
    see `prepare`.

    Weights may be stored in bfloat16, float16 or float32; in MXFP8 as ModelOpt,
    compressed-tensors, SGLang (`quant_method` mxfp8) and torchao write it, whose bytes
    are taken over; and in FP8 with a scale for 128 x 128 elements, whose bytes are
    taken over too, with the scale repeated, where it is a power of two. Each tensor is
    looked at by itself. In a checkpoint that has any quantized weight, layers that it
    stores unquantized stay so, and its lists of such layers are not needed; experts of
    which some are stored unquantized are all kept in bfloat16. A quantized weight that
    `dtype`, `skip` or `only` keeps out of MXFP8 is dequantized, which is exact.

    The weights of the checkpoint and the parameters of the model that `config.json`
    describes must be the same, neither more nor fewer. Experts may be stored one by
    one, or as one tensor `[e, n, k]` or `[e, k, n]` per layer. Supported are
    `model_type` qwen3 and qwen3_moe.

    Args:
        folder: Folder with `config.json` and `*.safetensors` files.
        framework: What the model is made of: Equinox modules, or Flax NNX ones that
            have the same parameters under the same names, and give the same bits.
        dtype: "mxfp8" converts the weights of linear layers and experts from the dtype
            on disk, and everything else to bfloat16. "bfloat16" and "float32" convert
            everything to that dtype and nothing to MXFP8.
        skip: Patterns of layers to keep in bfloat16, besides `DEFAULT_SKIP` and what
            `quantization_config` in `config.json` lists; see `quantize_model` and
            `ignored_modules`.
        only: Patterns of the layers to convert, stored unquantized or not.
            `DEFAULT_SKIP` does not apply then; `skip` and the checkpoint's lists do.
        activations: See `quantize_model`.
        on_nonfinite: "raise" refuses NaN and infinity in any weight; "keep" converts
            them as `quantize` says, or as they are stored.
        requantize: Whether weights in blocks of FP8 whose scales are not powers of two
            may be rounded a second time. They are refused otherwise.
        progress: Called after every chunk with the bytes read so far, the bytes in all,
            and the name of the tensor.
        return_report: Whether to return a `Report` too, which costs one more pass over
            what is converted.

    Returns:
        The model, or that and a report with one row per parameter. Dtypes and
        `bytes_before` in it are those on disk; what was taken over has no error.

    Raises:
        CheckpointError: If the folder does not hold such a model, whole and intact. All
            tensors that are missing, unknown, given twice, or of the wrong shape or
            dtype are in one error, and it is raised before any weight is read.
        ValueError: If a pattern matches nothing, or an argument has no such value.
        ModuleNotFoundError: If `framework` is "nnx" and Flax is not installed.
    """
    _check_arguments(dtype, skip, only, on_nonfinite)
    to_framework = _to_framework(framework)
    checkpoint = open_folder(folder)
    family = _family(checkpoint)
    weights = _weights(checkpoint)
    model, report = _abstract_model(
        checkpoint, weights, family, dtype, skip, only, activations
    )
    leaves = _leaves(model)
    plan = make_plan(checkpoint, weights, leaves, family.names, requantize=requantize)
    check_copies(plan)
    pieces: dict[str, list[Piece]] = {}

    def measure_rows(path: str, x: Array, w: MXArray) -> None:
        pieces.setdefault(path, []).append(measure_piece(x, w))

    values = read_parameters(
        plan,
        leaves,
        check_finite=on_nonfinite == "raise",
        progress=progress,
        on_chunk=measure_rows if return_report else None,
    )
    structure = jax.tree.structure(model, is_leaf=_is_mx_array)
    # No reference is kept: what is laid out anew is freed layer by layer.
    taken = (values.pop(path) for path in leaves)
    model = to_framework(prepare(jax.tree.unflatten(structure, taken)))
    return (model, _finish(report, plan, pieces)) if return_report else model


def _check_arguments(dtype: Any, skip: Any, only: Any, on_nonfinite: Any) -> None:
    if dtype not in get_args(LoadDtype):
        raise ValueError(
            f"load: dtype must be one of {get_args(LoadDtype)}, got {dtype!r}."
        )
    if on_nonfinite not in ("raise", "keep"):
        raise ValueError(
            f'load: on_nonfinite must be "raise" or "keep", got {on_nonfinite!r}.'
        )
    if dtype != "mxfp8" and not (skip is None and only is None):
        raise ValueError(
            f"load: skip and only choose what becomes MXFP8, got {dtype=}, which "
            "converts nothing to it. Leave them out."
        )


def _to_framework(framework: Any) -> Callable[[Qwen3], Any]:
    """Returns what makes a model of the framework from one in Equinox."""
    if framework not in get_args(Framework):
        raise ValueError(
            f"load: framework must be one of {get_args(Framework)}, got {framework!r}."
        )
    if framework == "equinox":
        return lambda model: model
    from ..models import qwen3_nnx  # imports Flax

    return qwen3_nnx.Qwen3


def _family(checkpoint: CheckpointFolder) -> _Family:
    model_type = checkpoint.config.get("model_type")
    if not isinstance(model_type, str) or model_type not in _FAMILIES:
        got = "is missing" if model_type is None else f"{model_type!r} is not supported"
        raise CheckpointError(
            f"{checkpoint.config_path}: model_type {got}; supported: "
            f"{', '.join(_FAMILIES)}"
        )
    return _FAMILIES[model_type]


def _weights(checkpoint: CheckpointFolder) -> dict[str, Weight]:
    """Returns the weights of a checkpoint, whose config names a format that is read."""
    checkpoint.format  # noqa: B018  (raises if it does not)
    return find_weights(checkpoint)


def _abstract_model(
    checkpoint: CheckpointFolder,
    weights: Mapping[str, Weight],
    family: _Family,
    dtype: LoadDtype,
    skip: Patterns,
    only: Patterns,
    activations: Activations,
) -> tuple[Qwen3, Report]:
    """Returns the model to be filled and what is converted in it, and why not."""
    try:
        config = family.config.from_hf(checkpoint.config)
    except ConfigError as error:
        raise CheckpointError(f"{checkpoint.config_path}: {error}") from None
    model = eqx.filter_eval_shape(
        family.model,
        config,
        dtype=jnp.dtype(jnp.float32 if dtype == "float32" else jnp.bfloat16),
        key=jax.eval_shape(jax.random.key, 0),
    )
    leaves = _leaves(model)
    if dtype != "mxfp8":
        rows = [kept_row(path, x, f"loaded as {dtype}") for path, x in leaves.items()]
        return model, Report(tuple(rows))
    if any(weight.scales is not None for weight in weights.values()):
        listed = _unquantized(weights, leaves, family.names) if only is None else []
    else:
        listed = _listed(checkpoint, leaves, family.names)
    return quantize_model(
        model,
        skip=[*_as_list(skip), *listed],
        only=only,
        activations=activations,
        return_report=True,
    )


def _listed(
    checkpoint: CheckpointFolder, leaves: Mapping[str, Any], table: NameTable
) -> list[Callable[[str, Any], bool]]:
    """Returns patterns of what the checkpoint's own lists keep."""
    modules: dict[str, list[str]] = {}
    for path, leaf in leaves.items():
        names = table.names(path, leaf.shape)
        modules.setdefault(path.rpartition("/")[0], []).extend(names)
    return listed_modules(checkpoint, modules)


def _unquantized(
    weights: Mapping[str, Weight], leaves: Mapping[str, Any], table: NameTable
) -> list[Callable[[str, Any], bool]]:
    """Returns a pattern of the modules of which some matrix is stored unquantized."""
    modules = {
        path.rpartition("/")[0]
        for path, leaf in leaves.items()
        for name in (table.names(path, leaf.shape) if len(leaf.shape) > 1 else ())
        if name in weights and weights[name].scales is None
    }
    return [module_pattern("stored unquantized", modules)] if modules else []


def _as_list(patterns: Patterns) -> list[str | Callable[[str, Any], bool]]:
    if patterns is None:
        return []
    if isinstance(patterns, str) or callable(patterns):
        return [patterns]
    return list(patterns)


def _leaves(model: Any) -> dict[str, Any]:
    """Returns the parameters by path, in tree order; an `MXArray` is one."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(model, is_leaf=_is_mx_array)
    return {
        jax.tree_util.keystr(keys, simple=True, separator="/"): leaf
        for keys, leaf in leaves
    }


def _is_mx_array(node: Any) -> bool:
    return isinstance(node, MXArray)


def _finish(
    report: Report, plan: Plan, pieces: Mapping[str, Sequence[Piece]]
) -> Report:
    """Returns the report of the abstract model with what was found on disk."""
    dtypes: dict[str, set[str]] = {}
    num_bytes: dict[str, int] = {}
    rounded: set[str] = set()  # paths of which a part is not taken over
    for part in plan.parts:
        weight = part.weight
        dtypes.setdefault(part.path, set()).add(str(weight.source.info.dtype))
        num_bytes[part.path] = num_bytes.get(part.path, 0) + weight.nbytes
        if not weight.is_mxfp8:
            rounded.add(part.path)
    return Report(
        tuple(
            dataclasses.replace(
                row,
                reason=(
                    row.reason
                    if row.action == "kept" or row.path in rounded
                    else "stored as MXFP8"
                ),
                dtype="/".join(sorted(dtypes[row.path])),
                bytes_before=num_bytes[row.path],
                statistics=(
                    combine_pieces(pieces[row.path]) if row.path in pieces else None
                ),
            )
            for row in report.rows
        )
    )

"""`jmx8 doctor`: what this machine has, and which backends can run on it."""

import importlib.metadata
import platform
from typing import Any

import jax
import jax.numpy as jnp

from .._device import compute_capability, default_device, resolve_activations
from .._mx_array import quantize
from ..kernels._adapter import adapter_path, adapter_unavailable
from ..kernels.flashinfer import modules
from ..kernels.sm90 import library
from ..ops._dispatch import Op
from ..ops.matmul import OPS as MATMUL_OPS
from ..ops.moe import OPS as MOE_OPS
from ..ops.routed_moe import OPS as ROUTED_MOE_OPS
from ..ops.routing import OPS as ROUTING_OPS


_PACKAGES = (
    "jmx8",
    "jax",
    "jaxlib",
    "equinox",
    "ml_dtypes",
    "numpy",
    "flax",
    "flashinfer-python",
    "jax-tvm-ffi",
    "apache-tvm-ffi",
    "cuda-tile",
)


def diagnose() -> dict[str, Any]:
    """Returns what `doctor` prints, as JSON values."""
    device = default_device()
    capability = compute_capability()
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "devices": [
            f"{d.platform}:{d.id} {d.device_kind}" for d in jax.local_devices()
        ],
        "default_device": f"{device.platform} ({device.device_kind})",
        "compute_capability": None
        if capability is None
        else ".".join(map(str, capability)),
        "activations_auto": resolve_activations("auto"),
        "ffi_adapter": _adapter_facts(),
        "sm90": library.diagnose(),
        "modules": [] if capability is None else modules.diagnose(capability),
        "backends": [row for op in _example_calls() for row in _backends(*op)],
    }


def format_diagnosis(facts: dict[str, Any]) -> str:
    """Returns the facts of `diagnose` as text."""
    capability = facts["compute_capability"] or "none (not an NVIDIA GPU)"
    meaning = {"bf16": "W8A16", "mxfp8": "W8A8"}[facts["activations_auto"]]
    lines = [
        f"python               {facts['python']}",
        *(f"{n:<20} {v or 'not installed'}" for n, v in facts["packages"].items()),
        "",
        f"devices              {', '.join(facts['devices'])}",
        f"default device       {facts['default_device']}",
        f"compute capability   {capability}",
        f'activations "auto"   {facts["activations_auto"]} ({meaning})',
        f"ffi adapter          {facts['ffi_adapter']['answer']}",
        f"sm90 kernels         {_library_answer(facts['sm90'])}",
        "",
        f"{'op':<20} {'backend':<20} can run here",
    ]
    for row in facts["backends"]:
        answer = "yes" if row["problem"] is None else f"no: {row['problem']}"
        lines.append(f"{row['op']:<20} {row['backend']:<20} {answer}")
    if facts["modules"]:
        lines += ["", f"{'FlashInfer module':<26} is built"]
    for row in facts["modules"]:
        lines.append(f"{row['module']:<26} {_module_answer(row)}")
    return "\n".join(lines)


def _adapter_facts() -> dict[str, Any]:
    problem = adapter_unavailable()
    if problem is not None:
        return {"path": None, "answer": f"no: {problem}"}
    path = adapter_path()
    answer = f"built, {path}" if path.exists() else "compiled at the first call"
    return {"path": str(path), "answer": answer}


def _library_answer(row: dict[str, Any]) -> str:
    if row["path"] is not None:
        origin = "from the wheel, built" if row["is_prebuilt"] else "built"
        answer = f"{origin} in {row['seconds']:.0f} s"
        answer += f" by nvcc {row['nvcc']}, {row['path']}"
    elif row["problem"] is not None:
        answer = f"no: {row['problem']}"
    else:
        answer = "compiled at the first call"
    return "; ".join(filter(None, [answer, row["prebuilt_problem"]]))


def _module_answer(row: dict[str, Any]) -> str:
    if row["path"] is None:
        return f"no: {row['problem']}" if row["problem"] else "no, at the first call"
    seconds = f", in {row['seconds']:.0f} s" if row["seconds"] else ""
    return f"yes{seconds}, {row['path']}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _example_calls() -> list[tuple[Op, tuple[Any, ...], dict[str, Any]]]:
    """Returns each op with operands of an ordinary layer, all abstract."""
    bf16 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    mx = lambda *shape: jax.eval_shape(quantize, bf16(*shape))
    ids = jax.ShapeDtypeStruct((16, 2), jnp.int32)
    weights = jax.ShapeDtypeStruct((16, 2), jnp.float32)
    layer = (bf16(16, 512), mx(8, 1024, 512), mx(8, 512, 512))
    moe = (*layer, ids, weights, None, None)
    moe_options = {"activation": "silu", "apply_router_weight_on_input": False}
    matmul = (bf16(16, 512), mx(1024, 512))
    routing = (bf16(16, 8), None)
    routing_options = {
        "method": "softmax",
        "top_k": 2,
        "renormalize": True,
        "num_groups": 1,
        "topk_groups": 1,
        "scaling_factor": 1.0,
    }
    routed_moe = (*layer, *routing, None, None, None)
    routed_moe_options = {
        **routing_options,
        "activation": "silu",
        "local_expert_offset": 0,
        "num_local_experts": 8,
    }
    return [
        *((op, matmul, {"out_dtype": jnp.dtype(jnp.bfloat16)}) for op in MATMUL_OPS),
        *((op, routing, routing_options) for op in ROUTING_OPS),
        *((op, moe, moe_options) for op in MOE_OPS),
        *((op, routed_moe, routed_moe_options) for op in ROUTED_MOE_OPS),
    ]


def _backends(op: Op, canonical: tuple[Any, ...], options: dict[str, Any]):
    for backend in op.backends:
        operands = canonical
        if backend.prepare is not None:
            operands = jax.eval_shape(backend.prepare, *canonical)
        problem = backend.unsupported(*operands, **options)
        yield {"op": op.name, "backend": backend.name, "problem": problem}

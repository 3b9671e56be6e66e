"""What FlashInfer's own Python wrappers pass to their compiled modules.

The wrappers run on tensors in host memory. What they would load is replaced by a
recorder, and what asks for a GPU by the answers that a B200 would give.
"""

import contextlib
import importlib
import os
import sys
import tempfile
from typing import Any, NamedTuple

import pytest
import torch


os.environ.setdefault("FLASHINFER_CUDA_ARCH_LIST", "10.0a")
os.environ.setdefault("FLASHINFER_WORKSPACE_BASE", tempfile.gettempdir())

flashinfer: Any = importlib.import_module("flashinfer")
moe_core = importlib.import_module("flashinfer.fused_moe.core")
gemm_base = importlib.import_module("flashinfer.gemm.gemm_base")
fp8_quantization = importlib.import_module("flashinfer.quantization.fp8_quantization")


CAPABILITY = (10, 0)

_MOST_BYTES = 4 << 20


class Argument(NamedTuple):
    """One positional argument of a call.

    Attributes:
        kind: "none", "bool", "int", "float", "str", "dtype", "list" or "tensor".
        dtype: Of a tensor, in torch's spelling without "torch."; else "".
        shape: Of a tensor; else ().
        value: A constant; a list's arguments; a tensor's bytes, None if it has none or
            is scratch memory by its size.
    """

    kind: str
    dtype: str = ""
    shape: tuple[int, ...] = ()
    value: Any = None


def describe(value: Any) -> Argument:
    """Returns the record of an argument that was passed to a TVM-FFI function."""
    if value is None:
        return Argument("none")
    if isinstance(value, bool):
        return Argument("bool", value=value)
    if isinstance(value, int):
        return Argument(
            "int", value=int(value)
        )  # an enumeration is passed as its value
    if isinstance(value, float | str):
        return Argument(type(value).__name__, value=value)
    if isinstance(value, torch.dtype):
        return Argument("dtype", value=str(value).removeprefix("torch."))
    if isinstance(value, torch.Tensor):
        return _describe_tensor(value)
    if isinstance(value, list | tuple):
        return Argument("list", value=[describe(item) for item in value])
    raise TypeError(f"no record for {value!r}")


def _describe_tensor(tensor: torch.Tensor) -> Argument:
    if tensor.device.type == "meta" or tensor.nbytes > _MOST_BYTES:
        data = None
    else:
        assert tensor.is_contiguous()
        data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Argument("tensor", dtype, tuple(tensor.shape), data)


class Recorder:
    """Stands for a loaded module, whose functions only note what they are given.

    Attributes:
        calls: The calls so far: pairs of a function's name and its arguments.
        returns: What some of the functions return; None where not given.
    """

    def __init__(self, **returns: Any):
        self.calls: list[tuple[str, list[Argument]]] = []
        self.returns = returns

    def __getattr__(self, name: str):
        def function(*args):
            self.calls.append((name, [describe(arg) for arg in args]))
            return self.returns.get(name)

        return function

    def only(self, name: str) -> list[Argument]:
        """Returns the arguments of the one call of `name`."""
        (arguments,) = [arguments for called, arguments in self.calls if called == name]
        return arguments


class _Generated:
    """Stands for what FlashInfer's module generators return."""

    def __init__(self, module: Recorder):
        self._module = module

    def build_and_load(self) -> Recorder:
        return self._module

    def get_library_paths(self) -> tuple[str, ...]:
        return ()


@contextlib.contextmanager
def recorded(
    where: Any,
    generator: str,
    caches: list[Any],
    module: Recorder,
    capability=CAPABILITY,
):
    """Puts `module` in the place of what `where.generator` would build and load."""
    with pytest.MonkeyPatch.context() as patch:
        for name, loaded in list(sys.modules.items()):
            if name.partition(".")[0] != "flashinfer" or loaded is None:
                continue
            for attribute, answer in (
                ("get_compute_capability", capability),
                ("device_support_pdl", True),
            ):
                if attribute in vars(loaded):
                    patch.setattr(loaded, attribute, lambda _, answer=answer: answer)
        patch.setattr(where, generator, lambda *_, **__: _Generated(module))
        patch.setattr(torch.version, "cuda", "13.0")
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
        for cached in caches:
            cached.cache_clear()
        yield
    for cached in caches:
        cached.cache_clear()


def mxfp8_quantize(shape, dtype: torch.dtype, layout: int) -> list[Argument]:
    """Records `flashinfer.mxfp8_quantize`; without data, since that runs on a GPU."""
    module = Recorder()
    with recorded(
        fp8_quantization,
        "gen_mxfp8_quantization_sm100_module",
        [fp8_quantization.get_mxfp8_quantization_sm100_module],
        module,
    ):
        x = torch.empty(shape, dtype=dtype, device="meta")
        flashinfer.mxfp8_quantize(x, sf_swizzle_layout=flashinfer.SfLayout(layout))
    return module.only("mxfp8_quantize")


def mm_mxfp8(
    a, b, a_scales, b_scales, out_dtype: torch.dtype, capability=CAPABILITY
) -> list[Argument]:
    """Records `flashinfer.mm_mxfp8` with weights `[n, k]`."""
    module = Recorder(mxfp8_gemm_tactic_num=32)
    arch = "sm120" if capability[0] == 12 else "sm100"
    caches = [getattr(gemm_base, f"get_gemm_{arch}_module_cutlass_mxfp8")]
    if arch == "sm120":
        caches.append(gemm_base._load_gemm_sm120_mxfp8_module)
    generator = f"gen_gemm_{arch}_module_cutlass_mxfp8"
    with recorded(gemm_base, generator, caches, module, capability):
        flashinfer.mm_mxfp8(
            a, b.T, a_scales, b_scales, out_dtype=out_dtype, backend="cutlass"
        )
    return module.only("mxfp8_gemm")


def trtllm_fp8_block_scale_moe(**kwargs) -> list[Argument]:
    """Records `trtllm_fp8_block_scale_moe` or, given `topk_ids`, `..._routed_moe`."""
    wrapper = (
        flashinfer.trtllm_fp8_block_scale_routed_moe
        if "topk_ids" in kwargs
        else flashinfer.trtllm_fp8_block_scale_moe
    )
    output = torch.empty(kwargs["hidden_states"].shape, dtype=torch.bfloat16)
    module = Recorder(trtllm_fp8_block_scale_moe=[output])
    with recorded(
        moe_core,
        "gen_trtllm_gen_fused_moe_sm100_module",
        [moe_core._get_trtllm_moe_sm100_module_impl],
        module,
    ):
        wrapper(
            use_shuffled_weight=True,
            weight_layout=0,
            fp8_quantization_type=flashinfer.fused_moe.Fp8QuantizationType.MxFp8,
            **kwargs,
        )
    return module.only("trtllm_fp8_block_scale_moe")


def cutlass_fused_moe(**kwargs) -> tuple[list[Argument], list[Argument]]:
    """Records `flashinfer.fused_moe.cutlass_fused_moe`: its `init`, its `run_moe`."""
    runner = Recorder(get_gemm1_tactic_count=8, get_gemm2_tactic_count=8)
    module = Recorder(init=runner)
    with recorded(
        moe_core,
        "gen_cutlass_fused_moe_sm100_module",
        [moe_core.get_cutlass_fused_moe_module],
        module,
    ):
        flashinfer.fused_moe.cutlass_fused_moe(use_mxfp8_act_scaling=True, **kwargs)
    return module.only("init"), runner.only("run_moe")

"""Checkpoints that other packages' quantizers write, with their own dequantization.

`python -m tests.foreign_checkpoints TOOL FOLDER` writes a small Qwen3 as a checkpoint
folder, and into `FOLDER/expected` what the tool itself says the quantized weights are.
A process of its own, since these packages patch others when they are imported.
"""

import json
import sys
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers


CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
KEPT = "model.layers.0.mlp.down_proj"  # is left in bfloat16


def make_model():
    torch.manual_seed(0)
    config = transformers.Qwen3Config(**CONFIG)
    model = transformers.Qwen3ForCausalLM(config).bfloat16()
    with torch.no_grad():  # blocks of many magnitudes, one of them all zeros
        for x in model.parameters():
            if x.ndim == 2:
                x *= torch.exp2(torch.randint(-20, 20, (len(x), 1)))
                x[0, :32] = 0
    return model


def quantized_layers(model) -> dict[str, Any]:
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and name not in (KEPT, "lm_head")
    }


def write_modelopt(folder: Path):
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.quantization.qtensor import MXFP8QTensor

    model = make_model()
    expected = {}
    for name, layer in quantized_layers(model).items():
        tensor, scale = MXFP8QTensor.quantize(layer.weight.detach())
        expected[f"{name}.weight"] = tensor.dequantize(scale=scale)
    model = mtq.quantize(model, mtq.MXFP8_DEFAULT_CFG, lambda model: None)
    mtq.disable_quantizer(model, f"*{KEPT}*")
    export_hf_checkpoint(model, export_dir=str(folder))
    return expected


def write_compressed_tensors(folder: Path):
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        apply_quantization_config,
        QuantizationConfig,
        QuantizationStatus,
    )
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams

    model = make_model()
    config = QuantizationConfig(
        config_groups={"group_0": preset_name_to_scheme("MXFP8", ["Linear"])},
        ignore=["lm_head", KEPT],
        quantization_status=QuantizationStatus.INITIALIZED,
        format="mxfp8-quantized",
    )
    apply_quantization_config(model, config)
    for layer in quantized_layers(model).values():
        blocks = layer.weight.unflatten(-1, (-1, 32))
        arguments = layer.quantization_scheme.weights
        scale, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), arguments)
        layer.weight_scale.data = scale.to(layer.weight_scale.dtype)
    compressor = ModelCompressor(quantization_config=config)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    compressor.decompress_model(model)
    layers = quantized_layers(model)
    return {f"{name}.weight": layer.weight.detach() for name, layer in layers.items()}


def write_torchao(folder: Path):
    from torchao.prototype.mx_formats.mx_tensor import MXTensor, ScaleCalculationMode
    from torchao.prototype.safetensors.safetensors_support import (
        flatten_tensor_state_dict,
    )

    model = make_model()
    quantization = {"quantization_config": {"quant_method": "torchao"}}
    config = json.dumps(model.config.to_dict() | quantization)
    expected = {}
    # The second time with some scales as its kernels want them.
    for place, swizzled in ((folder, False), (folder / "swizzled", True)):
        state = dict(model.state_dict())
        for name in quantized_layers(model):
            tensor = MXTensor.to_mx(
                state[f"{name}.weight"],
                torch.float8_e4m3fn,
                32,
                ScaleCalculationMode.RCEIL,
                is_swizzled_scales=swizzled and name.endswith("q_proj"),
            )
            expected[f"{name}.weight"] = tensor.dequantize(torch.float32)
            state[f"{name}.weight"] = tensor
        tensors, metadata = flatten_tensor_state_dict(state)
        place.mkdir(exist_ok=True)
        safetensors.torch.save_file(tensors, place / "model.safetensors", metadata)
        (place / "config.json").write_text(config)
    return expected


TOOLS = {
    "modelopt": write_modelopt,
    "compressed-tensors": write_compressed_tensors,
    "torchao": write_torchao,
}


def main():
    tool, folder = sys.argv[1], Path(sys.argv[2])
    (folder / "expected").mkdir(parents=True)
    tensors = {
        name: x.detach().float().contiguous() for name, x in TOOLS[tool](folder).items()
    }
    safetensors.torch.save_file(tensors, folder / "expected" / "weights.safetensors")


if __name__ == "__main__":
    main()

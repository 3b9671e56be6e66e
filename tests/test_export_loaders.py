"""What is written, read by the package that defines its format."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.utils.quantization_config import CompressedTensorsConfig

from jmx8 import dequantize, quantize_checkpoint
from jmx8._mx_array import quantize

from . import hf


pytest.importorskip("compressed_tensors")


# It says that the config in the folder counts, which is what is wanted.
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_compressed_tensors_loads_the_weights_that_were_meant(tmp_path):
    fields = hf.DENSE | {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}
    original: Any = hf.random_hf_model(**fields)
    original = original.to(torch.bfloat16)
    original.save_pretrained(tmp_path / "in")
    report = quantize_checkpoint(
        tmp_path / "in", tmp_path / "out", format="compressed-tensors"
    )
    assert len(report.converted) == 7 * original.config.num_hidden_layers
    from_pretrained: Any = transformers.AutoModelForCausalLM.from_pretrained
    model, info = from_pretrained(
        tmp_path / "out",
        dtype=torch.bfloat16,
        quantization_config=CompressedTensorsConfig(dequantize=True),
        output_loading_info=True,
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    loaded = dict(model.named_parameters())
    converted = {row.path.replace("/", ".") for row in report.converted}
    for name, tensor in original.named_parameters():
        x = jnp.asarray(tensor.detach().float().numpy()).astype(jnp.bfloat16)
        wanted = np.asarray(x, np.float32)
        if name.removeprefix("model.") in converted:
            wanted = np.asarray(dequantize(quantize(x)))
        found = loaded[name].detach().float().numpy()
        np.testing.assert_array_equal(found, wanted, name)

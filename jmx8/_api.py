"""What `jmx8` offers; imported when something of it is first asked for."""

from . import nn as nn
from ._kernel_axes import KernelAxes as KernelAxes
from ._mx_array import dequantize as dequantize, MXArray as MXArray
from .checkpoint import (
    CheckpointError as CheckpointError,
    load as load,
    quantize_checkpoint as quantize_checkpoint,
    save as save,
    update_weights as update_weights,
)
from .convert import (
    DEFAULT_SKIP as DEFAULT_SKIP,
    quantize_model as quantize_model,
    quantize_params as quantize_params,
    Report as Report,
    ReportRow as ReportRow,
)
from .generation import generate as generate, perplexity as perplexity
from .nn import canonical as canonical, prepare as prepare
from .ops._dispatch import explain as explain, Explanation as Explanation
from .ops.autotune import autotune as autotune, Tuned as Tuned, Tuning as Tuning
from .ops.matmul import mx_matmul as mx_matmul, mx_matmul_w8a8 as mx_matmul_w8a8
from .ops.moe import (
    mx_moe as mx_moe,
    mx_moe_w8a8 as mx_moe_w8a8,
    SwiGLUOAI as SwiGLUOAI,
)
from .ops.quantize import quantize as quantize
from .ops.ragged_dot import (
    mx_ragged_dot as mx_ragged_dot,
    mx_ragged_dot_w8a8 as mx_ragged_dot_w8a8,
)
from .ops.routed_moe import mx_routed_moe_w8a8 as mx_routed_moe_w8a8
from .ops.routing import route as route
from .transform import quantized as quantized

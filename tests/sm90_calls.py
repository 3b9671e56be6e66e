"""Calls of the sm90 library on torch tensors, and what they compute in float64.

Without JAX a new shape costs no compilation. Outputs are full of NaN before a call.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import ml_dtypes
import numpy as np
import torch

from jmx8.kernels.sm90 import library
from jmx8.kernels.sm90.configs import GemmConfig

from .helpers import assert_within


# Of a float32 accumulator's 24 bits, those that sums of up to 4096 products keep: the
# tensor cores cut off what does not fit. Measured on an H200: 18.3 where one sum is of
# them all, 19.3 or more where several share them.
ACC_BITS = 18
ACTIVATIONS = {"silu": 1, "gelu": 2, "gelu_tanh": 3, "swigluoai": 4, "relu2": 5}
# Of `x * sigmoid(a * x)` and of both forms of gelu; relu2 has none.
_SLOPE = 1.13
_ACTIVATION_BITS = 18  # of the float32 exp, tanh and erf


@dataclasses.dataclass(frozen=True)
class Weight:
    """MXFP8 weights `[..., n, k]` on the GPU."""

    elements: torch.Tensor  # their codes, uint8
    scales: torch.Tensor  # their codes, uint8

    @functools.cached_property
    def exact(self) -> torch.Tensor:
        """The value, in float64."""
        blocks = self.elements.view(torch.float8_e4m3fn).double()
        exponents = self.scales.double() - 127
        return blocks * torch.exp2(exponents).repeat_interleave(32, dim=-1)


def random_weight(generator, *shape, codes=(115, 131)) -> Weight:
    """Returns weights of all finite elements and of scale codes in a range."""
    draw = lambda high, shape: torch.randint(
        0, high, shape, generator=generator, dtype=torch.uint8
    )
    elements = draw(127, shape) | draw(2, shape) << 7
    scales = draw(codes[1] - codes[0] + 1, (*shape[:-1], shape[-1] // 32)) + codes[0]
    return Weight(elements.cuda(), scales.cuda())


def random_rows(generator, *shape) -> torch.Tensor:
    return torch.randn(shape, generator=generator).bfloat16().cuda()


def empty(shape, dtype=torch.bfloat16) -> torch.Tensor:
    """Returns an output that no kernel has written."""
    poison = -7 if dtype == torch.int32 else math.nan
    return torch.full(shape, poison, dtype=dtype, device="cuda")


def call(name, *arguments):
    library.function(name)(*arguments)


def gemm(
    x,
    w: Weight,
    config: GemmConfig,
    *,
    bias=None,
    out_dtype=torch.bfloat16,
    places=None,
    gather=False,
    activation=None,
    swigluoai=(1.702, 1.0, 7.0),
) -> torch.Tensor:
    """Calls the matmul: dense, or for the experts that `places` sorts rows by."""
    n = w.elements.shape[-2]
    columns = n if activation in (None, "relu2") else n // 2
    num_rows = places.slot_rows.shape[0] if places else x.shape[0]
    out = empty((num_rows, columns), out_dtype)
    grouped = (
        (places.slot_rows if gather else None, places.tiles, places.num_tiles)
        if places
        else (None, None, None)
    )
    call(
        "gemm",
        x,
        w.elements,
        w.scales,
        bias,
        out,
        *grouped,
        *activation_parameters(activation, swigluoai),
        *config,
    )
    return out


def activation_parameters(activation, swigluoai=(1.702, 1.0, 7.0)):
    number = ACTIVATIONS[activation] if activation else 0
    return number, *(swigluoai if activation == "swigluoai" else (0.0, 0.0, math.inf))


class Places(NamedTuple):
    slot_rows: torch.Tensor
    slot_of_row: torch.Tensor
    tiles: torch.Tensor
    num_tiles: torch.Tensor


def _empty_places(ids, num_experts, tile_rows) -> Places:
    num_rows = ids.numel()
    max_tiles = min(num_rows, num_experts + num_rows // tile_rows)
    shapes = ((num_rows,), tuple(ids.shape), (max_tiles, 4), (1,))
    return Places(*(empty(shape, torch.int32) for shape in shapes))


def permute(ids, num_experts, tile_rows, row_divisor) -> Places:
    places = _empty_places(ids, num_experts, tile_rows)
    call("permute", ids, *places, num_experts, tile_rows, row_divisor)
    return places


def moe_scratch(w2: Weight, ids, tile_rows) -> tuple[torch.Tensor, ...]:
    """Returns what a layer writes between x and its result."""
    num_experts, h, i = w2.elements.shape
    between = (empty((ids.numel(), size)) for size in (i, h))
    return *_empty_places(ids, num_experts, tile_rows), *between


def moe(
    operands, configs, activation="silu", biases=(None, None), out=None, scratch=None
):
    """Computes a layer of x, w13, w2, ids and weights as the backend does."""
    (x, w13, w2, ids, weights), (first, second) = operands, configs
    out = empty((ids.shape[0], w2.elements.shape[1])) if out is None else out
    call(
        "moe",
        *(x, w13.elements, w13.scales, biases[0], w2.elements, w2.scales, biases[1]),
        *(ids, weights, out),
        *(scratch or moe_scratch(w2, ids, first.tile_rows)),
        *(ids.shape[1], *activation_parameters(activation), first.tile_rows),
        *(first.kernel, first.variant, first.split_k),
        *(second.kernel, second.variant, second.split_k),
    )
    return out


# In float64, each with the error that rounding explains.


def activate(exact, error, activation, swigluoai=(1.702, 1.0, 7.0)):
    """Returns the activation of values known to within `error`, and its error."""
    if activation == "relu2":
        positive = exact.clamp(min=0)
        return positive**2, 2 * positive * error + error**2
    gate, up = exact.chunk(2, dim=-1)
    gate_error, up_error = error.chunk(2, dim=-1)
    if activation == "silu":
        gate = gate * torch.sigmoid(gate)
    elif activation == "swigluoai":
        alpha, beta, limit = swigluoai
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit) + beta
        gate = gate * torch.sigmoid(alpha * gate)
    else:
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        gate = torch.nn.functional.gelu(gate, approximate=approximate)
    gate_error = _SLOPE * gate_error + 2.0**-_ACTIVATION_BITS * gate.abs().clamp(min=1)
    out = gate * up
    return out, gate_error * up.abs() + gate.abs() * up_error + gate_error * up_error


def product(x, weight, bias, x_error=None):
    """Returns `x @ weight.T + bias` and its error, for x of float64."""
    bias = torch.zeros_like(weight[:, 0]) if bias is None else bias.double()
    exact = x @ weight.T + bias
    magnitude = x.abs() @ weight.abs().T + bias.abs()
    error = 2.0**-ACC_BITS * magnitude
    return exact, error if x_error is None else error + x_error @ weight.abs().T


def assert_moe_close(out, operands, activation="silu", biases=(None, None)):
    """Checks a layer: hidden values and experts' outputs are rounded to bfloat16."""
    x, w13, w2, ids, weights = operands
    eps = torch.finfo(torch.bfloat16).eps
    exact = torch.zeros(x.shape, dtype=torch.float64, device="cuda")
    error = torch.zeros_like(exact)
    for e in range(w2.elements.shape[0]):
        tokens, places = torch.nonzero(ids == e, as_tuple=True)
        if not len(tokens):
            continue
        b13, b2 = (None if b is None else b[e] for b in biases)
        h, h_error = product(x[tokens].double(), w13.exact[e], b13)
        h, h_error = activate(h, h_error, activation)
        y, y_error = product(h, w2.exact[e], b2, h_error + eps * h.abs())
        weight = weights[tokens, places].double()[:, None]
        exact.index_add_(0, tokens, weight * y)
        error.index_add_(0, tokens, weight.abs() * (y_error + eps * y.abs()))
    # Of the float32 sum over experts nothing is visible next to the rest.
    magnitude = error * 2.0**ACC_BITS
    assert_within(to_numpy(out), *map(to_numpy, (exact, magnitude)), acc_bits=ACC_BITS)


def assert_product_close(out, x, w: Weight, bias=None):
    exact, error = product(x.double(), w.exact, bias)
    magnitude = to_numpy(error) * 2.0**ACC_BITS
    assert_within(to_numpy(out), to_numpy(exact), magnitude, acc_bits=ACC_BITS)


def kept_bits(out, exact, error) -> float:
    """Returns how many bits a float32 sum must keep for its error to be this."""
    return ACC_BITS - float(torch.log2(((out.double() - exact).abs() / error).max()))


def to_numpy(tensor) -> np.ndarray:
    tensor = tensor.cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def bits(tensor) -> np.ndarray:
    return to_numpy(tensor.contiguous()).view(np.uint8)

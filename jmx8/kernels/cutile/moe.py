"""The backend "flashinfer_cutile" of `mx_moe`."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..._mx_array import MXArray
from .. import _ffi
from ..xla_activation import Activation
from . import _backend, _launch, _permute, _pipeline, _tiles
from ._launch import Cubin


def unsupported(
    x: Float[Array, "t h"],
    w13: MXArray | Float[Array, "e n h"],
    w2: MXArray | Float[Array, "e h i"],
    topk_ids: Int[Array, "t k"],
    topk_weights: Float[Array, "t k"],
    w13_bias: Float[Array, "e n"] | None,
    w2_bias: Float[Array, "e h"] | None,
    *,
    activation: Activation,
    apply_router_weight_on_input: bool,
) -> str | None:
    """Returns why `run` cannot run here, None if it can."""
    if problem := _backend.why_not_here():
        return problem
    if not (isinstance(w13, MXArray) and isinstance(w2, MXArray)):
        return "the weights are not MXFP8"
    if w13.padding or w2.padding:
        return "the hidden or intermediate size is not a multiple of 32"
    if x.dtype != jnp.bfloat16:
        return f"FlashInfer's cuTile kernels take bfloat16 tokens, and x is {x.dtype}"
    if w13_bias is not None or w2_bias is not None:
        return "FlashInfer's cuTile kernels add no expert biases"
    num_experts, hidden_size, intermediate_size = w2.shape
    num_rows, block_rows = topk_ids.size, max(_tiles.BLOCK_ROWS)
    if _permute.num_places(num_rows, num_experts, block_rows) >= 1 << 31:
        return f"{num_rows} routed rows are more than 32 bits can number"
    return _backend.why_not_built(
        required_cubins(
            _backend.target().arch,
            topk_ids.shape,
            num_experts,
            hidden_size,
            intermediate_size,
            activation,
            apply_router_weight_on_input,
        )
    )


def run(
    x: Float[Array, "t h"],
    w13: MXArray,
    w2: MXArray,
    topk_ids: Int[Array, "t k"],
    topk_weights: Float[Array, "t k"],
    w13_bias: None,
    w2_bias: None,
    *,
    activation: Activation,
    apply_router_weight_on_input: bool,
) -> Float[Array, "t h"]:
    """Computes the experts' part of an MoE layer; see `ops.moe.mx_moe`.

    Two runs give the same bits.
    """
    arch = _backend.target().arch
    operands, structure = jax.tree.flatten((x, w13, w2, topk_ids, topk_weights))
    layer = _layer(
        arch,
        _tiles.moe_tiles(arch, topk_ids.shape, w2.shape[0]),
        activation,
        apply_router_weight_on_input,
        structure,
        tuple(operand.ndim for operand in operands),
        jax.ShapeDtypeStruct(x.shape, x.dtype),
    )
    (out,) = layer(*operands)
    return out


@functools.cache  # so that calls outside `jit` compile once
def _layer(arch, tiles, activation, weight_input, structure, ranks, out_type):
    """Returns the layer as a function of arrays that refuses sharded ones."""

    def call(*operands):
        out = _pipeline.moe(
            *jax.tree.unflatten(structure, operands),
            activation=activation,
            apply_router_weight_on_input=weight_input,
            tiles=tiles,
            target=_backend.target_of(arch),
        )
        return (out,)

    return _ffi.guard("mx_moe[flashinfer_cutile]", call, ranks, (out_type,))


@functools.cache
def required_cubins(
    arch: str,
    routed: tuple[int, ...],
    num_experts: int,
    hidden_size: int,
    intermediate_size: int,
    activation: Activation,
    apply_router_weight_on_input: bool = False,
) -> tuple[Cubin, ...]:
    """Returns the kernels that a layer runs for ids of shape `routed`, `[t, k]`."""
    shape = jax.ShapeDtypeStruct
    rows = intermediate_size * (2 if _pipeline.is_gated(activation) else 1)
    layer = functools.partial(
        _pipeline.moe,
        activation=activation,
        apply_router_weight_on_input=apply_router_weight_on_input,
        tiles=_tiles.moe_tiles(arch, routed, num_experts),
        target=_backend.target_of(arch),
    )
    with _launch.record() as launches:
        jax.eval_shape(
            layer,
            shape((routed[0], hidden_size), jnp.bfloat16),
            _backend.abstract_weights(num_experts, rows, hidden_size),
            _backend.abstract_weights(num_experts, hidden_size, intermediate_size),
            shape(routed, jnp.int32),
            shape(routed, jnp.float32),
        )
    return tuple(dict.fromkeys(launch.cubin for launch in launches))

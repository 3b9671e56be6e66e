"""Laying out the weights of converted layers for the kernels that will run."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import DTypeLike

from .._device import resolve_activations
from .._types import Implementation
from ..kernels._prepared import to_canonical
from ..ops.matmul import prepare_matmul, W8A8_BACKENDS as MATMUL_BACKENDS
from ..ops.moe import prepare_moe, W8A8_BACKENDS as MOE_BACKENDS
from ._parameters import is_mx_layer, is_mx_linear, value, with_fields


Module = TypeVar("Module")


def prepare(
    module: Module,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    implementation: Implementation | None = None,
) -> Module:
    """Lays out the weights of MXFP8 layers for the kernels that will run them.

    Once, after loading and before the first call: a kernel that wants swizzled scales
    or another order of rows runs on weights that have been laid out, and on no others.
    Where the kernels take weights as they are (on a CPU, on Hopper), nothing changes.
    `jmx8.load` does this by itself. Jit-able; under `shard_map` each device lays out
    what it has.

    Args:
        module: Any pytree of Equinox or NNX modules that has MXFP8 layers.
        dtype: Dtype of the activations that the layers will get.
        implementation: Backend of `mx_matmul_w8a8` or `mx_moe_w8a8` to lay weights out
            for, also such as are laid out already; for layers whose op has no backend
            of that name, and for all if None, the first one that can run. Layers that
            never quantize their activations stay as they are.

    Returns:
        The same module with `PreparedWeights` in these layers. `jmx8.canonical` undoes
        it, bit for bit; save, shard and update canonical weights.

    Raises:
        ValueError: If `implementation` is unknown.
        NotImplementedError: If the named implementation cannot run a layer on this
            device; the message says why.
    """
    names = (*MATMUL_BACKENDS, *MOE_BACKENDS)
    if implementation is not None and implementation not in names:
        raise ValueError(
            f"prepare: unknown implementation {implementation!r}; expected one of "
            f"{sorted({*names})}, or None to choose."
        )
    nodes, structure = jax.tree.flatten(module, is_leaf=is_mx_layer)
    del module  # A caller that keeps no reference never holds two copies of a model.
    for i, node in enumerate(nodes):
        nodes[i] = _prepare(node, jnp.dtype(dtype), implementation)
    return jax.tree.unflatten(structure, nodes)


def canonical(tree: Any) -> Any:
    """Returns `tree` with `MXArray`s in place of what `prepare` made of them."""
    return to_canonical(tree)


def _prepare(node: Any, dtype: jnp.dtype, implementation: Implementation | None) -> Any:
    if not is_mx_layer(node) or node.activations == "bf16":
        return node
    backends = MATMUL_BACKENDS if is_mx_linear(node) else MOE_BACKENDS
    if implementation not in backends:
        implementation = None
    # Where "auto" means bfloat16, a backend that was asked for tells why it cannot run.
    if implementation is None and resolve_activations(node.activations) != "mxfp8":
        return node
    if is_mx_linear(node):
        weight = prepare_matmul(value(node.weight), dtype, implementation)
        return with_fields(node, weight=weight)
    w13, w2, w13_bias, w2_bias = prepare_moe(
        *(value(getattr(node, name)) for name in ("w13", "w2", "w13_bias", "w2_bias")),
        activation=node.activation,
        apply_router_weight_on_input=node.apply_router_weight_on_input,
        dtype=dtype,
        implementation=implementation,
    )
    return with_fields(node, w13=w13, w2=w2, w13_bias=w13_bias, w2_bias=w2_bias)

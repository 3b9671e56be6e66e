"""FlashInfer's kernels that run on Hopper, declared as the tests and benchmarks call
them: what proves the bridge on a GPU that has no MXFP8 kernel of FlashInfer's."""

import jax.numpy as jnp

from jmx8.kernels._ffi import Kernel, Output
from jmx8.kernels.flashinfer import modules


def _kernel(module, function, arguments):
    load = lambda: modules.load(module, (9, 0))[function]
    return Kernel(f"flashinfer.{function}", load, arguments)


RMSNORM = _kernel(
    modules.NORM, "rmsnorm", ("out", "x", "weight", "epsilon", "enable_pdl")
)
SILU_AND_MUL = _kernel(modules.SILU_AND_MUL, "silu_and_mul", ("out", "x", "enable_pdl"))
TOPK = _kernel(
    modules.TOPK,
    "radix_topk",
    (
        "x",
        "indices",
        "values",
        "row_states",
        "top_k",
        "sort",
        "deterministic",
        "tie_break",
        "graph_safe",
    ),
)
ROPE = _kernel(
    modules.ROPE,
    "apply_rope_pos_ids",
    (
        "q",
        "k",
        "q_out",
        "k_out",
        "positions",
        "rotary_dim",
        "interleave",
        "scale",
        "theta",
    ),
)


def rmsnorm(x, weight, epsilon=1e-6):
    (out,) = RMSNORM(
        x=x,
        weight=weight,
        out=Output(x.shape, x.dtype),
        epsilon=epsilon,
        enable_pdl=False,
    )
    return out


def silu_and_mul(x):
    shape = (*x.shape[:-1], x.shape[-1] // 2)
    return SILU_AND_MUL(x=x, out=Output(shape, x.dtype), enable_pdl=False)[0]


def topk(x, top_k):
    shape = (x.shape[0], top_k)
    return TOPK(
        x=x,
        indices=Output(shape, jnp.int32),
        values=Output(shape, x.dtype),
        row_states=jnp.zeros(1 << 20, jnp.uint8),
        top_k=top_k,
        sort=True,
        deterministic=True,
        tie_break=0,
        graph_safe=True,
    )


def rope(q, k, positions, theta=1e4, kernel=ROPE):
    return kernel(
        q=q,
        k=k,
        q_out=Output(q.shape, q.dtype),
        k_out=Output(k.shape, k.dtype),
        positions=positions,
        rotary_dim=q.shape[-1],
        interleave=False,
        scale=1.0,
        theta=theta,
    )

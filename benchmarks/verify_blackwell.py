"""Checks jmx8 on a GPU, Blackwell first of all, and prints one page to paste.

    python benchmarks/verify_blackwell.py

builds what is missing, compares FlashInfer's quantizer with jmx8's bit for bit and
every backend with its definition in float64, captures a chain of layers into a CUDA
graph, uses all devices at once, and times dense and MoE layers against bfloat16 and the
roofline. Each line ends with PASS, FAIL, or SKIP and the reason. The exit code is 1 if
a line failed.
"""

import argparse
import dataclasses
import functools
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from _timing import copy_bandwidth, describe_run, matmul_rate, median_seconds

import jmx8
from jmx8 import _device
from jmx8.kernels import _adapter, xla_moe
from jmx8.kernels.flashinfer import (
    backends,
    dense,
    layouts,
    modules,
    quantize as flashinfer_quantize,
)
from jmx8.ops import _dispatch, matmul, moe


Line = tuple[str, str, str]  # what, PASS or FAIL or SKIP, detail

normal = lambda seed, *shape, dtype=jnp.bfloat16: jax.random.normal(
    jax.random.key(seed), shape, dtype
)


def build_missing(build: bool) -> Iterator[Line]:
    """Builds the adapter and the modules that this device's ops use."""
    start = time.perf_counter()
    problem = _adapter.adapter_unavailable()
    if problem is None:
        _adapter.load()
    detail = problem or f"{time.perf_counter() - start:.0f} s"
    yield "FFI adapter", "SKIP" if problem else "PASS", detail
    capability = _device.compute_capability()
    for module in modules.OPS:
        if capability not in module.capabilities:
            continue
        arch = modules.arch_of(capability)
        path = modules.find(module, arch)
        problem = modules.unavailable(module, capability)
        if problem is None and path is None and not build:
            problem = "not built, and --no-build was given"
        if problem is None:
            start = time.perf_counter()
            modules.load(module, capability)
            verb = "loaded" if path else "built"
            detail = f"{verb} in {time.perf_counter() - start:.0f} s"
        yield module.name, "SKIP" if problem else "PASS", problem or detail


def check_quantizer() -> Iterator[Line]:
    """Compares FlashInfer's quantizer with jmx8's, for blocks of every kind."""
    name = "mxfp8_quantize = jmx8.quantize, bit for bit"
    if problem := flashinfer_quantize.unsupported(jnp.bfloat16, 512):
        yield name, "SKIP", problem
        return
    rows = _rows_of_every_kind()
    for layout in ("linear", "128x4", "8x4"):
        wrong = {kind: _differing_bytes(x, layout) for kind, x in rows.items()}
        differ = [f"{kind}: {count} bytes" for kind, count in wrong.items() if count]
        detail = f"{', '.join(differ)} differ" if differ else ", ".join(wrong)
        yield f"{name}, {layout}", "FAIL" if differ else "PASS", detail


def _rows_of_every_kind() -> dict[str, jax.Array]:
    exponents = jnp.arange(-126, 120).repeat(512).reshape(-1, 512)
    bits = jax.random.bits(jax.random.key(3), (300, 512), jnp.uint16)
    patterns = jax.lax.bitcast_convert_type(bits, jnp.bfloat16)
    rows = {
        "random": normal(0, 1000, 512),
        "tiny": normal(1, 300, 512) * jnp.bfloat16(2.0**-118),
        "huge": normal(2, 300, 512) * jnp.bfloat16(2.0**120),
        "all finite patterns": jnp.where(jnp.isfinite(patterns), patterns, 0),
        "zero and -0": jnp.tile(jnp.array([0.0, -0.0], jnp.bfloat16), (130, 256)),
        "amax = 448 * 2**k": jnp.ldexp(jnp.float32(448), exponents),
    }
    return {kind: x.astype(jnp.bfloat16) for kind, x in rows.items()}


def _differing_bytes(x: jax.Array, layout: flashinfer_quantize.ScaleLayout) -> int:
    expected = jax.jit(jmx8.quantize)(x)
    codes = jax.lax.bitcast_convert_type(expected.scales, jnp.uint8)
    run = functools.partial(flashinfer_quantize.mxfp8_quantize, layout=layout)
    elements, scales = jax.jit(run)(x)
    # The scales' padding is zeros.
    swizzled = {
        "linear": codes.reshape(-1),
        "128x4": layouts.swizzle_scales(codes, 128),
        "8x4": layouts.swizzle_scales(codes, 8),
    }
    as_bytes = lambda a: np.asarray(a).view(np.uint8)
    return sum(
        int(np.sum(as_bytes(a) != as_bytes(b)))
        for a, b in ((elements, expected.elements), (scales, swizzled[layout]))
    )


def check_dense() -> Iterator[Line]:
    """Compares every backend of the matmuls with float64."""
    for op in matmul.OPS:
        cases = []
        for m, n, k in ((1, 4096, 4096), (130, 1000, 1184), (512, 512, 96)):
            x, w = normal(0, m, k), jmx8.quantize(normal(1, n, k))
            read = jmx8.dequantize(jmx8.quantize(x)) if _quantizes(op) else x
            x64, w64 = (np.asarray(a, np.float64) for a in (read, jmx8.dequantize(w)))
            exact, magnitude = x64 @ w64.T, np.abs(x64) @ np.abs(w64).T
            # The result is rounded to bfloat16. Tensor cores keep at least 13 bits of
            # each partial sum of FP8 products.
            bound = 2.0**-8 * np.abs(exact) + 2.0**-13 * magnitude
            cases.append(((x, w), functools.partial(_over_bound, exact, bound)))
        options = {"out_dtype": jnp.dtype(jnp.bfloat16)}
        yield from _each_backend(op, options, cases)


def _quantizes(op: _dispatch.Op) -> bool:
    return op.name.endswith("w8a8")


def _over_bound(exact: np.ndarray, bound: np.ndarray, out: Any) -> dict[str, float]:
    error = np.abs(np.asarray(out, np.float64) - exact)
    return {"of the rounding bound": float(np.max(error / bound))}


def check_moe() -> Iterator[Line]:
    """Compares every backend of the MoE layer with the XLA model and with float64."""
    e, h, i, top_k = 16, 512, 256, 4
    w13, w2 = normal(1, e, 2 * i, h) * 0.05, normal(2, e, h, i) * 0.05
    w13, w2 = jmx8.quantize(w13), jmx8.quantize(w2)
    options = {"activation": "silu", "apply_router_weight_on_input": False}
    for op in moe.OPS:
        model = functools.partial(
            xla_moe.moe, quantize_activations=_quantizes(op), **options
        )
        cases = []
        for t in (1, 33, 600):
            x = normal(3, t, h)
            ids, weights = jmx8.route(normal(4, t, e), "softmax", top_k)
            operands = (x, w13, w2, ids, weights, None, None)
            exact = _moe_in_float64(x, w13, w2, ids, weights)
            modelled = np.asarray(jax.jit(model)(*operands), np.float64)
            compare = functools.partial(_from_model, exact, modelled)
            cases.append((operands, compare))
        yield from _each_backend(op, options, cases)


def _from_model(exact: np.ndarray, model: np.ndarray, out: Any) -> dict[str, float]:
    """Returns errors as shares of what they may be.

    W8A16 may be 6e-3 off. W8A8 is as far from float64 as its model is, for
    activations have 4 bits, and may be 1e-2 from the model.
    """
    far = max(6e-3, 2 * _distance(model, exact))
    return {
        "of the distance to float64": _distance(out, exact) / far,
        "of that to the XLA model": _distance(out, model) / 1e-2,
    }


def _distance(out: Any, exact: np.ndarray) -> float:
    error = np.asarray(out, np.float64) - exact
    return float(np.linalg.norm(error) / np.linalg.norm(exact))


def _moe_in_float64(x, w13, w2, ids, weights) -> np.ndarray:
    w13, w2 = (np.asarray(jmx8.dequantize(w), np.float64) for w in (w13, w2))
    x64, weights = np.asarray(x, np.float64), np.asarray(weights, np.float64)
    out = np.zeros_like(x64)
    for t, chosen in enumerate(np.asarray(ids)):
        for e, weight in zip(chosen, weights[t], strict=True):
            gate, up = np.split(w13[e] @ x64[t], 2)
            out[t] += weight * (w2[e] @ (gate / (1 + np.exp(-gate)) * up))
    return out


def _each_backend(
    op: _dispatch.Op, options: dict[str, Any], cases: list[tuple[Any, Any]]
) -> Iterator[Line]:
    """Yields a line for each backend; a case is operands and what compares results."""
    for backend in op.backends:
        line, worst = f"{op.name}[{backend.name}]", {}
        problems = []
        for operands, compare in cases:
            run, problem = make_run(backend, options, operands)
            if problem is not None:
                problems.append(problem)
                continue
            for what, share in compare(run(*operands)).items():
                worst[what] = np.maximum(worst.get(what, 0.0), share)  # keeps NaN
        detail = ", ".join(f"{share:.2f} {what}" for what, share in worst.items())
        if not worst:
            yield line, "SKIP", problems[0]
        elif all(share <= 1 for share in worst.values()):  # NaN fails
            skipped = f"; {len(problems)} skipped: {problems[0]}" if problems else ""
            yield line, "PASS", f"{detail}{skipped}"
        else:
            yield line, "FAIL", detail


def make_run(
    backend: _dispatch.Backend, options: dict[str, Any], operands: tuple[Any, ...]
) -> tuple[Callable[..., Any], str | None]:
    """Returns the jitted backend, its weights laid out, or why it cannot run."""
    lay_out = jax.jit(backend.prepare) if backend.prepare else lambda *a: a
    run = jax.jit(functools.partial(backend.run, **options))
    abstract = jax.eval_shape(lay_out, *operands)
    problem = backend.unsupported(*abstract, **options)
    return lambda *operands: run(*lay_out(*operands)), problem


def check_capture() -> Iterator[Line]:
    """Replays a chain of layers on other inputs, and counts the calls of the host."""
    ones = [jmx8.quantize(normal(i, 1024, 1024) / 32) for i in range(8)]
    layers = jmx8.prepare([jmx8.nn.MXLinear.from_weight(w) for w in ones])

    def chain(layers, x):
        for layer in layers:
            x = layer(x)
        return x

    chained, alone = jax.jit(chain), jax.jit(lambda layer, x: layer(x))
    same = True
    for seed in range(4):
        x = one_by_one = normal(seed, 16, 1024)
        for layer in layers:
            one_by_one = alone(layer, one_by_one)
        same &= bool(jnp.array_equal(chained(layers, x), one_by_one))
    yield "chain of layers = layer by layer", "PASS" if same else "FAIL", "4 inputs"

    capability = _device.compute_capability()
    if problem := flashinfer_quantize.unsupported(jnp.bfloat16, 1024):
        yield "captured into a command buffer", "SKIP", problem
        return
    import tvm_ffi

    count = 0
    kernel = dense._kernel(capability)
    function = kernel.load()

    def counted(*args):
        nonlocal count
        count += 1
        function(*args)

    def counted_chain(layers, x):
        for layer in layers:
            x = backends.matmul_w8a8(x, layer.weight, out_dtype=x.dtype)
        return x

    counting = dataclasses.replace(kernel, load=lambda: tvm_ffi.convert(counted))
    with mock.patch.object(dense, "_kernel", lambda capability: counting):
        replayed = jax.jit(counted_chain)
        for _ in range(10):
            jax.block_until_ready(replayed(layers, normal(0, 16, 1024)))
    # The first runs record; what is replayed does not reach the host.
    detail = f"{count} of {10 * len(layers)} calls reached the host"
    captured = count <= 5 * len(layers)
    yield "captured into a command buffer", "PASS" if captured else "FAIL", detail


def check_devices() -> Iterator[Line]:
    """Runs layers on all devices at once, each on its rows."""
    devices = jax.local_devices()
    if len(devices) < 2:
        yield "all devices at once", "SKIP", "there is one device"
        return
    mesh = jax.make_mesh((len(devices),), ("d",))
    rows = jax.NamedSharding(mesh, jax.P("d"))
    w = jmx8.quantize(normal(0, 512, 512))
    layer = jmx8.prepare(jmx8.nn.MXLinear.from_weight(w))
    x = jax.device_put(normal(1, 64 * len(devices), 512), rows)
    everywhere = jax.shard_map(
        lambda layer, x: layer(x),
        mesh=mesh,
        in_specs=(jax.P(), jax.P("d")),
        out_specs=jax.P("d"),
        check_vma=False,
    )
    out = jax.jit(everywhere)(layer, x)
    one = jax.jit(lambda layer, x: layer(x))(layer, jax.device_put(x, devices[0]))
    same = bool(jnp.array_equal(out, one))
    yield "all devices at once", "PASS" if same else "FAIL", f"{len(devices)} devices"


def time_everything() -> Iterator[str]:
    """Times each backend next to bfloat16 and the roofline."""
    copy, rate = copy_bandwidth(), matmul_rate(8192)
    yield f"copy {copy / 1e12:.2f} TB/s, bf16 matmul {rate / 1e12:.0f} TFLOP/s"
    floor = lambda num_bytes, operations: 1e6 * max(num_bytes / copy, operations / rate)
    yield from _time_dense(12288, 4096, floor)
    yield from _time_moe(128, 2048, 768, 8, floor)


def _time_dense(n: int, k: int, floor: Callable[..., float]) -> Iterator[str]:
    weights = [normal(i, n, k) * 0.02 for i in range(16)]
    quantized = [(jax.jit(jmx8.quantize)(w),) for w in weights]
    options = {"out_dtype": jnp.dtype(jnp.bfloat16)}
    for m in (1, 16, 256, 4096):
        x = normal(99, m, k)
        bf16 = time_layers(lambda x, w: x @ w.T, x, weights)
        cells = _time_backends(matmul.OPS, options, x, quantized)
        roofline = floor(n * k * 33 / 32, 2 * m * n * k)
        yield f"dense {k}->{n} m={m}: bf16 {bf16:.0f}{cells}, roofline {roofline:.0f}"


def _time_moe(
    e: int, h: int, i: int, top_k: int, floor: Callable[..., float]
) -> Iterator[str]:
    pairs = [
        (normal(2 * j, e, 2 * i, h) * 0.02, normal(2 * j + 1, e, h, i) * 0.02)
        for j in range(3)
    ]
    mx_pairs = jax.tree.map(jax.jit(jmx8.quantize), pairs)
    options = {"activation": "silu", "apply_router_weight_on_input": False}
    for t in (1, 16, 128, 1024):
        x = normal(99, t, h)
        routed = jmx8.route(normal(98, t, e), "softmax", top_k)
        bind = lambda pairs, routed=routed: [(*p, *routed, None, None) for p in pairs]
        bf16 = time_layers(lambda x, w: jmx8.mx_moe(x, *w[:4]), x, bind(pairs))
        cells = _time_backends(moe.OPS, options, x, bind(mx_pairs))
        active = np.unique(np.asarray(routed[0])).size
        roofline = floor(active * 3 * h * i * 33 / 32, 2 * t * top_k * 3 * h * i)
        yield f"MoE t={t}: bf16 through XLA {bf16:.0f}{cells}, roofline {roofline:.0f}"


def _time_backends(
    ops: tuple[_dispatch.Op, ...],
    options: dict[str, Any],
    x: jax.Array,
    layers: list[tuple[Any, ...]],
) -> str:
    cells = ""
    for op in ops:
        for backend in op.backends:
            if make_run(backend, options, (x, *layers[0]))[1] is not None:
                continue
            lay_out = jax.jit(backend.prepare) if backend.prepare else lambda *a: a
            laid_out = [lay_out(x, *layer)[1:] for layer in layers]
            run = functools.partial(backend.run, **options)
            us = time_layers(lambda x, w, run=run: run(x, *w), x, laid_out)
            cells += f", {op.name}[{backend.name}] {us:.0f}"
    return cells


def time_layers(layer: Callable[..., Any], x: jax.Array, layers: list[Any]) -> float:
    """Returns µs per layer of one program that computes all of `layers`."""
    run = jax.jit(lambda x, layers: [layer(x, w) for w in layers])
    return 1e6 * median_seconds(run, x, layers, calls=5, rounds=5) / len(layers)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--no-build", action="store_true", help="use what is built")
    parser.add_argument("--no-timing", action="store_true", help="check only")
    args = parser.parse_args()
    capability = _device.compute_capability()
    print(f"{describe_run()}\ncompute capability {capability}, jmx8 {jmx8.__file__}\n")
    counts = {"PASS": 0, "FAIL": 0, "SKIP": 0}
    sections = [
        functools.partial(build_missing, not args.no_build),
        check_quantizer,
        check_dense,
        check_moe,
        check_capture,
        check_devices,
    ]
    for section in sections:
        try:
            for what, status, detail in section():
                counts[status] += 1
                print(f"{status}  {what}  ({detail})", flush=True)
        except Exception:  # noqa: BLE001  One broken check must not hide the others.
            counts["FAIL"] += 1
            print(f"FAIL  {section}\n{traceback.format_exc()}", flush=True)
    if not args.no_timing:
        print("\nµs per layer")
        for line in time_everything():
            print(line, flush=True)
    print(
        f"\n{counts['PASS']} passed, {counts['FAIL']} failed, {counts['SKIP']} skipped"
    )
    raise SystemExit(1 if counts["FAIL"] else 0)


if __name__ == "__main__":
    main()

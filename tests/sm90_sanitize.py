"""Calls every kernel on small shapes, for compute-sanitizer to watch."""

import torch

from jmx8.kernels.sm90 import configs

from . import sm90_calls as calls


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 130, 96), (70, 72, 288), (9, 200, 256))
    # All that is the fastest for something, on each shape.
    fastest = dict.fromkeys(c for m, *_ in shapes for c in configs.dense_candidates(m))
    for config in fastest:
        for m, n, k in shapes:
            x = calls.random_rows(generator, m, k)
            w = calls.random_weight(generator, n, k)
            calls.assert_product_close(calls.gemm(x, w, config), x, w)
    layers = [(96, pair) for pair in configs.moe_candidates(96, 64)]
    layers += [(128, pair) for pair in configs.MIXED_PAIRS]
    for h, pair in layers:
        for t in (3, 90):
            ids = torch.randint(-1, 6, (t, 2), generator=generator).int().cuda()
            operands = (
                calls.random_rows(generator, t, h),
                calls.random_weight(generator, 5, 128, h, codes=(116, 120)),
                calls.random_weight(generator, 5, h, 64, codes=(116, 120)),
                ids,
                torch.rand(t, 2, generator=generator).cuda(),
            )
            calls.assert_moe_close(calls.moe(operands, pair), operands)
    for t, e, top_k in ((1, 32, 4), (70, 128, 8)):
        logits = torch.randn(t, e, generator=generator).cuda()
        ids = calls.empty((t, top_k), torch.int32)
        weights = calls.empty((t, top_k), torch.float32)
        calls.call("route", logits, None, ids, weights, 0, 1, 1, True, 1.0)
        assert torch.equal(ids.long(), logits.topk(top_k).indices)
    for rows in (1, 70):
        x = calls.random_rows(generator, rows, 96)
        elements = torch.full((rows, 96), 127, dtype=torch.uint8, device="cuda")
        scales = torch.full((rows, 3), 255, dtype=torch.uint8, device="cuda")
        calls.call("quantize", x, elements, scales)
        exact = calls.Weight(elements, scales).exact
        assert bool(((exact - x.double()).abs() <= x.abs().max() / 16).all())
    torch.cuda.synchronize()
    print("all shapes ran")


if __name__ == "__main__":
    main()

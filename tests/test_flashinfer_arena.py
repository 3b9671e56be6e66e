"""The memory that trtllm-gen's MoE allocates, recomputed by FlashInfer's own C++.

Its expressions are cut out of the installed sources and compiled; what is cut out is
listed here, so that an allocation more or less is noticed.
"""

import importlib.util
import itertools
import json
import pathlib
import re
import shutil
import subprocess

import pytest

from jmx8.kernels.flashinfer.trtllm_arena import (
    arena_bytes,
    default_tile_rows,
    Sizes,
    TILE_ROWS,
)


SPEC = importlib.util.find_spec("flashinfer")
if SPEC is None or SPEC.origin is None or shutil.which("g++") is None:
    pytest.skip("needs FlashInfer's sources and g++", allow_module_level=True)
DATA = pathlib.Path(SPEC.origin).parent / "data"
LAUNCHER = (DATA / "csrc/trtllm_fused_moe_kernel_launcher.cu").read_text()
RUNNER = (DATA / "include/flashinfer/trtllm/fused_moe/runner.h").read_text()

# Every allocation of a call, as the source has it: its extents, its dtype, and whether
# it is made for MXFP8 with a finalized output, all ids and no LoRA. What is not known
# here is how much the matmuls themselves want.
NOT_MADE, MATMUL = False, None
ROUTING = [
    ("totalNumExperts", "dl_int32", True),
    ("1", "dl_int32", True),
    ("args->num_tokens * totalExpertsPerToken", "dl_int32", True),
    ("max_num_padded_tokens + 1", "dl_int32", True),
    ("max_num_padded_tokens", "dl_int32", NOT_MADE),  # with LoRA
    ("args->num_tokens, totalExpertsPerToken", "dl_int32", True),
    ("size_of_expert_count_histogram", "dl_int32", True),
    ("max_num_ctas", "dl_int32", True),
    ("max_num_ctas", "dl_int32", True),
    ("1", "dl_int32", True),
]
WEIGHTS = [("args->num_tokens, totalExpertsPerToken", "dl_bfloat16", True)]
MATMULS = [
    ("std::get<0>(workspace_sizes)", "dl_int8", MATMUL),
    ("std::get<1>(workspace_sizes)", "dl_int8", MATMUL),
]
EXPERTS = [
    ("max_num_padded_tokens_gemm1, gemm1_output_hidden", "dl_uint8", True),
    (
        "intermediate_size_factor * args->intermediate_size / 128, "
        "workspace.total_max_padded_tokens",
        "dl_float32",
        NOT_MADE,  # FP8 of another kind, as below
    ),
    ("sf_size", "dl_uint8", True),
    ("max_num_padded_tokens_gemm1, args->intermediate_size", "dl_uint8", NOT_MADE),
    (
        "args->intermediate_size / 128, max_num_padded_tokens_gemm1",
        "dl_float32",
        NOT_MADE,
    ),
    ("max_num_padded_tokens_gemm2, hidden_size_output", "dl_bfloat16", True),
    ("args->num_tokens, args->hidden_size", "dl_bfloat16", NOT_MADE),  # without output
]


def body_of(source: str, head: str, after: str = "") -> str:
    """Returns the text from `head` to the brace that closes its block."""
    start = source.index(head, source.index(after))
    depth = 0
    for i in range(source.index("{", start), len(source)):
        depth += {"{": 1, "}": -1}.get(source[i], 0)
        if depth == 0:
            return source[start : i + 1]
    raise AssertionError(f"{head} has no end")


def allocations(source: str) -> list[tuple[str, str]]:
    squeeze = lambda text: re.sub(r"\s+", " ", text).strip()
    found = re.findall(r"alloc_tensor\(\s*\{(.*?)\}\s*,\s*(\w+)", source, re.S)
    return [(squeeze(extents), dtype) for extents, dtype in found]


MXFP8 = "class Fp8BlockScaleLauncher"
COMMON = "class FusedMoeLauncher"


@pytest.mark.parametrize(
    "head, after, listed",
    [
        ("void prepare_routing_common()", COMMON, ROUTING),
        ("void prepare_routing() override", MXFP8, WEIGHTS),
        ("void prepare_moe_common(", COMMON, MATMULS),
        ("void prepare_moe(int64_t& moe_tactic) override", MXFP8, EXPERTS),
        # Neither what surrounds them nor the routing allocates.
        ("MoeRunResultBuffers run(", MXFP8, []),
        ("Array<Tensor> trtllm_fp8_block_scale_moe(", COMMON, []),
    ],
)
def test_every_allocation_is_listed(head, after, listed):
    found = allocations(body_of(LAUNCHER, head, after))
    assert found == [(extents, dtype) for extents, dtype, _ in listed]


def program() -> str:
    """Returns C++ that evaluates the listed expressions for sizes from its input."""
    made = [entry for entry in [*ROUTING, *WEIGHTS, *EXPERTS] if entry[2]]
    helpers = [
        body_of(RUNNER, "inline int32_t maybeGetMinTokenCount("),
        body_of(RUNNER, "inline int32_t getMaxNumCtasInBatchDim("),
        body_of(RUNNER, "inline int32_t getMaxPermutedPaddedCount("),
        body_of(LAUNCHER, "std::set<int32_t> computeSelectedTileN("),
        body_of(LAUNCHER, "int64_t selectDefaultTileN("),
    ]
    sums = [f"add({{{extents}}}, {dtype});" for extents, dtype, _ in made]
    quantization = DATA / "csrc/nv_internal/tensorrt_llm/kernels/quantization.h"
    sf_size = body_of(
        quantization.read_text(), "inline int64_t computeSwizzledLayoutSFSize("
    )
    return PROGRAM.replace("// HELPERS", "\n".join([*helpers, sf_size])).replace(
        "// SUMS", "\n".join(sums)
    )


# `common::divUp`, `PadUpFn` and the checks are what the cut-out functions call.
PROGRAM = r"""
#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <iostream>
#include <set>
#include <vector>

struct Ignore {
  template <class T> Ignore const& operator<<(T const&) const { return *this; }
};
#define TVM_FFI_ICHECK(condition) if (!(condition)) std::abort(); else Ignore()
namespace common { template <class T> T divUp(T a, T b) { return (a + b - 1) / b; } }
int PadUpFn(int x, int y) { return (x + y - 1) / y * y; }
// HELPERS
struct Args { int num_tokens, top_k, num_experts, local_num_experts, hidden_size,
              intermediate_size; };

int main() {
  const int dl_int32 = 4, dl_bfloat16 = 2, dl_uint8 = 1;
  std::vector<int32_t> tiles{8, 16, 32, 64, 128, 256};
  Args a, *args = &a;
  int tile;
  while (std::cin >> a.num_tokens >> a.top_k >> a.num_experts >> a.local_num_experts >>
         a.hidden_size >> a.intermediate_size >> tile) {
    int64_t chosen =
        selectDefaultTileN(tiles, a.num_tokens, a.top_k, a.local_num_experts);
    if (tile < 0) tile = chosen;
    int totalExpertsPerToken = a.top_k, totalNumExperts = a.num_experts;
    int max_num_padded_tokens = getMaxPermutedPaddedCount(
        a.num_tokens, totalExpertsPerToken, totalNumExperts, tile);
    int max_num_ctas = getMaxNumCtasInBatchDim(
        a.num_tokens, totalExpertsPerToken, totalNumExperts, tile);
    int64_t size_of_expert_count_histogram = std::max(totalNumExperts * 2, 256 * 2);
    int max_num_padded_tokens_gemm1 =
        maybeGetMinTokenCount(max_num_padded_tokens, a.intermediate_size, 8);
    int max_num_padded_tokens_gemm2 =
        maybeGetMinTokenCount(max_num_padded_tokens, a.hidden_size, 16);
    int gemm1_output_hidden = a.intermediate_size, hidden_size_output = a.hidden_size;
    int64_t sf_size = computeSwizzledLayoutSFSize(
        max_num_padded_tokens_gemm1, a.intermediate_size / 32);
    int64_t total = 0;
    auto add = [&](std::initializer_list<int64_t> extents, int64_t bytes) {
      for (int64_t extent : extents) bytes *= extent;
      total += (bytes + 127) / 128 * 128;
    };
    // SUMS
    std::cout << "[" << chosen << "," << total << "]" << std::endl;
  }
}
"""

# What the matmuls are given.
MATMUL_BYTES = 1 << 20


def test_as_many_bytes_as_flashinfers_expressions_say(tmp_path):
    source, binary = tmp_path / "arena.cc", tmp_path / "arena"
    source.write_text(program())
    subprocess.run(["g++", "-std=c++17", str(source), "-o", str(binary)], check=True)
    grid = [
        (Sizes(tokens, top_k, max(experts, local), local, hidden, inner), tile)
        for tokens, top_k, (experts, local), (hidden, inner), tile in itertools.product(
            (1, 3, 4, 7, 16, 100, 257, 4096, 40_000),
            (1, 2, 8, 22),
            ((32, 32), (128, 128), (128, 16), (512, 64), (2048, 2048)),
            ((128, 128), (2048, 768), (7168, 2048)),
            (-1, *TILE_ROWS),
        )
    ]
    lines = [" ".join(map(str, (*sizes, tile))) for sizes, tile in grid]
    run = subprocess.run(
        [binary], input="\n".join(lines), capture_output=True, text=True, check=True
    )
    answers = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(answers) == len(grid) > 3000
    for (sizes, tile), (chosen, num_bytes) in zip(grid, answers, strict=True):
        assert default_tile_rows(sizes) == chosen
        ours = arena_bytes(sizes, (tile, tile), gives_weights=False)
        assert ours == num_bytes + MATMUL_BYTES
        # Without the weights it is less by as much as they take.
        rows = -(-2 * sizes.num_tokens * sizes.top_k // 128) * 128
        assert ours - arena_bytes(sizes, (tile, tile), gives_weights=True) == rows


def test_the_tiles_are_flashinfers():
    base = re.search(r"mBaseSupportedTileNums = \{(.*?)\}", body_of(LAUNCHER, MXFP8))
    assert base is not None
    tiles = [int(tile) for tile in base[1].split(",")]
    extra = body_of(LAUNCHER, "getSupportedTileNums(", MXFP8)
    assert "MxFp8) {\n      tiles.push_back(256);" in extra
    assert (*tiles, 256) == TILE_ROWS

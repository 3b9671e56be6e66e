// Which shapes of GemmMma there are, and how they are launched.
//
// Registers: GemmMma <= 216
#include <algorithm>

#include "gemm_mma.cuh"
#include "launch.cuh"

namespace jmx8 {
namespace {

constexpr int64_t kMostBlocksInY = 65535;

using KernelFunction = void (*)(Gemm, int);

struct Entry {
  int variant, slots, rows, weight_tiles, threads, shared_bytes;
  KernelFunction kernel, plain_kernel;
};

template <typename S>
constexpr Entry MakeEntry(int variant) {
  static_assert(S::kFits);
  return {variant,         S::kSlots,   S::kRows,
          S::kWeightTiles, S::kThreads, S::kSharedBytes,
          mma::GemmMma<S, false>, mma::GemmMma<S, true>};
}

// Variants, as warps, warps that share k, tiles of 16 weight rows of a warp, stages:
//   1: 8, 8, 1, 2    2: 4, 4, 2, 2    3: 4, 4, 1, 2
//   4: 8, 8, 2, 2    5: 4, 4, 1, 4    6: 4, 2, 2, 2    7: 4, 4, 3, 2
//   8: 4, 4, 3, 4    9: 8, 8, 2, 3    10: 4, 4, 2, 3
constexpr Entry kEntries[] = {
    MakeEntry<mma::Shape<8, 8, 1, 2, 1>>(1),  MakeEntry<mma::Shape<4, 4, 2, 2, 1>>(2),
    MakeEntry<mma::Shape<4, 4, 1, 2, 1>>(3),  MakeEntry<mma::Shape<4, 4, 1, 4, 1>>(5),
    MakeEntry<mma::Shape<4, 4, 2, 2, 8>>(2),  MakeEntry<mma::Shape<8, 8, 2, 2, 8>>(4),
    MakeEntry<mma::Shape<4, 2, 2, 2, 8>>(6),  MakeEntry<mma::Shape<4, 4, 3, 2, 8>>(7),
    MakeEntry<mma::Shape<4, 4, 3, 4, 8>>(8),  MakeEntry<mma::Shape<8, 8, 2, 3, 8>>(9),
    MakeEntry<mma::Shape<8, 8, 2, 2, 16>>(4), MakeEntry<mma::Shape<4, 2, 2, 2, 16>>(6),
    MakeEntry<mma::Shape<4, 4, 3, 2, 16>>(7), MakeEntry<mma::Shape<4, 4, 3, 4, 16>>(8),
    MakeEntry<mma::Shape<4, 4, 3, 2, 32>>(7), MakeEntry<mma::Shape<4, 4, 2, 3, 32>>(10)};

}  // namespace

const char* LaunchGemmMma(const Gemm& g, const GemmConfig& config,
                          cudaStream_t stream) {
  for (const Entry& entry : kEntries) {
    if (entry.variant != config.variant || entry.slots != config.tile_rows) continue;
    if (config.split_k != 1) return "gemm_mma: split_k must be 1";
    if (g.k % 32 != 0) return "gemm_mma: k must be a multiple of 32";
    bool gated = IsGated(g.activation);
    if (gated && entry.weight_tiles % 2 != 0) {
      return "gemm_mma: a gated activation needs a variant with an even number of "
             "weight tiles";
    }
    if (gated && g.n % 2 != 0) return "gemm_mma: n must be even for a gated activation";
    int rows = gated ? entry.rows / 2 : entry.rows;
    int num_rows = gated ? g.n / 2 : g.n;
    int row_blocks = CeilDiv(num_rows, rows);
    int64_t tiles = g.tiles ? g.max_tiles : CeilDiv(g.num_slots, entry.slots);
    if (row_blocks * tiles == 0) return nullptr;
    if (!IsAligned(g.w, 16)) {
      return "gemm_mma: the weights must begin at a multiple of 16 bytes";
    }
    KernelFunction kernel = IsPlain(g) ? entry.plain_kernel : entry.kernel;
    cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, entry.shared_bytes);
    if (error == cudaSuccess) {
      cudaLaunchConfig_t launch = {};
      // To divide by the number of row blocks would delay the first loads.
      launch.gridDim.x = row_blocks;
      launch.gridDim.y = static_cast<unsigned>(std::min(tiles, kMostBlocksInY));
      launch.gridDim.z = static_cast<unsigned>(CeilDiv(tiles, kMostBlocksInY));
      launch.blockDim = entry.threads;
      launch.dynamicSmemBytes = entry.shared_bytes;
      launch.stream = stream;
      cudaLaunchAttribute early = EarlyStart();
      launch.attrs = &early;
      launch.numAttrs = g.starts_early;
      error = cudaLaunchKernelEx(&launch, kernel, g, static_cast<int>(tiles));
    }
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
  }
  return "gemm_mma: not compiled for this tile_rows and variant";
}

}  // namespace jmx8

// Variants and launch of the kernel for few rows.
#include "gemm_mma.cuh"

namespace jmx8 {
namespace {

using KernelFunction = void (*)(Gemm, int);

struct Entry {
  int variant, slots, rows, weight_tiles, threads, shared_bytes;
  KernelFunction kernel;
};

template <int kVariant, typename S>
constexpr Entry MakeEntry() {
  if constexpr (!S::kFits) {
    return {};
  } else {
    return {kVariant,    S::kSlots,       S::kRows,       S::kWeightTiles,
            S::kThreads, S::kSharedBytes, mma::Kernel<S>};
  }
}

// variant, warps, warps that share k, weight tiles of 16 rows per warp, stages
#ifndef JMX8_MMA_SLOTS
#define JMX8_MMA_SLOTS(V) V(1) V(8) V(16)
#endif
#define JMX8_MMA_VARIANTS(slots) \
  MakeEntry<0, mma::Shape<4, 4, 1, 4, slots>>(), \
  MakeEntry<1, mma::Shape<8, 8, 1, 2, slots>>(), \
  MakeEntry<2, mma::Shape<4, 4, 2, 2, slots>>(), \
  MakeEntry<3, mma::Shape<4, 4, 2, 4, slots>>(), \
  MakeEntry<4, mma::Shape<8, 8, 2, 2, slots>>(), \
  MakeEntry<5, mma::Shape<4, 4, 4, 2, slots>>(), \
  MakeEntry<6, mma::Shape<8, 8, 4, 2, slots>>(), \
  MakeEntry<7, mma::Shape<4, 4, 3, 3, slots>>(), \
  MakeEntry<8, mma::Shape<4, 2, 2, 3, slots>>(), \
  MakeEntry<9, mma::Shape<8, 2, 2, 2, slots>>(), \
  MakeEntry<10, mma::Shape<2, 2, 4, 4, slots>>(), \
  MakeEntry<11, mma::Shape<4, 1, 2, 3, slots>>(),

constexpr Entry kEntries[] = {
#define JMX8_MMA_ENTRIES(slots) JMX8_MMA_VARIANTS(slots)
    JMX8_MMA_SLOTS(JMX8_MMA_ENTRIES)};

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
    int row_blocks = (num_rows + rows - 1) / rows;
    int64_t tiles = g.tiles ? g.max_tiles : (g.num_slots + entry.slots - 1) / entry.slots;
    if (row_blocks * tiles == 0) return nullptr;
    if (row_blocks * tiles > INT32_MAX) return "gemm_mma: too many thread blocks";
    cudaError_t error = cudaFuncSetAttribute(
        entry.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, entry.shared_bytes);
    if (error == cudaSuccess) {
      entry.kernel<<<static_cast<unsigned>(row_blocks * tiles), entry.threads,
                     entry.shared_bytes, stream>>>(g, row_blocks);
      error = cudaGetLastError();
    }
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
  }
  return "gemm_mma: not compiled for this tile_rows and variant";
}

}  // namespace jmx8

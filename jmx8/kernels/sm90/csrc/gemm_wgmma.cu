// Which shapes of GemmWgmma there are, and how they are launched.
//
// Registers: GemmWgmma <= 168
#include <algorithm>

#include "gemm_wgmma.cuh"
#include "launch.cuh"
#include "tensor_map.h"

namespace jmx8 {
namespace {

using wgmma::Arguments;
using wgmma::Shape;

int NumMultiprocessors() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

template <class S>
const char* Launch(const Gemm& g, int split_k, cudaStream_t stream) {
  if (split_k > 1 && !S::kSplits) return "gemm_wgmma: split_k must be 1 for this shape";
  CUtensorMap w_map, x_map = {}, out_map = {};
  if (const char* error = EncodeElements(g, S::kBoxN, S::kK, &w_map)) return error;
  if (!S::kGathers) {
    if (const char* error = EncodeRows(g, S::kRows, &x_map)) return error;
  }
  if (S::kGathers && int64_t{g.num_x_rows} * (g.k / 8) > UINT32_MAX) {
    return "gemm_wgmma: x has too many elements to gather from";
  }
  Arguments a{g, 0, 0, split_k, 1};
  while (1 << a.split_shift < split_k) ++a.split_shift;
  a.scales_are_words = g.k % 128 == 0 && IsAligned(g.scales, 4);
  const int columns = IsGated(g.activation) ? g.n / 2 : g.n;
  const int tile_n = IsGated(g.activation) ? S::kBoxN : S::kN;
  a.num_n_tiles = CeilDiv(columns, tile_n);
  a.num_row_tiles =
      g.tiles != nullptr ? g.max_tiles : CeilDiv<int>(g.num_slots, S::kRows);
  if (g.tiles == nullptr) a.group_rows = a.num_row_tiles < 8 ? a.num_row_tiles : 8;
  int64_t blocks = int64_t{a.num_n_tiles} * a.num_row_tiles * split_k;
  if (blocks == 0) return nullptr;
  if (blocks >= int64_t{1} << 31) return "gemm_wgmma: too many thread blocks";
  if (wgmma::IsDirect<S>(g, split_k)) {
    // A block goes on with another tile, whose loads begin before the last one ends.
    const int64_t most = int64_t{NumMultiprocessors()} * S::kOccupancy;
    blocks = std::min(blocks, most);
    a.copies_out = g.out_pitch % 8 == 0;
  }
  if (a.copies_out) {
    const char* error = EncodeOut(g, S::kPassRows, S::kSideBoxN, &out_map);
    if (error != nullptr) return error;
  }
  auto* kernel = wgmma::GemmWgmma<S, false>;
  if constexpr (!S::kGathers && !S::kMixed) {
    if (IsPlain(g) && a.scales_are_words) kernel = wgmma::GemmWgmma<S, true>;
  }
  cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kSharedBytes);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(S::kThreads);
  config.dynamicSmemBytes = S::kSharedBytes;
  config.stream = stream;
  cudaLaunchAttribute attributes[2];
  config.attrs = attributes;
  if (split_k > 1) {
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {static_cast<unsigned>(split_k), 1, 1};
  }
  if (g.starts_early) attributes[config.numAttrs++] = EarlyStart();
  error = cudaLaunchKernelEx(&config, kernel, a, w_map, x_map, out_map);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

// The variants, as `kN x kK`, warpgroups that share k, blocks per multiprocessor:
//   0: 64 x 128, 2, 2 (1 from 128 rows)          2: 128 x 128, 1, 2 (the same)
//   1: 64 x 128, 2, 1, for rows that are not gathered
//   4: 256 x 64, 1, 1                            8: the same, mixed
//   5: 128 x 64, 1, 1
//   6: 192 x 128 (64 from 128 rows), 1, 1, for rows that are not gathered
const char* LaunchGemmWgmma(const Gemm& g, const GemmConfig& c, cudaStream_t stream) {
  if (c.split_k != 1 && c.split_k != 2 && c.split_k != 4 && c.split_k != 8) {
    return "gemm_wgmma: split_k must be 1, 2, 4 or 8";
  }
  const bool gathers = g.slot_rows != nullptr;
#define JMX8_SHAPE(rows, variant_, ...)                                                \
  if (c.tile_rows == rows && c.variant == variant_ && !gathers) {                      \
    return Launch<Shape<rows, __VA_ARGS__, false>>(g, c.split_k, stream);              \
  }
#define JMX8_SHAPES(rows, variant_, ...)                                               \
  JMX8_SHAPE(rows, variant_, __VA_ARGS__)                                              \
  if (c.tile_rows == rows && c.variant == variant_) {                                  \
    return Launch<Shape<rows, __VA_ARGS__, true>>(g, c.split_k, stream);               \
  }
  JMX8_SHAPES(8, 0, 8, 1, 1, 2, 128, 2, false)
  JMX8_SHAPES(8, 2, 8, 1, 2, 1, 128, 2, false)
  JMX8_SHAPES(16, 0, 16, 1, 1, 2, 128, 2, false)
  JMX8_SHAPES(16, 2, 16, 1, 2, 1, 128, 2, false)
  JMX8_SHAPES(32, 0, 32, 1, 1, 2, 128, 2, false)
  JMX8_SHAPE(32, 1, 32, 1, 1, 2, 128, 1, false)
  JMX8_SHAPES(32, 2, 32, 1, 2, 1, 128, 2, false)
  JMX8_SHAPE(32, 6, 32, 1, 3, 1, 128, 1, false)
  JMX8_SHAPES(64, 0, 64, 1, 1, 2, 128, 2, false)
  JMX8_SHAPE(64, 1, 64, 1, 1, 2, 128, 1, false)
  JMX8_SHAPES(64, 2, 64, 1, 2, 1, 128, 2, false)
  JMX8_SHAPES(64, 4, 64, 2, 2, 1, 64, 1, false)
  JMX8_SHAPE(64, 6, 64, 1, 3, 1, 128, 1, false)
  JMX8_SHAPES(64, 8, 32, 2, 2, 1, 64, 1, true)
  JMX8_SHAPES(128, 0, 128, 1, 1, 2, 128, 1, false)
  JMX8_SHAPES(128, 2, 128, 1, 2, 1, 128, 1, false)
  JMX8_SHAPES(128, 4, 32, 2, 2, 1, 64, 1, false)
  JMX8_SHAPE(128, 6, 128, 1, 3, 1, 64, 1, false)
  JMX8_SHAPES(128, 8, 32, 2, 2, 1, 64, 1, true)
  JMX8_SHAPES(256, 5, 256, 1, 2, 1, 64, 1, false)
#undef JMX8_SHAPE
#undef JMX8_SHAPES
  return "gemm_wgmma.cu has no such configuration";
}

}  // namespace jmx8

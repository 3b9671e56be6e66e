// How the work of GemmMma is divided, and how its sums become the result.
#pragma once

#include <cuda_bf16.h>

#include "activation.cuh"
#include "bias.cuh"
#include "kernels.h"
#include "ptx.cuh"

namespace jmx8::mma {

constexpr int kUnit = 128;  // columns of k that a warp copies at a time

// kSlots: rows of x per thread block; a power of two, 8 of them make one mma.
template <int kWarps_, int kWarpsK_, int kWeightTiles_, int kStages_, int kSlots_>
struct Shape {
  static constexpr int kWarps = kWarps_, kWarpsK = kWarpsK_, kStages = kStages_;
  static constexpr int kWeightTiles = kWeightTiles_, kSlots = kSlots_;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kRowGroups = kWarps / kWarpsK;
  static constexpr int kWarpRows = kWeightTiles * 16;
  static constexpr int kRows = kRowGroups * kWarpRows;
  static constexpr int kSlotTiles = (kSlots + 7) / 8;
  static constexpr int kActivationCopies = (kSlots + 1) / 2;
  static constexpr int kScaleCopies = (kWarpRows + 31) / 32;
  // A warp's part of shared memory: stages of elements, and stages of activations and
  // scales. A row has 8 bytes of scales, as the four that are needed may lie across two
  // words.
  static constexpr int kTileBytes = 16 * kUnit;
  static constexpr int kElementBytes = kWeightTiles * kTileBytes;
  static constexpr int kActivationBytes = kSlots * kUnit * 2;
  static constexpr int kOtherBytes = kActivationBytes + kWarpRows * 8;
  static constexpr int kSharedBytes = kWarps * kStages * (kElementBytes + kOtherBytes);
  // Sums of one mma: slots of 16 rows, padded so that a warp's stores hit all banks.
  static constexpr int kSumPitch = 20;
  static constexpr int kSumBytes = kWeightTiles * kSlotTiles * 8 * kSumPitch * 4;
  static constexpr int kBlocksBySharedMemory = 233472 / (kSharedBytes + 1024);
  static constexpr int kBlocksByRegisters =
      65536 / (kThreads * (kWeightTiles * kSlotTiles >= 8 ? 168 : 128));
  static constexpr int kBlocks = kBlocksBySharedMemory < kBlocksByRegisters
                                     ? kBlocksBySharedMemory
                                     : kBlocksByRegisters;
  static constexpr bool kFits = kBlocks >= 1;
  static_assert(kWarps % kWarpsK == 0 && kSumBytes <= kStages * kElementBytes);
};

// What a thread block works on. Gated: weight tiles alternate between rows of the gate
// and the same rows of up, so one block has all that the activation needs.
template <typename S>
struct Block {
  Tile tile;
  int first_row, num_rows;  // of the output
  bool gated;

  __device__ __forceinline__ int OutputRow(int group, int weight_tile) const {
    int tiles = group * S::kWeightTiles + weight_tile;
    return first_row + (gated ? tiles / 2 : tiles) * 16;
  }

  // Whether all of its rows are there.
  __device__ __forceinline__ bool IsWhole() const {
    return first_row + (gated ? S::kRows / 2 : S::kRows) <= num_rows;
  }

  // May be past the last row: whatever is multiplied there is not stored.
  __device__ __forceinline__ int WeightRow(int group, int weight_tile) const {
    int row = OutputRow(group, weight_tile);
    return gated && weight_tile % 2 ? num_rows + row : row;
  }
};

// Adds up, in a fixed order, what the warps that share rows have summed: four rows.
template <typename S>
__device__ __forceinline__ void AddUp(const uint8_t* shared, int group, int tile,
                                      int slot, int row, float (&sum)[4]) {
  int at = (tile * S::kSlotTiles * 8 + slot) * S::kSumPitch + row;
#pragma unroll
  for (int i = 0; i < S::kWarpsK; ++i) {
    int warp = group * S::kWarpsK + i;
    const uint8_t* sums = shared + warp * S::kStages * S::kElementBytes + at * 4;
    const float4 v = *reinterpret_cast<const float4*>(sums);
    sum[0] += v.x, sum[1] += v.y, sum[2] += v.z, sum[3] += v.w;
  }
}

__device__ __forceinline__ void AddBias(const Gemm& g, int64_t first, int count,
                                        float (&sum)[4]) {
  if (!g.bias) return;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (j < count) sum[j] += LoadBias(g, first + j);
  }
}

__device__ __forceinline__ void StoreFour(const Gemm& g, int64_t to, int count,
                                          const float (&v)[4]) {
  if (count == 4 && g.out_pitch % 4 == 0) {
    if (g.out_is_f32) {
      *reinterpret_cast<float4*>(static_cast<float*>(g.out) + to) =
          make_float4(v[0], v[1], v[2], v[3]);
    } else {
      *reinterpret_cast<uint2*>(static_cast<__nv_bfloat16*>(g.out) + to) =
          make_uint2(ptx::PackBf16(v[0], v[1]), ptx::PackBf16(v[2], v[3]));
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (j >= count) break;
    if (g.out_is_f32) {
      static_cast<float*>(g.out)[to + j] = v[j];
    } else {
      static_cast<__nv_bfloat16*>(g.out)[to + j] = __float2bfloat16_rn(v[j]);
    }
  }
}

template <typename S>
__device__ __forceinline__ void StoreBlock(const Gemm& g, const Block<S>& block,
                                           const uint8_t* shared) {
  unsigned tiles_per_output = block.gated ? 2 : 1;
  unsigned output_tiles = S::kRowGroups * S::kWeightTiles / tiles_per_output;
  int64_t bias_row = int64_t{block.tile.expert} * g.n;
  for (unsigned i = threadIdx.x; i < output_tiles * S::kSlots * 4; i += S::kThreads) {
    int row = i % 4 * 4, slot = i / 4 % S::kSlots;
    unsigned weight_tile = i / (4 * S::kSlots) * tiles_per_output;
    unsigned group = weight_tile / S::kWeightTiles;
    weight_tile %= S::kWeightTiles;
    int output_row = block.OutputRow(group, weight_tile) + row;
    int count = min(4, block.num_rows - output_row);
    if (slot >= block.tile.num_slots || count <= 0) continue;
    float sum[4] = {};
    AddUp<S>(shared, group, weight_tile, slot, row, sum);
    AddBias(g, bias_row + output_row, count, sum);
    if (block.gated) {
      float up[4] = {};
      AddUp<S>(shared, group, weight_tile + 1, slot, row, up);
      AddBias(g, bias_row + block.num_rows + output_row, count, up);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        sum[j] = ApplyGated(g.activation, sum[j], up[j], g.alpha, g.beta, g.limit);
      }
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[j] = ApplyUngated(g.activation, sum[j]);
    }
    int64_t to = int64_t{block.tile.first_slot + slot} * g.out_pitch + output_row;
    StoreFour(g, to, count, sum);
  }
}

}  // namespace jmx8::mma

// The kernel for few rows: mma.sync.m16n8k16 with the weights on the side of 16 rows.
//
// A warp owns 16 * kWeightTiles rows of the weight and every kWarpsK-th unit of 128
// columns. Lane 4 r + c multiplies, of rows r and r + 8 and of slot r, the columns
// [16 c, 16 c + 16) of each half unit, a half being one k step of four mma: the order
// of k within a step is free as long as weights and activations agree, so both are read
// as they lie in memory. Every lane copies what it will multiply into its own part of a
// ring of stages in shared memory (the scales of a row are copied by one lane for the
// four that need them). No barrier is needed until the warps add up their sums.
#pragma once

#include <cuda_bf16.h>

#include "activation.cuh"
#include "kernels.h"
#include "ptx.cuh"
#include "widen.cuh"

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
  static constexpr int kSlotsPerTile = kSlots < 8 ? kSlots : 8;
  static constexpr int kElementCopies = kWarpRows / 4;
  static constexpr int kActivationCopies = (kSlots + 1) / 2;
  static constexpr int kScaleCopies = (kWarpRows + 31) / 32;
  // One stage of a warp: elements, activations, scales (8 bytes per row, since the four
  // that are needed may lie across two aligned words).
  static constexpr int kElementBytes = kWarpRows * kUnit;
  static constexpr int kActivationBytes = kSlotTiles * kSlotsPerTile * kUnit * 2;
  static constexpr int kStageBytes = kElementBytes + kActivationBytes + kWarpRows * 8;
  static constexpr int kWarpBytes = kStageBytes * kStages;
  static constexpr int kSharedBytes = kWarpBytes * kWarps;
  // Sums of one mma: slots of 16 rows, padded so that a warp's stores hit all banks.
  static constexpr int kSumPitch = 20;
  static constexpr int kSumBytes = kWeightTiles * kSlotTiles * 8 * kSumPitch * 4;
  static constexpr int kBlocksBySharedMemory = 232448 / (kSharedBytes + 1024);
  static constexpr int kBlocksByRegisters =
      65536 / (kThreads * (kWeightTiles * kSlotTiles >= 8 ? 168 : 128));
  static constexpr int kBlocks = kBlocksBySharedMemory < kBlocksByRegisters
                                     ? kBlocksBySharedMemory
                                     : kBlocksByRegisters;
  static constexpr bool kFits = kBlocks >= 1;
  static_assert(kWarps % kWarpsK == 0 && kSumBytes <= kWarpBytes);
};

__device__ __forceinline__ void CopyElements(uint32_t to, const uint8_t* from,
                                             uint32_t bytes, uint64_t policy) {
  asm volatile(
      "cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(to),
      "l"(from), "r"(bytes), "l"(policy)
      : "memory");
}

__device__ __forceinline__ void CopyScales(uint32_t to, const uint8_t* from,
                                           uint32_t bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from),
               "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void CommitCopies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int kPending>
__device__ __forceinline__ void WaitForCopies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ uint4 LoadShared128(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address));
  return v;
}

__device__ __forceinline__ uint2 LoadShared64(uint32_t address) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
               : "=r"(v.x), "=r"(v.y)
               : "r"(address));
  return v;
}

__device__ __forceinline__ void Mma(float (&d)[4], const uint32_t (&a)[4],
                                    const uint32_t* b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

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

  // The weight's row; past the last one, the last: its sums are not stored.
  __device__ __forceinline__ int WeightRow(int group, int row) const {
    int output = min(OutputRow(group, row / 16) + row % 16, num_rows - 1);
    return gated && (row / 16) % 2 ? num_rows + output : output;
  }
};

// One warp's copies and products.
//
// In a stage, a row of elements is 128 bytes and one of activations 256. Their chunks of
// 16 bytes are exchanged so that copies, which write whole rows, and products, which
// read some chunks of several rows, both use all banks.
template <typename S>
struct Warp {
  const Gemm& g;
  const uint8_t *elements, *scales, *x;  // of the expert; from the lane's chunk on
  uint32_t ring;
  int lane, r, c, slots, units;
  uint64_t policy;
  uint32_t element_offset[S::kElementCopies], x_offset[S::kActivationCopies];
  uint32_t scale_offset[S::kScaleCopies], scale_shift[S::kWeightTiles];
  int64_t scale_end;
  float sums[S::kWeightTiles][S::kSlotTiles][4];

  __device__ __forceinline__ Warp(const Gemm& gemm, const Block<S>& block,
                                  uint32_t shared)
      : g(gemm),
        ring(shared + threadIdx.x / 32 * S::kWarpBytes),
        lane(threadIdx.x % 32),
        r(lane / 4),
        c(lane % 4),
        slots(block.tile.num_slots),
        units((g.k + kUnit - 1) / kUnit),
        policy(ptx::EvictFirstPolicy()),
        sums{} {
    int group = threadIdx.x / 32 / S::kWarpsK;
    int64_t matrix = int64_t{block.tile.expert} * g.n;
    elements = g.w + matrix * g.k + lane % 8 * 16;
#pragma unroll
    for (int i = 0; i < S::kElementCopies; ++i) {
      element_offset[i] = block.WeightRow(group, i * 4 + lane / 8) * g.k;
    }
    // Aligned downwards; what that skips is shifted out when a row is read.
    int64_t skipped = matrix * (g.k / 32) % 4;
    scales = g.scales + matrix * (g.k / 32) - skipped;
    scale_end = (int64_t{g.num_experts} * g.n - matrix) * (g.k / 32) + skipped;
#pragma unroll
    for (int i = 0; i < S::kScaleCopies; ++i) {
      int row = min(i * 32 + lane, S::kWarpRows - 1);
      scale_offset[i] = (block.WeightRow(group, row) * (g.k / 32) + skipped) & ~3u;
    }
#pragma unroll
    for (int i = 0; i < S::kWeightTiles; ++i) {
      uint32_t first = block.WeightRow(group, i * 16 + r) * (g.k / 32) + skipped;
      scale_shift[i] = 8 * (first % 4 + c / 2);
    }
  }

  __device__ __forceinline__ void FindActivations(const Tile& tile) {
    x = static_cast<const uint8_t*>(g.x) + lane % 16 * 16;
#pragma unroll
    for (int i = 0; i < S::kActivationCopies; ++i) {
      int slot = tile.first_slot + min(i * 2 + lane / 16, slots - 1);
      x_offset[i] = g.slot_rows ? g.slot_rows[slot] : slot;
    }
  }

  __device__ __forceinline__ uint32_t ElementsAt(int stage) const {
    return ring + stage * S::kStageBytes;
  }
  __device__ __forceinline__ uint32_t ActivationsAt(int stage) const {
    return ElementsAt(stage) + S::kElementBytes;
  }
  __device__ __forceinline__ uint32_t ScalesAt(int stage) const {
    return ActivationsAt(stage) + S::kActivationBytes;
  }
  static __device__ __forceinline__ int ElementSwizzle(int row) {
    return (row % 2 * 4) | (row / 2 % 4);
  }

  __device__ __forceinline__ void CopyWeights(int stage, int unit) {
    int chunk = lane % 8, row = lane / 8;
    uint32_t bytes = unit * kUnit + chunk * 16 < g.k ? 16 : 0;
    const uint8_t* from = elements + unit * kUnit;
#pragma unroll
    for (int i = 0; i < S::kElementCopies; ++i) {
      uint32_t to = (i * 4 + row) * 128 + (chunk ^ ElementSwizzle(i * 4 + row)) * 16;
      CopyElements(ElementsAt(stage) + to, from + element_offset[i], bytes, policy);
    }
#pragma unroll
    for (int i = 0; i < S::kScaleCopies; ++i) {
      if (i * 32 + lane >= S::kWarpRows) break;
      uint32_t to = ScalesAt(stage) + (i * 32 + lane) * 8;
      if (g.k % kUnit == 0) {
        ptx::CopyAsync4(to, scales + scale_offset[i] + unit * 4);
      } else {
        CopyScaleWords(to, scale_offset[i] + unit * 4);
      }
    }
  }

  // Two words, and zeros for what is past the last scale.
  __device__ __forceinline__ void CopyScaleWords(uint32_t to, int64_t from) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int64_t bytes = min(max(scale_end - from - i * 4, int64_t{0}), int64_t{4});
      CopyScales(to + i * 4, scales + (bytes ? from + i * 4 : 0), bytes);
    }
  }

  __device__ __forceinline__ void CopyActivations(int stage, int unit) {
    int chunk = lane % 16, row = lane / 16;
    uint32_t bytes = unit * kUnit + chunk * 8 < g.k ? 16 : 0;
    const uint8_t* from = x + unit * kUnit * 2;
#pragma unroll
    for (int i = 0; i < S::kActivationCopies; ++i) {
      if (i * 2 + row >= slots) break;
      uint32_t to = (i * 2 + row) * 256 + (chunk ^ row) * 16;
      ptx::CopyAsync16(ActivationsAt(stage) + to,
                       from + int64_t{x_offset[i]} * (g.k * 2), bytes);
    }
  }

  // The lane's two scale codes of a row: of half 0 in byte 0, of half 1 in byte 2.
  __device__ __forceinline__ uint32_t LoadScales(int stage, int row, uint32_t mask) {
    uint2 words = LoadShared64(ScalesAt(stage) + row * 8);
    return __funnelshift_rc(words.x, words.y, scale_shift[row / 16]) & mask;
  }

  __device__ __forceinline__ void Multiply(int stage, int unit) {
    int blocks = g.k / 32 - unit * 4;
    uint32_t mask = (c / 2 < blocks ? 0xff : 0) | (c / 2 + 2 < blocks ? 0xff0000 : 0);
    uint32_t codes[2 * S::kWeightTiles];
    bool any_large = false;
#pragma unroll
    for (int i = 0; i < 2 * S::kWeightTiles; ++i) {
      codes[i] = LoadScales(stage, i * 8 + r, mask);
      any_large |= AnyLargeScale(codes[i]);
    }
    if (__any_sync(~0u, any_large)) {
      Multiply<true>(stage, codes);
    } else {
      Multiply<false>(stage, codes);
    }
  }

  template <bool kAnyScale>
  __device__ __forceinline__ void Multiply(
      int stage, const uint32_t (&codes)[2 * S::kWeightTiles]) {
    // Rows r and r + 8 are exchanged alike. Half 1 is four chunks further.
    uint32_t elements_at = ElementsAt(stage) + r * 128 + (c ^ ElementSwizzle(r)) * 16;
    uint32_t x_at = ActivationsAt(stage);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t b[S::kSlotTiles][8];
#pragma unroll
      for (int j = 0; j < S::kSlotTiles; ++j) {
        if (j == 0 || j * 8 < slots) LoadActivations(x_at, j, half, b[j]);
      }
#pragma unroll
      for (int i = 0; i < S::kWeightTiles; ++i) {
        uint32_t at = (elements_at ^ (half * 64)) + i * 16 * 128;
        uint4 low = LoadShared128(at);
        uint4 high = LoadShared128(at + 8 * 128);
        Factors<kAnyScale> low_factors(codes[2 * i] >> (16 * half) & 0xff);
        Factors<kAnyScale> high_factors(codes[2 * i + 1] >> (16 * half) & 0xff);
        const uint32_t lows[4] = {low.x, low.y, low.z, low.w};
        const uint32_t highs[4] = {high.x, high.y, high.z, high.w};
#pragma unroll
        for (int step = 0; step < 4; ++step) {
          uint32_t a[4];
          Widen(lows[step], low_factors, &a[0], &a[2]);
          Widen(highs[step], high_factors, &a[1], &a[3]);
#pragma unroll
          for (int j = 0; j < S::kSlotTiles; ++j) {
            if (j == 0 || j * 8 < slots) Mma(sums[i][j], a, &b[j][step * 2]);
          }
        }
      }
    }
  }

  // The B fragments of four mma, in the order in which Widen leaves the elements.
  // Slots that are not there get whatever is in memory, which no other slot sees.
  __device__ __forceinline__ void LoadActivations(uint32_t from, int j, int half,
                                                  uint32_t (&b)[8]) {
    int row = S::kSlotsPerTile < 8 ? min(r, S::kSlotsPerTile - 1) : r;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int chunk = (half * 8 + c * 2 + i) ^ (row % 2);
      uint4 v = LoadShared128(from + (j * 8 + row) * 256 + chunk * 16);
      b[i * 4] = __byte_perm(v.x, v.y, 0x5410);
      b[i * 4 + 1] = __byte_perm(v.x, v.y, 0x7632);
      b[i * 4 + 2] = __byte_perm(v.z, v.w, 0x5410);
      b[i * 4 + 3] = __byte_perm(v.z, v.w, 0x7632);
    }
  }

  __device__ __forceinline__ void Run(const Tile& tile) {
    int first = threadIdx.x / 32 % S::kWarpsK;
    int count = (units - first + S::kWarpsK - 1) / S::kWarpsK;
    auto unit_of = [&](int i) { return first + i * S::kWarpsK; };
    // The weights first: they do not wait for the rows of x to be known.
#pragma unroll
    for (int i = 0; i < S::kStages; ++i) {
      if (i < count) CopyWeights(i, unit_of(i));
    }
    FindActivations(tile);
#pragma unroll
    for (int i = 0; i < S::kStages; ++i) {
      if (i < count) CopyActivations(i, unit_of(i));
      CommitCopies();
    }
    int stage = 0;
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      WaitForCopies<S::kStages - 1>();
      __syncwarp();
      Multiply(stage, unit_of(i));
      __syncwarp();
      if (i + S::kStages < count) {
        CopyWeights(stage, unit_of(i + S::kStages));
        CopyActivations(stage, unit_of(i + S::kStages));
      }
      CommitCopies();
      stage = stage + 1 == S::kStages ? 0 : stage + 1;
    }
  }

  // Leaves the sums in the warp's own ring, as [weight tile, slot, row].
  __device__ __forceinline__ void StoreSums() const {
#pragma unroll
    for (int i = 0; i < S::kWeightTiles; ++i) {
#pragma unroll
      for (int j = 0; j < S::kSlotTiles; ++j) {
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          int slot = (i * S::kSlotTiles + j) * 8 + 2 * c + v % 2;
          uint32_t to = ring + (slot * S::kSumPitch + r + v / 2 * 8) * 4;
          asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(sums[i][j][v])
                       : "memory");
        }
      }
    }
  }
};

__device__ __forceinline__ float LoadBias(const Gemm& g, int64_t index) {
  if (g.bias_is_f32) return static_cast<const float*>(g.bias)[index];
  return __bfloat162float(static_cast<const __nv_bfloat16*>(g.bias)[index]);
}

// Adds up, in a fixed order, what the warps that share rows have summed.
template <typename S>
__device__ __forceinline__ float AddUp(const uint8_t* shared, int group, int tile,
                                       int slot, int row) {
  int at = (tile * S::kSlotTiles * 8 + slot) * S::kSumPitch + row;
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < S::kWarpsK; ++i) {
    const uint8_t* ring = shared + (group * S::kWarpsK + i) * S::kWarpBytes;
    sum += reinterpret_cast<const float*>(ring)[at];
  }
  return sum;
}

template <typename S>
__device__ __forceinline__ void StoreBlock(const Gemm& g, const Block<S>& block,
                                           const uint8_t* shared) {
  int tiles_per_output = block.gated ? 2 : 1;
  int output_tiles = S::kRowGroups * S::kWeightTiles / tiles_per_output;
  int slots = block.tile.num_slots;
  int64_t bias_row = int64_t{block.tile.expert} * g.n;
  for (int i = threadIdx.x; i < output_tiles * slots * 16; i += S::kThreads) {
    int row = i % 16, slot = i / 16 % slots;
    int weight_tile = i / 16 / slots * tiles_per_output;
    int group = weight_tile / S::kWeightTiles;
    weight_tile %= S::kWeightTiles;
    int output_row = block.OutputRow(group, weight_tile) + row;
    if (output_row >= block.num_rows) continue;
    float sum = AddUp<S>(shared, group, weight_tile, slot, row);
    if (g.bias) sum += LoadBias(g, bias_row + output_row);
    if (block.gated) {
      float up = AddUp<S>(shared, group, weight_tile + 1, slot, row);
      if (g.bias) up += LoadBias(g, bias_row + block.num_rows + output_row);
      sum = ApplyGated(g.activation, sum, up, g.alpha, g.beta, g.limit);
    } else {
      sum = ApplyUngated(g.activation, sum);
    }
    int64_t to = int64_t{block.tile.first_slot + slot} * block.num_rows + output_row;
    if (g.out_is_f32) {
      static_cast<float*>(g.out)[to] = sum;
    } else {
      static_cast<__nv_bfloat16*>(g.out)[to] = __float2bfloat16_rn(sum);
    }
  }
}

template <typename S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks)
    Kernel(const __grid_constant__ Gemm g, int row_blocks) {
  extern __shared__ __align__(128) uint8_t shared[];
  Block<S> block;
  int tile = blockIdx.x / row_blocks;
  if (g.tiles) {
    block.tile = g.tiles[tile];
    if (tile >= *g.num_tiles) return;
  } else {
    int first_slot = tile * S::kSlots;
    block.tile = {0, first_slot, min(S::kSlots, g.num_slots - first_slot), 0};
  }
  block.gated = IsGated(g.activation);
  block.num_rows = block.gated ? g.n / 2 : g.n;
  block.first_row = blockIdx.x % row_blocks * (block.gated ? S::kRows / 2 : S::kRows);
  Warp<S> warp(g, block, ptx::SharedAddress(shared));
  warp.Run(block.tile);
  __syncwarp();
  warp.StoreSums();
  __syncthreads();
  StoreBlock(g, block, shared);
}

}  // namespace jmx8::mma

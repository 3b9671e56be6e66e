// The kernel for few rows: mma.sync.m16n8k16 with the weights on the side of 16 rows.
//
// A warp owns 16 * kWeightTiles rows of the weight and every kWarpsK-th unit of 128
// columns. Lane 4 r + c multiplies the MX block c of the unit, of rows r and r + 8 and
// of slot r: the order of k within mma is free as long as weights and activations
// agree, so both are read as they lie in memory. Each warp has a ring of stages in
// shared memory of its own, which it fills itself: no warp waits for another until they
// add up their sums. Its lanes copy: the copy engine takes longer to begin.
#pragma once

#include "mma_block.cuh"
#include "plain.cuh"
#include "widen.cuh"

namespace jmx8::mma {

__device__ __forceinline__ void Mma(float (&d)[4], const uint32_t (&a)[4],
                                    uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// One warp's copies and products.
template <typename S>
struct Warp {
  const Gemm& g;
  const Tile tile;
  uint32_t elements, others;  // its parts of shared memory
  int lane, r, c;
  int units;
  const uint8_t* w[S::kWeightTiles];  // the lane's first chunk of each
  uint32_t has_rows;                  // bits of the rows that the lane copies chunks of
  const uint8_t* scales[S::kScaleCopies];
  const uint8_t* x[S::kActivationCopies];
  uint32_t code_at[2];  // of row r in even and odd weight tiles
  uint64_t policy;
  float sums[S::kWeightTiles][S::kSlotTiles][4];

  __device__ __forceinline__ Warp(const Gemm& gemm, const Block<S>& block,
                                  uint32_t shared)
      : g(gemm),
        tile(block.tile),
        lane(threadIdx.x % 32),
        r(lane / 4),
        c(lane % 4),
        units((g.k + kUnit - 1) / kUnit),
        has_rows(~0u),
        policy(ptx::EvictFirstPolicy()),
        sums{} {
    int warp = threadIdx.x / 32, group = warp / S::kWarpsK;
    elements = shared + warp * S::kStages * S::kElementBytes;
    others = shared + S::kWarps * S::kStages * S::kElementBytes +
             warp * S::kStages * S::kOtherBytes;
    const uint8_t* matrix = g.w + int64_t{tile.expert} * g.n * g.k + lane % 8 * 16;
#pragma unroll
    for (int i = 0; i < S::kWeightTiles; ++i) {
      int row = block.WeightRow(group, i) + lane / 8;
      w[i] = matrix + int64_t{row} * g.k;
    }
    if (block.IsWhole()) return;
    has_rows = 0;
#pragma unroll
    for (int i = 0; i < S::kWeightTiles * 4; ++i) {
      int row = block.WeightRow(group, i / 4) + lane / 8 + i % 4 * 4;
      has_rows |= (row < g.n) << i;
    }
  }

  // Not needed for the first copies of elements, which it would delay: the compiler
  // moves no shuffle before them, and nothing that depends on it.
  __device__ __forceinline__ void FindScales(const Block<S>& block) {
    const int group = __shfl_sync(~0u, threadIdx.x / 32, 0) / S::kWarpsK;
    const int64_t matrix = int64_t{tile.expert} * g.n;
    const int64_t last = int64_t{g.num_experts} * g.n - 1;
    const uint32_t pitch = static_cast<uint32_t>(g.k) / 32;
#pragma unroll
    for (int i = 0; i < S::kScaleCopies; ++i) {
      int row = i * 32 + lane;
      int64_t from = matrix + block.WeightRow(group, row / 16) + row % 16;
      if (!block.IsWhole() && from > last) from = last;
      // Of the word that has the row's first scale.
      scales[i] = g.scales + (from * pitch & ~int64_t{3});
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t row = matrix + block.WeightRow(group, i % S::kWeightTiles) + r;
      code_at[i] = r * 8 + row * pitch % 4 + c;
    }
  }

  __device__ __forceinline__ void FindActivations() {
#pragma unroll
    for (int i = 0; i < S::kActivationCopies; ++i) {
      int slot = tile.first_slot + min(i * 2 + lane / 16, tile.num_slots - 1);
      int row = g.slot_rows ? g.slot_rows[slot] : slot;
      x[i] = static_cast<const uint8_t*>(g.x) +
             (int64_t{row} * g.k + lane % 16 * 8) * 2;
    }
  }

  __device__ __forceinline__ uint32_t ElementsAt(int stage) const {
    return elements + stage * S::kElementBytes;
  }
  __device__ __forceinline__ uint32_t ActivationsAt(int stage) const {
    return others + stage * S::kOtherBytes;
  }
  __device__ __forceinline__ uint32_t ScalesAt(int stage) const {
    return ActivationsAt(stage) + S::kActivationBytes;
  }

  __device__ __forceinline__ void CopyElements(int stage, int unit) {
    int chunk = lane % 8, row = lane / 8;
    bool has_k = unit * kUnit + chunk * 16 < g.k;
    // Chunks are exchanged such that what several rows have of a column is in all banks.
#pragma unroll
    for (int i = 0; i < S::kWeightTiles * 4; ++i) {
      uint32_t to = ElementsAt(stage) + (i * 4 + row) * kUnit +
                    (chunk ^ (i % 2 * 4 + row)) * 16;
      const uint8_t* from = w[i / 4] + int64_t{i % 4 * 4} * g.k + unit * kUnit;
      ptx::CopyAsync16(to, from, has_k && (has_rows >> i & 1) ? 16 : 0, policy);
    }
  }

  __device__ __forceinline__ void CopyScales(int stage, int unit) {
#pragma unroll
    for (int i = 0; i < S::kScaleCopies; ++i) {
      if (i * 32 + lane >= S::kWarpRows) break;
      uint32_t to = ScalesAt(stage) + (i * 32 + lane) * 8;
      const uint8_t* from = scales[i] + unit * 4;
      if (g.k % kUnit == 0) {
        ptx::CopyAsync4(to, from);
      } else {
        CopyScaleWords(to, from);
      }
    }
  }

  // Two words, and zeros for what is past the last scale.
  __device__ __forceinline__ void CopyScaleWords(uint32_t to, const uint8_t* from) {
    const uint8_t* end = g.scales + int64_t{g.num_experts} * g.n * (g.k / 32);
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      int64_t bytes = min(max(end - from - i, int64_t{0}), int64_t{4});
      ptx::CopyAsync4(to + i, bytes ? from + i : g.scales, bytes);
    }
  }

  // The chunks of 16 bytes of a row are exchanged such that copies, which write whole
  // rows, and products, which read some chunks of several rows, both use all banks.
  __device__ __forceinline__ void CopyActivations(int stage, int unit) {
    int chunk = lane % 16, row = lane / 16;
    uint32_t bytes = unit * kUnit + chunk * 8 < g.k ? 16 : 0;
    uint32_t to =
        ActivationsAt(stage) + row * 256 + (chunk ^ (chunk / 8 * 2) ^ row) * 16;
#pragma unroll
    for (int i = 0; i < S::kActivationCopies; ++i) {
      if (i * 2 + row >= tile.num_slots) break;
      ptx::CopyAsync16Cached(to + i * 512, x[i] + unit * kUnit * 2, bytes);
    }
  }

  __device__ __forceinline__ void Multiply(int stage, int unit) {
    uint32_t codes[2 * S::kWeightTiles];
    uint32_t largest = 0;
    bool is_there = unit * 4 + c < g.k / 32;
#pragma unroll
    for (int i = 0; i < 2 * S::kWeightTiles; ++i) {
      uint32_t code = ptx::LoadShared8(ScalesAt(stage) + code_at[i / 2 % 2] + i * 64);
      codes[i] = is_there ? code : 0;
      largest = max(largest, codes[i]);
    }
    if (__any_sync(~0u, largest > kMaxFastScale)) {
      Multiply<true>(stage, codes);
    } else {
      Multiply<false>(stage, codes);
    }
  }

  template <bool kAnyScale>
  __device__ __forceinline__ void Multiply(
      int stage, const uint32_t (&codes)[2 * S::kWeightTiles]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint4 b[S::kSlotTiles][2];
#pragma unroll
      for (int j = 0; j < S::kSlotTiles; ++j) {
        if (j == 0 || j * 8 < tile.num_slots) LoadActivations(stage, j, half, b[j]);
      }
      uint32_t at = ElementsAt(stage) + r * kUnit + ((c * 2 + half) ^ r) * 16;
#pragma unroll
      for (int i = 0; i < S::kWeightTiles; ++i) {
        uint4 low = ptx::LoadShared128(at + i * S::kTileBytes);
        uint4 high = ptx::LoadShared128(at + i * S::kTileBytes + 8 * kUnit);
        Factors<kAnyScale> low_factors(codes[2 * i]), high_factors(codes[2 * i + 1]);
        const uint32_t lows[4] = {low.x, low.y, low.z, low.w};
        const uint32_t highs[4] = {high.x, high.y, high.z, high.w};
#pragma unroll
        for (int step = 0; step < 4; ++step) {
          uint32_t a[4] = {low_factors.Apply(SpreadPair<0>(lows[step])),
                           high_factors.Apply(SpreadPair<0>(highs[step])),
                           low_factors.Apply(SpreadPair<1>(lows[step])),
                           high_factors.Apply(SpreadPair<1>(highs[step]))};
#pragma unroll
          for (int j = 0; j < S::kSlotTiles; ++j) {
            const uint4& v = b[j][step / 2];
            if (j == 0 || j * 8 < tile.num_slots) {
              Mma(sums[i][j], a, step % 2 ? v.z : v.x, step % 2 ? v.w : v.y);
            }
          }
        }
      }
    }
  }

  // Slots that are not there get whatever is in memory, which no other slot sees.
  __device__ __forceinline__ void LoadActivations(int stage, int j, int half,
                                                  uint4 (&b)[2]) {
    int row = S::kSlots < 8 ? min(r, S::kSlots - 1) : r;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int chunk = c * 4 + half * 2 + i;
      b[i] = ptx::LoadShared128(ActivationsAt(stage) + (j * 8 + row) * 256 +
                                (chunk ^ (c / 2 * 2) ^ row % 2) * 16);
    }
  }

  __device__ __forceinline__ void Run(const Block<S>& block) {
    int first = threadIdx.x / 32 % S::kWarpsK;
#pragma unroll
    for (int i = 0; i < S::kStages; ++i) {
      int unit = first + i * S::kWarpsK;
      if (unit < units) CopyElements(i, unit);
      if (i == 0) FindScales(block);
      if (unit < units) CopyScales(i, unit);
      if (i == 0) {  // weights do not wait for the rows of x to be known
        ptx::WaitForKernelBefore();
        ptx::LetNextKernelStart();
        FindActivations();
      }
      if (unit < units) CopyActivations(i, unit);
      ptx::CopyAsyncCommit();
    }
    int stage = 0;
#pragma unroll 1
    for (int unit = first; unit < units; unit += S::kWarpsK) {
      ptx::CopyAsyncWait<S::kStages - 1>();
      __syncwarp();
      Multiply(stage, unit);
      __syncwarp();
      int next = unit + S::kStages * S::kWarpsK;
      if (next < units) {
        CopyElements(stage, next);
        CopyScales(stage, next);
        CopyActivations(stage, next);
      }
      ptx::CopyAsyncCommit();
      if (++stage == S::kStages) stage = 0;
    }
    __syncwarp();
  }

  // Leaves the sums where its elements were, as [weight tile, slot, row].
  __device__ __forceinline__ void StoreSums() const {
#pragma unroll
    for (int i = 0; i < S::kWeightTiles; ++i) {
#pragma unroll
      for (int j = 0; j < S::kSlotTiles; ++j) {
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          int slot = (i * S::kSlotTiles + j) * 8 + 2 * c + v % 2;
          uint32_t to = elements + (slot * S::kSumPitch + r + v / 2 * 8) * 4;
          asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(sums[i][j][v])
                       : "memory");
        }
      }
    }
  }
};

template <typename S, bool kPlain>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks)
    GemmMma(const __grid_constant__ Gemm given, int tiles) {
  const Gemm& g = Known<kPlain>(given);
  extern __shared__ __align__(16) uint8_t shared[];
  Block<S> block;
  if (g.slot_rows) ptx::WaitForKernelBefore();
  int tile = blockIdx.y + gridDim.y * blockIdx.z;
  if (tile >= tiles) return;
  if (g.tiles) {
    block.tile = g.tiles[tile];
    if (tile >= *g.num_tiles) return;
  } else {
    int first_slot = tile * S::kSlots;
    block.tile = {0, first_slot, min(S::kSlots, g.num_slots - first_slot), 0};
  }
  block.gated = IsGated(g.activation);
  block.num_rows = block.gated ? g.n / 2 : g.n;
  block.first_row = blockIdx.x * (block.gated ? S::kRows / 2 : S::kRows);
  Warp<S> warp(g, block, ptx::SharedAddress(shared));
  warp.Run(block);
  warp.StoreSums();
  __syncthreads();
  StoreBlock(g, block, shared);
}

}  // namespace jmx8::mma

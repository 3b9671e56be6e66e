// Products with widened weights on Hopper's warpgroup matrix units: the weights are the
// operand in registers (their rows are the result's 64 rows), the activations are in
// shared memory. One producer warp keeps `kStages` stages of both in flight.
#pragma once

#include <cuda_bf16.h>

#include "activation.cuh"
#include "kernels.h"
#include "ptx.cuh"
#include "widen.cuh"

namespace jmx8::wgmma {

// kRows: rows of x of a tile. kBlocks: blocks of 64 weight rows of a warpgroup. kSide,
// kDeep: warpgroups beside each other in n, and such that share k. kK: k of a stage.
// kOccupancy: blocks per multiprocessor.
template <int kRows_, int kBlocks_, int kSide_, int kDeep_, int kK_, int kOccupancy_,
          bool kGathers_>
struct Shape {
  static constexpr int kRows = kRows_, kBlocks = kBlocks_, kSide = kSide_;
  static constexpr int kDeep = kDeep_, kK = kK_, kOccupancy = kOccupancy_;
  static constexpr bool kGathers = kGathers_;

  static constexpr int kN = 64 * kSide * kBlocks;
  static constexpr int kBoxN = kN / 2;  // if gated, one box is the gate's, one that of up
  static constexpr int kConsumers = 128 * kSide * kDeep;
  // Large sums need registers that a whole producing warpgroup can give up.
  static constexpr bool kMovesRegisters = kOccupancy == 1 && kConsumers == 256;
  static constexpr int kProducers = kMovesRegisters ? 128 : kGathers ? 64 : 32;
  static constexpr int kThreads = kConsumers + kProducers;
  // Words of 128 of k without an end of the warpgroup's pipeline.
  static constexpr int kBodyWords = kRows == 256 ? 2 : 1;

  static constexpr int kPerWord = 128 / kK;  // stages that a word of scales is for
  static constexpr int kWeightBytes = kN * kK;
  static constexpr int kRowBytes = kRows * kK * 2;
  static constexpr int kStageBytes = kWeightBytes + kRowBytes;
  static constexpr int kScaleBytes = kN * 4;  // 128 of k
  static constexpr int kFixedBytes = 1024 + kRows * 4 + kConsumers * 16;
  static constexpr int kBudget = 227 * 1024 / kOccupancy - kFixedBytes - 1024;
  static constexpr int kFit = kBudget / (kStageBytes + kScaleBytes);
  static constexpr int kStages = kFit < 12 ? kFit : 12;
  static constexpr int kPitch = kN + 4;  // floats; free of bank conflicts
  static constexpr int kPartialBytes = kRows * kPitch * 4;
  static constexpr int kPipelineBytes = kStages * (kStageBytes + kScaleBytes);
  static constexpr int kSharedBytes =
      1024 + kFixedBytes +
      (kPipelineBytes > kDeep * kPartialBytes ? kPipelineBytes : kDeep * kPartialBytes);

  static_assert(kStages >= 2 && kSharedBytes <= 227 * 1024);
  static_assert(kStages > kDeep, "a warpgroup waits for a stage while it holds another");
  static_assert(kDeep == 1 || kK == 128, "a scale word is one stage's");
};

struct Arguments {
  Gemm gemm;
  int num_row_tiles, num_n_tiles, split_k, group_rows;
};

// One tile of the result, or a part of k of it.
struct Place {
  int expert, first_slot, num_slots, n0;
  int first_word, num_words;  // of 128 of k, and maybe more than there are: zeros
};

// Tile `index` of those that there are; false past the last.
template <class S>
__device__ bool FindPlace(const Arguments& a, int index, Place* place) {
  const int num_row_tiles =
      a.gemm.tiles == nullptr ? a.num_row_tiles : *a.gemm.num_tiles;
  const int num_n = a.num_n_tiles;
  if (index >= num_row_tiles * num_n) return false;
  // Neighbours share rows of x, and over `group_rows` tiles of rows weights, too.
  const int group = index / (a.group_rows * num_n);
  const int first = group * a.group_rows;
  const int in_group = min(a.group_rows, num_row_tiles - first);
  const int rest = index - first * num_n;
  const int row_tile = first + rest % in_group;
  if (a.gemm.tiles == nullptr) {
    place->expert = 0;
    place->first_slot = row_tile * S::kRows;
    place->num_slots = min(S::kRows, a.gemm.num_slots - place->first_slot);
  } else {
    const Tile tile = a.gemm.tiles[row_tile];
    place->expert = tile.expert;
    place->first_slot = tile.first_slot;
    place->num_slots = tile.num_slots;
  }
  const bool gated = IsGated(a.gemm.activation);
  place->n0 = rest / in_group * (gated ? S::kBoxN : S::kN);
  constexpr int kBodyK = 128 * S::kBodyWords;
  const int bodies = (a.gemm.k + kBodyK - 1) / kBodyK, rank = blockIdx.x % a.split_k;
  const int first_body = bodies * rank / a.split_k;
  place->first_word = first_body * S::kBodyWords;
  place->num_words =
      (bodies * (rank + 1) / a.split_k - first_body) * S::kBodyWords;
  return true;
}

struct Shared {
  uint32_t weights, rows, scales, full, empty, slot_rows, transposed;
};

template <class S>
__device__ Shared DivideShared(uint32_t base) {
  Shared s;
  s.full = base;
  s.empty = base + 8 * S::kStages;
  s.slot_rows = base + 1024;
  s.transposed = s.slot_rows + S::kRows * 4;
  // The swizzle is one of addresses: what it applies to begins at a multiple of 1024.
  s.weights = (base + S::kFixedBytes + 1023) / 1024 * 1024;
  s.rows = s.weights + S::kStages * S::kWeightBytes;
  s.scales = s.rows + S::kStages * S::kRowBytes;
  return s;
}

// Which stage is next, and which turn of the ring it is.
template <class S>
struct Ring {
  int stage = 0;
  uint32_t turn = 0;

  __device__ __forceinline__ void Advance(int stages) {
    stage += stages;
    if (stage >= S::kStages) {
      stage -= S::kStages;
      turn ^= 1;
    }
  }
};

// Copies the scales of 128 of k at a time: a word for each row of weights, 0 past k.
template <class S>
struct ScaleLoader {
  static constexpr int kWords = (S::kN + S::kProducers - 1) / S::kProducers;

  const uint8_t* from[kWords];
  uint32_t to;
  int pitch;
  bool aligned;  // to words

  __device__ __forceinline__ ScaleLoader(const Gemm& g, const Place& p, uint32_t scales,
                                         int lane)
      : to(scales + 4 * lane), pitch(g.k / 32), aligned(g.k % 128 == 0) {
    const int distance = IsGated(g.activation) ? g.n / 2 : S::kBoxN;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const int word = lane + i * S::kProducers;
      const int n = p.n0 + word % S::kBoxN + word / S::kBoxN * distance;
      from[i] = g.scales + (int64_t{p.expert} * g.n + min(n, g.n - 1)) * pitch;
    }
  }

  __device__ __forceinline__ void Load(int slot, int k0, int lane) const {
    const int first = aligned ? min(k0 / 32, pitch - 4) : k0 / 32;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if (S::kN % S::kProducers != 0 && lane + i * S::kProducers >= S::kN) break;
      const uint32_t at = to + slot * S::kScaleBytes + 4 * i * S::kProducers;
      if (aligned) {
        ptx::CopyAsync4(at, from[i] + first);
      } else {
        uint32_t word = 0;
        for (int j = 0; j < 4 && first + j < pitch; ++j) {
          word |= uint32_t{from[i][first + j]} << (8 * j);
        }
        ptx::StoreShared32(at, word);
      }
    }
  }
};

template <class S>
__device__ __forceinline__ void GatherRows(const Gemm& g, const Place& p,
                                           const Shared& s, int k0, uint32_t to,
                                           int lane) {
#pragma unroll
  for (int half = 0; half < S::kK / 64; ++half) {
    const int chunk = lane % 8, k = k0 + half * 64 + chunk * 8;
    const uint32_t bytes = k < g.k ? 16 : 0;
    const auto* x = static_cast<const uint4*>(g.x) + (bytes ? k / 8 : 0);
    to += half * S::kRows * 128;
#pragma unroll 4
    for (int row = lane / 8; row < p.num_slots; row += S::kProducers / 8) {
      const uint32_t first = ptx::LoadShared32(s.slot_rows + 4 * row);
      ptx::CopyAsync16(to + row * 128 + ((chunk ^ (row & 7)) << 4), x + first, bytes);
    }
  }
}

template <class S>
struct Producer {
  Ring<S> ring, words;

  __device__ __forceinline__ void Run(const Arguments& a, const Place& p,
                                      const Shared& s, const CUtensorMap* w_map,
                                      const CUtensorMap* x_map, int lane) {
    const Gemm& g = a.gemm;
    const int box_distance = IsGated(g.activation) ? g.n / 2 : S::kBoxN;
    // Weights that no other tile of rows reads should not displace the rest.
    const bool once = g.tiles != nullptr || a.num_row_tiles == 1;
    const uint64_t policy = once ? ptx::EvictFirstPolicy() : ptx::EvictNormalPolicy();
    constexpr uint32_t kBytes = S::kWeightBytes + (S::kGathers ? 0 : S::kRowBytes);
    const ScaleLoader<S> scales(g, p, s.scales, lane);
    if constexpr (S::kGathers) FindRows(g, p, s, lane);
    for (int i = 0; i < p.num_words * S::kPerWord; ++i) {
      const int stage = ring.stage, k0 = p.first_word * 128 + i * S::kK;
      const uint32_t full = s.full + 8 * stage;
      ptx::BarrierWait(s.empty + 8 * stage, ring.turn ^ 1);
      if (lane == 0) {
        ptx::BarrierArriveExpect(full, kBytes);
#pragma unroll
        for (int box = 0; box < 2; ++box) {
          ptx::LoadTile3(
              s.weights + stage * S::kWeightBytes + box * S::kBoxN * S::kK, w_map, full,
              k0, p.n0 + box * box_distance, p.expert, policy);
        }
        if constexpr (!S::kGathers) LoadRows(p, s, x_map, full, k0);
      }
      if (k0 % 128 == 0) {
        scales.Load(words.stage, k0, lane);
        words.Advance(1);
      }
      if constexpr (S::kGathers) {
        GatherRows<S>(g, p, s, k0, s.rows + stage * S::kRowBytes, lane);
      }
      if (scales.aligned) {
        ptx::BarrierArriveAfterCopies(full);
      } else {  // scales were stored, not copied
        if (S::kGathers) ptx::CopyAsyncWaitAll();
        ptx::BarrierArrive(full);
      }
      ring.Advance(1);
    }
  }

  __device__ __forceinline__ void LoadRows(const Place& p, const Shared& s,
                                           const CUtensorMap* x_map, uint32_t full,
                                           int k0) {
#pragma unroll
    for (int half = 0; half < S::kK / 64; ++half) {
      ptx::LoadTile2(s.rows + ring.stage * S::kRowBytes + half * S::kRows * 128, x_map,
                     full, k0 + half * 64, p.first_slot);
    }
  }

  // Where the rows begin that the tile gathers, in units of 16 bytes.
  __device__ __forceinline__ void FindRows(const Gemm& g, const Place& p,
                                           const Shared& s, int lane) {
    ptx::NamedBarrier(2, S::kProducers);
    for (int i = lane; i < p.num_slots; i += S::kProducers) {
      const uint32_t row = g.slot_rows[p.first_slot + i];
      ptx::StoreShared32(s.slot_rows + 4 * i, row * (g.k / 8));
    }
    ptx::NamedBarrier(2, S::kProducers);
  }
};

// Two e4m3, the first in the lower byte, to bf16, times 2^-120.
__device__ __forceinline__ uint32_t Spread(uint32_t pair) {
  uint32_t extended;  // each byte with copies of its sign above it
  // Volatile, so that it is not moved up to where the bytes are not there yet.
  asm volatile("prmt.b32 %0, %1, 0, 0x9180;" : "=r"(extended) : "r"(pair));
  return (extended << 4) & 0x87F087F0;
}

template <class S>
struct Consumer {
  static constexpr int kSteps = S::kK / 16;  // of one stage
  static constexpr int kBlockN = 32 * S::kSide;
  static constexpr int kBuffers = S::kRows == 256 ? 3 : 2;

  Ring<S> multiplied, loaded, words;
  float sums[S::kBlocks][S::kRows / 2];
  uint32_t pairs[2][S::kBlocks][4]; // the bytes of two steps
  uint32_t codes[S::kBlocks][2];    // scales of one of four blocks of 32, by the lane
  uint32_t fast[S::kBlocks][2];     // their FastFactor
  uint32_t factors[S::kBlocks][2];  // of the block that is widened next
  uint32_t extras[S::kBlocks][2];   // its ExtraFactor, if block_has_large
  bool has_large, block_has_large;  // whether any of the warp's scales is
  uint32_t offset;                  // of the lane's first pair in a stage

  __device__ __forceinline__ explicit Consumer(int deep) {
    multiplied.Advance(deep * S::kPerWord);
    words.Advance(deep);
    loaded = multiplied;
  }

  // Of the lane's rows of weights one is in the first box and one in the second, of the
  // same number: those of gate and up meet in one lane. In the operand, and in `sums`,
  // the second is eight rows below.
  __device__ __forceinline__ static int Row(int side) {
    return side * 32 + threadIdx.x / 32 % 4 * 8 + threadIdx.x % 32 / 4;
  }

  // Two steps are under way: one is multiplied while the next is widened.
  __device__ __forceinline__ void Run(const Place& p, const Shared& s, int side,
                                      int deep) {
    const int row = Row(side);
    const uint32_t swizzle = S::kK == 128 ? row & 7 : row >> 1 & 3;
    offset = row * S::kK + (swizzle << 4) + threadIdx.x % 4 * 2;
#pragma unroll
    for (int b = 0; b < S::kBlocks; ++b) {
#pragma unroll
      for (int i = 0; i < S::kRows / 2; ++i) sums[b][i] = 0;
    }
    if (deep >= p.num_words) return;
    constexpr int kToNextWord = (S::kDeep - 1) * S::kPerWord + 1;
    constexpr int kBody = 8 * S::kBodyWords;
    uint32_t a[kBuffers][S::kBlocks][4];
    Wait(s, loaded);
    LoadPairs(s, loaded.stage, 0, pairs[0]);
    LoadScales(s, words, row);
    FindFactors(0);
    Widen(pairs[0], a[0]);
    LoadPairs(s, loaded.stage, 1, pairs[1]);
    for (int i = deep; i < p.num_words; i += S::kDeep * S::kBodyWords) {
      const bool is_last = i + S::kDeep * S::kBodyWords >= p.num_words;
      int stage_before = 0;
      uint64_t rows = ptx::SwizzledDescriptor(s.rows + multiplied.stage * S::kRowBytes);
#pragma unroll
      for (int j = 0; j < kBody; ++j) {
        if (j > 0 && j % kSteps == 0) {
          stage_before = multiplied.stage;
          multiplied.Advance(1);
          rows = ptx::SwizzledDescriptor(s.rows + multiplied.stage * S::kRowBytes);
        }
        ptx::WgmmaFence();
#pragma unroll
        for (int b = 0; b < S::kBlocks; ++b) {
          ptx::Wgmma<S::kRows>(sums[b], a[j % kBuffers][b],
                               rows + j % kSteps / 4 * S::kRows * 8 + j % 4 * 2);
        }
        ptx::WgmmaCommit();
        if ((j + 2) % kSteps == 0) {
          loaded.Advance((j + 2) % 8 == 0 ? kToNextWord : 1);
          // What is read past the end is not used: a condition would cost more.
          if (j + 2 < kBody || !is_last) Wait(s, loaded);
        }
        if ((j + 2) % 8 == 0) {
          words.Advance(S::kDeep);
          LoadScales(s, words, row);
        }
        LoadPairs(s, loaded.stage, (j + 2) % kSteps, pairs[j % 2]);
        ptx::WgmmaWait<kBuffers - 1>();  // what read a[(j + 1) % kBuffers]
        if (j > kBuffers - 2 && (j - kBuffers + 2) % kSteps == 0) Release(s, stage_before);
        Widen(pairs[(j + 1) % 2], a[(j + 1) % kBuffers]);
        if (j % 2 == 0) FindFactors((j + 2) / 2 % 4);
      }
      // Sums that are under way cannot be carried around a loop in registers.
      ptx::WgmmaWait<0>();
      Release(s, multiplied.stage);
      multiplied.Advance(kToNextWord);
#pragma unroll
      for (int b = 0; b < S::kBlocks; ++b) {
#pragma unroll
        for (int r = 0; r < 4; ++r) a[0][b][r] = a[kBody % kBuffers][b][r];
      }
    }
  }

  __device__ __forceinline__ void Release(const Shared& s, int stage) {
    if (threadIdx.x % 128 == 0) ptx::BarrierArrive(s.empty + 8 * stage);
  }

  __device__ __forceinline__ void Wait(const Shared& s, const Ring<S>& ring) {
    ptx::BarrierWait(s.full + 8 * ring.stage, ring.turn);
    // Gathered rows are copied by ordinary means, which wgmma does not see by itself.
    if constexpr (S::kGathers) ptx::FenceAsyncProxy();
  }

  __device__ __forceinline__ void LoadScales(const Shared& s, const Ring<S>& words,
                                             int row) {
    const uint32_t at =
        s.scales + words.stage * S::kScaleBytes + 4 * row + threadIdx.x % 4;
    uint32_t largest = 0;
#pragma unroll
    for (int b = 0; b < S::kBlocks; ++b) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        codes[b][r] = ptx::LoadShared8(at + 4 * (b * kBlockN + r * S::kBoxN));
        fast[b][r] = FastFactor(min(codes[b][r], kMaxFastScale));
        largest = max(largest, codes[b][r]);
      }
    }
    has_large = __any_sync(~0u, largest > kMaxFastScale);
  }

  __device__ __forceinline__ void LoadPairs(const Shared& s, int stage, int j,
                                            uint32_t (&to)[S::kBlocks][4]) {
    const uint32_t weights = s.weights + stage * S::kWeightBytes;
    constexpr uint32_t kBelow = S::kBoxN * S::kK;
#pragma unroll
    for (int b = 0; b < S::kBlocks; ++b) {
      const uint32_t at = (offset ^ (j << 4)) + weights + b * kBlockN * S::kK;
      to[b][0] = ptx::LoadShared16(at);
      to[b][1] = ptx::LoadShared16(at + kBelow);
      to[b][2] = ptx::LoadShared16(at + 8);
      to[b][3] = ptx::LoadShared16(at + kBelow + 8);
    }
  }

  // Gets the factors of one of the four blocks of 32 whose scales the lanes hold.
  __device__ __forceinline__ void FindFactors(int block) {
#pragma unroll
    for (int b = 0; b < S::kBlocks; ++b) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        factors[b][r] = __shfl_sync(~0u, fast[b][r], block, 4);
      }
    }
    block_has_large = has_large;
    if (!has_large) return;
#pragma unroll
    for (int b = 0; b < S::kBlocks; ++b) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        extras[b][r] = ExtraFactor(__shfl_sync(~0u, codes[b][r], block, 4));
      }
    }
  }

  __device__ __forceinline__ void Widen(const uint32_t (&from)[S::kBlocks][4],
                                        uint32_t (&a)[S::kBlocks][4]) {
#pragma unroll
    for (int b = 0; b < S::kBlocks; ++b) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        a[b][r] = MulBf16x2(Spread(from[b][r]), factors[b][r % 2]);
      }
    }
    if (block_has_large) {
#pragma unroll
      for (int b = 0; b < S::kBlocks; ++b) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          a[b][r] = MulBf16x2(a[b][r], extras[b][r % 2]);
        }
      }
    }
#pragma unroll
    for (int b = 0; b < S::kBlocks; ++b) {
#pragma unroll
      for (int r = 0; r < 4; ++r) asm volatile("" : "+r"(a[b][r]));  // here, not later
    }
  }

  // To float32 [kRows, kPitch] in shared memory.
  __device__ __forceinline__ void StorePartial(uint32_t to, int side) {
#pragma unroll
    for (int b = 0; b < S::kBlocks; ++b) {
#pragma unroll
      for (int i = 0; i < S::kRows / 2; ++i) {
        const int row = i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2;
        const int n = i % 4 / 2 * S::kBoxN + b * kBlockN + Row(side);
        ptx::StoreShared32(to + 4 * (row * S::kPitch + n),
                           __float_as_uint(sums[b][i]));
      }
    }
  }

  // To the result, if no other warpgroup has a part of the sums, and it is bf16.
  __device__ __forceinline__ void StoreResult(const Gemm& g, const Place& p,
                                              const Shared& s, int side) {
    const bool gated = IsGated(g.activation);
    const int columns = gated ? g.n / 2 : g.n;
    const int row = Row(side);
#pragma unroll
    for (int b = 0; b < S::kBlocks; ++b) {
      const int n = p.n0 + b * kBlockN + row;
      const int n_of_second = n + (gated ? columns : S::kBoxN);
      const float bias[2] = {Bias(g, p.expert, n), Bias(g, p.expert, n_of_second)};
#pragma unroll
      for (int i = 0; i < S::kRows / 2; ++i) sums[b][i] += bias[i % 4 / 2];
      if (gated) {
#pragma unroll
        for (int i = 0; i < S::kRows / 2; ++i) {
          if (i % 4 < 2) {
            sums[b][i] = ApplyGated(g.activation, sums[b][i], sums[b][i + 2], g.alpha,
                                    g.beta, g.limit);
          }
        }
      } else if (g.activation != Activation::kNone) {
#pragma unroll
        for (int i = 0; i < S::kRows / 2; ++i) {
          sums[b][i] = ApplyUngated(g.activation, sums[b][i]);
        }
      }
#pragma unroll
      for (int box = 0; box < 2; ++box) {
        if (box == 1 && gated) break;
        StoreBox(g, p, s, b, box, n - threadIdx.x % 32 / 4 + box * S::kBoxN, columns);
      }
    }
  }

  // Eight columns from n on of all rows: transposed by the warp, a row to each lane.
  __device__ __forceinline__ void StoreBox(const Gemm& g, const Place& p,
                                           const Shared& s, int b, int box, int n,
                                           int columns) {
    constexpr int kMatrices = S::kRows < 32 ? S::kRows / 8 : 4;
    const int lane = threadIdx.x % 32;
    const uint32_t at = s.transposed + threadIdx.x * 16;
    const int count = min(8, columns - n);
#pragma unroll
    for (int first = 0; first < S::kRows; first += 8 * kMatrices) {
      if (first >= p.num_slots) break;
      uint32_t values[kMatrices];
#pragma unroll
      for (int m = 0; m < kMatrices; ++m) {
        const int i = (first / 8 + m) * 4 + box * 2;
        values[m] = ptx::PackBf16(sums[b][i], sums[b][i + 1]);
      }
      __syncwarp();
      ptx::StoreTransposed(at, values);
      __syncwarp();
      const int row = first + lane;
      if (lane < 8 * kMatrices && row < p.num_slots && count > 0) {
        const int64_t to = int64_t{p.first_slot + row} * columns + n;
        StoreEight(static_cast<__nv_bfloat16*>(g.out) + to, at, count,
                   columns % 8 == 0);
      }
    }
  }

  __device__ __forceinline__ static float Bias(const Gemm& g, int expert, int n) {
    if (g.bias == nullptr || n >= g.n) return 0;
    const int64_t at = int64_t{expert} * g.n + n;
    return g.bias_is_f32
               ? static_cast<const float*>(g.bias)[at]
               : __bfloat162float(static_cast<const __nv_bfloat16*>(g.bias)[at]);
  }

  __device__ __forceinline__ static void StoreEight(__nv_bfloat16* to, uint32_t from,
                                                    int count, bool aligned) {
    const uint4 v = ptx::LoadShared128(from);
    if (aligned && count == 8) {
      *reinterpret_cast<uint4*>(to) = v;
      return;
    }
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (j < count) {
        to[j] = __ushort_as_bfloat16(static_cast<uint16_t>(words[j / 2] >> (j % 2 * 16)));
      }
    }
  }
};

// Sums eight neighbouring columns of one row over all blocks and warpgroups that share
// k, in a fixed order.
template <class S>
__device__ __forceinline__ void SumPartials(uint32_t at, int split_k, float (&sum)[8]) {
#pragma unroll
  for (int j = 0; j < 8; ++j) sum[j] = 0;
  for (int rank = 0; rank < split_k; ++rank) {
    const uint32_t base = split_k > 1 ? ptx::MapShared(at, rank) : at;
#pragma unroll
    for (int deep = 0; deep < S::kDeep; ++deep) {
      const float4 low = ptx::LoadCluster(base + deep * S::kPartialBytes);
      const float4 high = ptx::LoadCluster(base + deep * S::kPartialBytes + 16);
      sum[0] += low.x, sum[1] += low.y, sum[2] += low.z, sum[3] += low.w;
      sum[4] += high.x, sum[5] += high.y, sum[6] += high.z, sum[7] += high.w;
    }
  }
}

__device__ __forceinline__ void AddBias(const Gemm& g, int expert, int n, int count,
                                        float (&sum)[8]) {
  if (g.bias == nullptr) return;
  const int64_t first = int64_t{expert} * g.n + n;
  for (int j = 0; j < count; ++j) {
    sum[j] += g.bias_is_f32
                  ? static_cast<const float*>(g.bias)[first + j]
                  : __bfloat162float(static_cast<const __nv_bfloat16*>(g.bias)[first + j]);
  }
}

__device__ __forceinline__ void StoreColumns(const Gemm& g, int64_t at, int count,
                                             bool aligned, const float (&v)[8]) {
  if (g.out_is_f32) {
    float* out = static_cast<float*>(g.out) + at;
    for (int j = 0; j < count; ++j) out[j] = v[j];
    return;
  }
  auto* out = static_cast<__nv_bfloat16*>(g.out) + at;
  if (aligned && count == 8) {
    __nv_bfloat162 pairs[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) pairs[j] = __floats2bfloat162_rn(v[2 * j], v[2 * j + 1]);
    *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(pairs);
    return;
  }
  for (int j = 0; j < count; ++j) out[j] = __float2bfloat16_rn(v[j]);
}

template <class S>
__device__ void Finish(const Arguments& a, const Place& p, uint32_t partials) {
  const Gemm& g = a.gemm;
  const bool gated = IsGated(g.activation);
  const int columns = gated ? g.n / 2 : g.n;  // of the result
  const int per_row = (gated ? S::kBoxN : S::kN) / 8;
  const int rank = blockIdx.x % a.split_k;
  const int num_rows = (p.num_slots - rank + a.split_k - 1) / a.split_k;
  for (int i = threadIdx.x; i < num_rows * per_row; i += S::kConsumers) {
    const int row = i / per_row * a.split_k + rank, n = i % per_row * 8;
    const int count = min(8, columns - p.n0 - n);
    if (count <= 0) continue;
    const uint32_t at = partials + 4 * (row * S::kPitch + n);
    float value[8];
    SumPartials<S>(at, a.split_k, value);
    AddBias(g, p.expert, p.n0 + n, count, value);
    if (gated) {
      float up[8];
      SumPartials<S>(at + 4 * S::kBoxN, a.split_k, up);
      AddBias(g, p.expert, columns + p.n0 + n, count, up);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        value[j] = ApplyGated(g.activation, value[j], up[j], g.alpha, g.beta, g.limit);
      }
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) value[j] = ApplyUngated(g.activation, value[j]);
    }
    const int64_t out = int64_t{p.first_slot + row} * columns + p.n0 + n;
    StoreColumns(g, out, count, columns % 8 == 0, value);
  }
}

// Whether sums go from registers to the result. If not, a block has one tile only, for
// the sums then take the place of the stages.
template <class S>
__host__ __device__ bool IsDirect(const Gemm& g, int split_k) {
  return S::kDeep == 1 && split_k == 1 && !g.out_is_f32;
}

template <class S>
__device__ __forceinline__ void Consume(const Arguments& a, const Place& p,
                                        const Shared& s, int warpgroup,
                                        Consumer<S>* consumer) {
  const int side = warpgroup % S::kSide, deep = warpgroup / S::kSide;
  consumer->Run(p, s, side, deep);
  if (IsDirect<S>(a.gemm, a.split_k)) {
    consumer->StoreResult(a.gemm, p, s, side);
    return;
  }
  ptx::NamedBarrier(1, S::kConsumers);  // all have read the stages
  consumer->StorePartial(s.weights + deep * S::kPartialBytes, side);
  if (a.split_k > 1) {
    ptx::ClusterSync();
  } else {
    ptx::NamedBarrier(1, S::kConsumers);
  }
  Finish<S>(a, p, s.weights);
  __syncwarp();
}

template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kOccupancy)
    GemmWgmma(const __grid_constant__ Arguments a, const __grid_constant__ CUtensorMap w_map,
              const __grid_constant__ CUtensorMap x_map) {
  extern __shared__ uint8_t memory[];
  const Shared s = DivideShared<S>(ptx::SharedAddress(memory));
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::kStages; ++i) {
      ptx::BarrierInit(s.full + 8 * i, S::kProducers + 1);
      ptx::BarrierInit(s.empty + 8 * i, S::kSide);
    }
    ptx::FenceBarrierInit();
  }
  __syncthreads();
  // The same in all lanes, as the compiler must know.
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
  const int first = blockIdx.x / a.split_k, stride = gridDim.x / a.split_k;
  Place place;
  if (warpgroup == S::kConsumers / 128) {
    if constexpr (S::kMovesRegisters) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    Producer<S> producer;
    for (int i = first; FindPlace<S>(a, i, &place); i += stride) {
      producer.Run(a, place, s, &w_map, &x_map, threadIdx.x - S::kConsumers);
    }
    __syncwarp();
    if (a.split_k > 1) {
      ptx::ClusterSync();
      ptx::ClusterSync();
    }
  } else {
    if constexpr (S::kMovesRegisters) asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    Consumer<S> consumer(warpgroup / S::kSide);
    bool found = FindPlace<S>(a, first, &place);
    for (int i = first + stride; found; i += stride) {
      Place next;
      found = FindPlace<S>(a, i, &next);  // now, for it takes long
      Consume<S>(a, place, s, warpgroup, &consumer);
      place = next;
    }
    if (a.split_k > 1) ptx::ClusterSync();  // others read this block's sums
  }
}

}  // namespace jmx8::wgmma

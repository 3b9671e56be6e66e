// The warpgroups of GemmWgmma that widen and multiply.
#pragma once

#include <cuda_bf16.h>

#include "activation.cuh"
#include "bias.cuh"
#include "wgmma_shape.cuh"
#include "widen.cuh"

namespace jmx8::wgmma {

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
  uint32_t pass = 0;                // which half of `Shared::passes` is next

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

  __device__ __forceinline__ void Run(const Place& p, const Shared& s, int side,
                                      int deep) {
    RunRows<S::kRowStep>(p, s, side, deep);
  }

  // Multiplies the first kRows_ rows if the tile has no more, else tries more.
  template <int kRows_>
  __device__ __forceinline__ void RunRows(const Place& p, const Shared& s, int side,
                                          int deep) {
    if constexpr (kRows_ < S::kRows) {
      if (p.num_slots > kRows_) {
        return RunRows<kRows_ + S::kRowStep>(p, s, side, deep);
      }
    }
    Multiply<kRows_>(p, s, side, deep);
  }

  // Two steps are under way: one is multiplied while the next is widened.
  template <int kRows_>
  __device__ __forceinline__ void Multiply(const Place& p, const Shared& s, int side,
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
          ptx::Wgmma<kRows_>(reinterpret_cast<float (&)[kRows_ / 2]>(sums[b]),
                             a[j % kBuffers][b],
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
        if (j > kBuffers - 2 && (j - kBuffers + 2) % kSteps == 0) {
          Release(s, stage_before);
        }
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
        a[b][r] = MulBf16x2(SpreadPair<0, true>(from[b][r]), factors[b][r % 2]);
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
#pragma unroll
    for (int b = 0; b < S::kBlocks; ++b) {
      const int n = p.n0 + b * kBlockN + Row(side);
      const int n_of_second = n + (gated ? columns : S::kBoxN);
      const float bias[2] = {Bias(g, p.expert, n), Bias(g, p.expert, n_of_second)};
#pragma unroll
      for (int i = 0; i < S::kRows / 2; ++i) sums[b][i] += bias[i % 4 / 2];
      if (gated) {
#pragma unroll
        for (int i = 0; i < S::kRows / 2; ++i) {
          if (i % 4 < 2) {
            sums[b][i] =
                ApplySwiGlu(sums[b][i], sums[b][i + 2], g.alpha, g.beta, g.limit);
          }
        }
      } else if (g.activation != Activation::kNone) {
#pragma unroll
        for (int i = 0; i < S::kRows / 2; ++i) {
          sums[b][i] = ApplyUngated(g.activation, sums[b][i]);
        }
      }
    }
    // Whole rows of the tile: what the warps have is transposed to [kPassRows, kN] in
    // shared memory, twice, so that one is read while the other is written.
#pragma unroll
    for (int first = 0; first < S::kRows; first += S::kPassRows) {
      if (first >= p.num_slots) break;
      const uint32_t at = s.passes + pass * S::kPassBytes;
      pass ^= 1;
      PutColumns(at, first, side, gated);
      ptx::NamedBarrier(3, S::kConsumers);
      StoreRows(g, p, at, first, columns, gated);
    }
  }

  // Of rows from `first` on the warp's columns, eight at a time.
  __device__ __forceinline__ void PutColumns(uint32_t at, int first, int side,
                                             bool gated) {
    constexpr int kMatrices = S::kPassRows / 8;
    const uint32_t row = threadIdx.x % S::kPassRows;
#pragma unroll
    for (int b = 0; b < S::kBlocks; ++b) {
#pragma unroll
      for (int box = 0; box < 2; ++box) {
        if (box == 1 && gated) break;
        const int n = box * S::kBoxN + b * kBlockN + side * 32 + threadIdx.x / 32 % 4 * 8;
        uint32_t values[kMatrices];
#pragma unroll
        for (int m = 0; m < kMatrices; ++m) {
          const int i = (first / 8 + m) * 4 + box * 2;
          values[m] = ptx::PackBf16(sums[b][i], sums[b][i + 1]);
        }
        ptx::StoreTransposed(at + row * S::kPassPitch + n * 2, values);
      }
    }
  }

  __device__ __forceinline__ static void StoreRows(const Gemm& g, const Place& p,
                                                   uint32_t at, int first, int columns,
                                                   bool gated) {
    const int per_row = (gated ? S::kBoxN : S::kN) / 8;
    const int num_rows = min(S::kPassRows, p.num_slots - first);
    for (int i = threadIdx.x; i < num_rows * per_row; i += S::kConsumers) {
      const int row = i / per_row, n = i % per_row * 8;
      const int count = min(8, columns - p.n0 - n);
      const int64_t to = int64_t{p.first_slot + first + row} * g.out_pitch + p.n0 + n;
      if (count > 0) {
        StoreEight(static_cast<__nv_bfloat16*>(g.out) + to,
                   at + row * S::kPassPitch + n * 2, count, g.out_pitch % 8 == 0);
      }
    }
  }

  __device__ __forceinline__ static float Bias(const Gemm& g, int expert, int n) {
    if (g.bias == nullptr || n >= g.n) return 0;
    return LoadBias(g, int64_t{expert} * g.n + n);
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
        const uint32_t half = words[j / 2] >> (j % 2 * 16);
        to[j] = __ushort_as_bfloat16(static_cast<uint16_t>(half));
      }
    }
  }
};

}  // namespace jmx8::wgmma

// The warpgroups of GemmWgmma that widen and multiply.
#pragma once

#include <cuda_bf16.h>

#include <type_traits>

#include "activation.cuh"
#include "bias.cuh"
#include "wgmma_weights.cuh"

namespace jmx8::wgmma {

template <class S>
struct Consumer {
  using Weights =
      std::conditional_t<S::kMixed, MixedWeights<S>, OrderedWeights<S>>;
  static constexpr int kSteps = S::kK / 16;  // of one stage
  static constexpr int kBuffers = S::kRows == 256 ? 3 : 2;
  static constexpr bool kLoadsFirst = S::kRows < 256;  // was measured

  Ring<S> multiplied, loaded, words;
  float sums[S::kBlocks][S::kRows / 2];
  uint32_t pass = 0;                // which half of `Shared::passes` is next

  __device__ __forceinline__ explicit Consumer(int deep) {
    multiplied.Advance(deep * S::kPerWord);
    words.Advance(deep);
    loaded = multiplied;
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
#pragma unroll
    for (int b = 0; b < S::kBlocks; ++b) {
#pragma unroll
      for (int i = 0; i < S::kRows / 2; ++i) sums[b][i] = 0;
    }
    if (deep >= p.num_words) return;
    constexpr int kToNextWord = (S::kDeep - 1) * S::kPerWord + 1;
    constexpr int kBody = 8 * S::kBodyWords;
    uint32_t a[kBuffers][S::kBlocks][4];
    Weights weights(WeightRows<S>::First(side));
    Wait(s, loaded);
    weights.Load(s, loaded.stage, words.stage, 0);
    weights.FindFactors(0);
    weights.Spread(0);
    weights.Widen(a[0]);
    weights.Load(s, loaded.stage, words.stage, 1);
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
        ptx::WgmmaWait<kBuffers - 1>();  // what read a[(j + 1) % kBuffers]
        if (j > kBuffers - 2 && (j - kBuffers + 2) % kSteps == 0) {
          Release(s, stage_before);
        }
        weights.Spread(j + 1);
        if (!kLoadsFirst) weights.Widen(a[(j + 1) % kBuffers]);
        if ((j + 2) % kSteps == 0) {
          loaded.Advance((j + 2) % 8 == 0 ? kToNextWord : 1);
          // What is read past the end is not used: a condition would cost more.
          if (j + 2 < kBody || !is_last) Wait(s, loaded);
        }
        if ((j + 2) % 8 == 0) words.Advance(S::kDeep);
        weights.Load(s, loaded.stage, words.stage, (j + 2) % 8);
        if (kLoadsFirst) weights.Widen(a[(j + 1) % kBuffers]);
        weights.FindFactors((j + 2) % 8);
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

  // To float32 [kRows, kPitch] in shared memory.
  __device__ __forceinline__ void StorePartial(uint32_t to, int side) {
#pragma unroll
    for (int b = 0; b < S::kBlocks; ++b) {
#pragma unroll
      for (int i = 0; i < S::kRows / 2; ++i) {
        const int row = i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2;
        const int n = i % 4 / 2 * S::kBoxN + b * WeightRows<S>::kBlockStep +
                      WeightRows<S>::First(side);
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
    if (g.bias != nullptr) AddBias(g, p, side, gated ? columns : S::kBoxN);
    if (gated) {
      if (g.activation == Activation::kSilu) {
        Activate([](float gate, float up) { return ApplySilu(gate, up); });
      } else {
        Activate([&g](float gate, float up) {
          return ApplySwiGlu(gate, up, g.alpha, g.beta, g.limit);
        });
      }
    } else if (g.activation != Activation::kNone) {
#pragma unroll
      for (int b = 0; b < S::kBlocks; ++b) {
#pragma unroll
        for (int i = 0; i < S::kRows / 2; ++i) {
          sums[b][i] = ApplyUngated(g.activation, sums[b][i]);
        }
      }
    }
    // What the warps have is transposed to rows in shared memory, twice, so that one is
    // read while the other is written. A warpgroup waits for no other: while it stores,
    // another multiplies.
#pragma unroll
    for (int first = 0; first < S::kRows; first += S::kPassRows) {
      if (first >= p.num_slots) break;
      const uint32_t at = s.passes + (2 * side + pass) * S::kPassBytes;
      pass ^= 1;
      PutColumns(at, first, gated);
      ptx::NamedBarrier(3 + side, 128);
      if (gated) {
        StoreRows<1>(g, p, at, first, columns, side);
      } else {
        StoreRows<2>(g, p, at, first, columns, side);
      }
    }
  }

  // Of rows from `first` on the warp's columns, eight at a time.
  __device__ __forceinline__ void PutColumns(uint32_t at, int first, bool gated) {
    constexpr int kMatrices = S::kPassRows / 8;
    const uint32_t row = threadIdx.x % S::kPassRows;
#pragma unroll
    for (int b = 0; b < S::kBlocks; ++b) {
#pragma unroll
      for (int box = 0; box < 2; ++box) {
        if (box == 1 && gated) break;
        const int n = box * S::kSideBoxN + b * 32 + threadIdx.x / 32 % 4 * 8;
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

  // Eight columns at a time, of the warpgroup's part of each box.
  template <int kBoxes>
  __device__ __forceinline__ static void StoreRows(const Gemm& g, const Place& p,
                                                   uint32_t at, int first, int columns,
                                                   int side) {
    constexpr int kPerBox = S::kSideBoxN / 8, kPerRow = kBoxes * kPerBox;
    const int num_rows = min(S::kPassRows, p.num_slots - first);
    const bool aligned = g.out_pitch % 8 == 0;
#pragma unroll
    for (int i = threadIdx.x % 128; i < S::kPassRows * kPerRow; i += 128) {
      const int row = i / kPerRow, part = i % kPerRow;
      const int n = p.n0 + part / kPerBox * S::kBoxN + side * S::kSideBoxN +
                    part % kPerBox * 8;
      const int count = min(8, columns - n);
      if (row >= num_rows || count <= 0) continue;
      auto* to = static_cast<__nv_bfloat16*>(g.out) +
                 int64_t{p.first_slot + first + row} * g.out_pitch + n;
      const uint32_t from = at + row * S::kPassPitch;
      StoreEight(to, from + part * 16, count, aligned);
    }
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

  // Of the lane's two rows of weights, `distance` rows apart.
  __device__ __forceinline__ void AddBias(const Gemm& g, const Place& p, int side,
                                          int distance) {
#pragma unroll
    for (int b = 0; b < S::kBlocks; ++b) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int n = p.n0 + b * WeightRows<S>::kBlockStep +
                      WeightRows<S>::First(side) + r * distance;
        if (n >= g.n) continue;
        const float bias = LoadBias(g, int64_t{p.expert} * g.n + n);
#pragma unroll
        for (int i = 2 * r; i < S::kRows / 2; i += 4) {
          sums[b][i] += bias;
          sums[b][i + 1] += bias;
        }
      }
    }
  }

  // Leaves what comes of gate and up where gate was.
  template <class Function>
  __device__ __forceinline__ void Activate(Function function) {
#pragma unroll
    for (int b = 0; b < S::kBlocks; ++b) {
#pragma unroll
      for (int i = 0; i < S::kRows / 2; i += 4) {
        sums[b][i] = function(sums[b][i], sums[b][i + 2]);
        sums[b][i + 1] = function(sums[b][i + 1], sums[b][i + 3]);
      }
    }
  }
};

}  // namespace jmx8::wgmma

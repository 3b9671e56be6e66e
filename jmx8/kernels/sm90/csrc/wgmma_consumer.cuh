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
  // Both were measured: whether the bytes of the step after the next are loaded before the
  // next one's are widened, and even before the wait for the last one's product.
  static constexpr bool kLoadsFirst = S::kRows < 256;
  static constexpr bool kLoadsEarly = S::kRows <= 32 && S::kDeep == 1;

  Ring<S> multiplied, loaded, words;
  float sums[S::kBlocks][S::kRows / 2];
  int pass = 0;  // which part of `Shared::passes` is next

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
        const auto load_next = [&] {
          weights.Spread(j + 1);
          if (!kLoadsFirst) weights.Widen(a[(j + 1) % kBuffers]);
          if ((j + 2) % kSteps == 0) {
            loaded.Advance((j + 2) % 8 == 0 ? kToNextWord : 1);
            // What is read past the end is not used: a condition would cost more.
            if (j + 2 < kBody || !is_last) Wait(s, loaded);
          }
          if ((j + 2) % 8 == 0) words.Advance(S::kDeep);
          weights.Load(s, loaded.stage, words.stage, (j + 2) % 8);
        };
        if (kLoadsEarly) load_next();
        ptx::WgmmaWait<kBuffers - 1>();  // what read a[(j + 1) % kBuffers]
        if (j > kBuffers - 2 && (j - kBuffers + 2) % kSteps == 0) {
          Release(s, stage_before);
        }
        if (!kLoadsEarly) load_next();
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
  // out_map: of the result, nullptr if it has none.
  __device__ __forceinline__ void StoreResult(const Gemm& g, const Place& p,
                                              const Shared& s, int side,
                                              const CUtensorMap* out_map) {
    const bool gated = IsGated(g.activation);
    if (g.bias != nullptr) AddBias(g, p, side, gated ? g.n / 2 : S::kBoxN);
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
    StorePasses(g, p, s, side, out_map);
  }

  // What the warps have is transposed to rows in shared memory, and copied from there
  // while the next tile is multiplied. A warpgroup waits for no other.
  __device__ __forceinline__ void StorePasses(const Gemm& g, const Place& p,
                                              const Shared& s, int side,
                                              const CUtensorMap* out_map) {
    const bool gated = IsGated(g.activation), copies = threadIdx.x % 128 == 0;
    const int n = p.n0 + side * S::kSideBoxN;
#pragma unroll
    for (int first = 0; first < S::kRows; first += S::kPassRows) {
      if (first >= p.num_slots) break;
      const uint32_t at = s.passes + (side * S::kPasses + pass) * S::kPassBytes;
      pass = pass + 1 == S::kPasses ? 0 : pass + 1;
      if (copies) ptx::StoreTileWaitRead<S::kPasses - 1>();
      ptx::NamedBarrier(3 + side, 128);  // what was there has been copied
      PutColumns(at, first, gated);
      ptx::FenceAsyncProxy();
      ptx::NamedBarrier(3 + side, 128);
      // After a tile's last slot comes another tile's first, or the end of the result.
      if (out_map && (g.tiles == nullptr || first + S::kPassRows <= p.num_slots)) {
        if (copies) {
          ptx::StoreTile2(out_map, n, p.first_slot + first, at);
          if (!gated) {
            ptx::StoreTile2(out_map, n + S::kBoxN, p.first_slot + first,
                            at + S::kPassBytes / 2);
          }
        }
      } else if (gated) {
        StoreRows<1>(g, p, at, first, n);
      } else {
        StoreRows<2>(g, p, at, first, n);
      }
      if (copies) ptx::StoreTileCommit();
    }
  }

  // Where eight columns of a row are, as the copy engine wants them: with the chunks of
  // 16 bytes exchanged, so that a column has all banks.
  __device__ __forceinline__ static uint32_t ChunkAt(uint32_t at, int row, int chunk) {
    const int swizzle = S::kPassPitch == 128 ? row & 7 : row >> 1 & 3;
    return at + row * S::kPassPitch + ((chunk ^ swizzle) << 4);
  }

  // Of rows from `first` on the warp's columns, eight at a time.
  __device__ __forceinline__ void PutColumns(uint32_t at, int first, bool gated) {
    constexpr int kAtOnce = S::kPassRows < 32 ? S::kPassRows : 32;
#pragma unroll
    for (int row = 0; row < S::kPassRows; row += kAtOnce) {
#pragma unroll
      for (int box = 0; box < 2; ++box) {
        if (box == 1 && gated) break;
#pragma unroll
        for (int b = 0; b < S::kBlocks; ++b) {
          uint32_t values[kAtOnce / 8];
#pragma unroll
          for (int m = 0; m < kAtOnce / 8; ++m) {
            const int i = ((first + row) / 8 + m) * 4 + box * 2;
            values[m] = ptx::PackBf16(sums[b][i], sums[b][i + 1]);
          }
          ptx::StoreTransposed(
              ChunkAt(at + box * S::kPassBytes / 2,
                      row + threadIdx.x % kAtOnce, b * 4 + threadIdx.x / 32 % 4),
              values);
        }
      }
    }
  }

  // Eight columns at a time, of the warpgroup's part of each box, from column `n0` on.
  template <int kBoxes>
  __device__ __forceinline__ static void StoreRows(const Gemm& g, const Place& p,
                                                   uint32_t at, int first, int n0) {
    constexpr int kPerBox = S::kSideBoxN / 8, kPerRow = kBoxes * kPerBox;
    const int num_rows = min(S::kPassRows, p.num_slots - first);
    const int columns = kBoxes == 1 ? g.n / 2 : g.n;
    const bool aligned = g.out_pitch % 8 == 0;
#pragma unroll
    for (int i = threadIdx.x % 128; i < S::kPassRows * kPerRow; i += 128) {
      const int row = i / kPerRow, box = i % kPerRow / kPerBox, chunk = i % kPerBox;
      const int n = n0 + box * S::kBoxN + chunk * 8;
      const int count = min(8, columns - n);
      if (row >= num_rows || count <= 0) continue;
      StoreEight(static_cast<__nv_bfloat16*>(g.out) +
                     int64_t{p.first_slot + first + row} * g.out_pitch + n,
                 ChunkAt(at + box * S::kPassBytes / 2, row, chunk), count,
                 aligned);
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

// The warps of GemmWgmma that load.
#pragma once

#include <cuda_bf16.h>

#include "wgmma_shape.cuh"

namespace jmx8::wgmma {

// Copies the scales of 128 of k at a time: a word for each row of weights, 0 past k.
template <class S>
struct ScaleLoader {
  static constexpr int kWords = (S::kN + S::kProducers - 1) / S::kProducers;

  const uint8_t* from[kWords];
  uint32_t to;
  int pitch;
  bool aligned;  // to words

  __device__ __forceinline__ ScaleLoader(const Gemm& g, const Place& p, bool aligned,
                                         uint32_t scales, int lane)
      : to(scales + 4 * lane), pitch(g.k / 32), aligned(aligned) {
    const int distance = IsGated(g.activation) ? g.n / 2 : S::kBoxN;
    const uint8_t* matrix = g.scales + int64_t{p.expert} * g.n * pitch;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const int word = lane + i * S::kProducers;
      const int n = p.n0 + word % S::kBoxN + word / S::kBoxN * distance;
      from[i] = matrix + int64_t{min(n, g.n - 1)} * pitch;
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

// Copies the rows of x that a tile's slots read. Lanes in eights share a row.
template <class S>
struct RowGatherer {
  static constexpr int kAtOnce = S::kProducers / 8;
  static constexpr int kTimes = S::kGathers ? S::kRows / kAtOnce : 0;
  static_assert(!S::kGathers || (kTimes * kAtOnce == S::kRows && kAtOnce % 8 == 0));

  uint32_t from[kTimes + 1];  // where the lane's rows begin, in units of 16 bytes
  int first, chunk, count;

  __device__ __forceinline__ RowGatherer(const Gemm& g, const Place& p, int lane)
      : first(lane / 8), chunk(lane % 8) {
    count = (p.num_slots - first + kAtOnce - 1) / kAtOnce;
    const int* rows = g.slot_rows + p.first_slot + first;
#pragma unroll
    for (int i = 0; i < kTimes; ++i) {
      from[i] = i < count ? static_cast<uint32_t>(rows[i * kAtOnce]) * (g.k / 8) : 0;
    }
  }

  __device__ __forceinline__ void Load(const Gemm& g, int k0, uint32_t to) const {
    to += first * 128 + ((chunk ^ (first & 7)) << 4);
#pragma unroll
    for (int half = 0; half < S::kK / 64; ++half) {
      const int k = k0 + half * 64 + chunk * 8;
      const uint32_t bytes = k < g.k ? 16 : 0;
      const auto* x = static_cast<const uint4*>(g.x) + (bytes ? k / 8 : 0);
#pragma unroll
      for (int i = 0; i < kTimes; ++i) {
        if (i >= count) break;
        ptx::CopyAsync16(to + (half * S::kRows + i * kAtOnce) * 128, x + from[i],
                         bytes);
      }
    }
  }
};

template <class S>
struct Producer {
  Ring<S> ring, words;
  bool is_first = true;  // tile of this block

  __device__ __forceinline__ void Run(const Arguments& a, const Place& p,
                                      const Shared& s, const CUtensorMap* w_map,
                                      const CUtensorMap* x_map, int lane) {
    const Gemm& g = a.gemm;
    const int box_distance = IsGated(g.activation) ? g.n / 2 : S::kBoxN;
    // Weights that no other tile of rows reads should not displace the rest.
    const bool once = g.num_slots <= S::kRows * int64_t{g.num_experts};
    const uint64_t policy = once ? ptx::EvictFirstPolicy() : ptx::EvictNormalPolicy();
    const auto load_weights = [&](int stage, int k0) {
      const uint32_t full = s.full + 8 * stage;
      ptx::BarrierArriveExpect(full,
                               S::kWeightBytes + (S::kGathers ? 0 : S::kRowBytes));
#pragma unroll
      for (int box = 0; box < 2; ++box) {
        ptx::LoadTile3(s.weights + stage * S::kWeightBytes + box * S::kBoxN * S::kK,
                       w_map, full, k0, p.n0 + box * box_distance, p.expert, policy);
      }
    };
    const int num_stages = p.num_words * S::kPerWord;
    // Stages whose weights are under way before the rows are there.
    int loaded = 0;
    if (!S::kGathers && is_first) {
      // If they are there already, a stage's rows come right after its weights.
      loaded = g.starts_early ? min(num_stages, S::kStages) : 0;
      for (int i = 0; lane == 0 && i < loaded; ++i) {
        load_weights(i, p.first_word * 128 + i * S::kK);
      }
      ptx::WaitForKernelBefore();
      ptx::LetNextKernelStart();
    }
    is_first = false;
    const ScaleLoader<S> scales(g, p, a.scales_are_words, s.scales, lane);
    const RowGatherer<S> rows(g, p, lane);
    for (int i = 0; i < num_stages; ++i) {
      const int stage = ring.stage, k0 = p.first_word * 128 + i * S::kK;
      const uint32_t full = s.full + 8 * stage;
      ptx::BarrierWait(s.empty + 8 * stage, ring.turn ^ 1);
      if (lane == 0) {
        if (i >= loaded) load_weights(stage, k0);
        if constexpr (!S::kGathers) LoadRows(p, s, x_map, full, k0);
      }
      if (k0 % 128 == 0) {
        scales.Load(words.stage, k0, lane);
        words.Advance(1);
      }
      if constexpr (S::kGathers) {
        rows.Load(g, k0, s.rows + stage * S::kRowBytes);
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
};

}  // namespace jmx8::wgmma

// How the work of GemmWgmma is divided.
#pragma once

#include "kernels.h"
#include "ptx.cuh"

namespace jmx8::wgmma {

// kRows: rows of x of a tile, of which multiples of kRowStep are multiplied. kBlocks:
// blocks of 64 weight rows of a warpgroup. kSide, kDeep: warpgroups beside each other in
// n, and such that share k. kK: k of a stage. kOccupancy: blocks per multiprocessor.
// kMixed: the columns of x are mixed (mix.cu).
template <int kRows_, int kRowStep_, int kBlocks_, int kSide_, int kDeep_, int kK_,
          int kOccupancy_, bool kMixed_, bool kGathers_>
struct Shape {
  static constexpr int kRows = kRows_, kRowStep = kRowStep_, kBlocks = kBlocks_;
  static constexpr int kSide = kSide_, kDeep = kDeep_, kK = kK_;
  static constexpr int kOccupancy = kOccupancy_;
  static constexpr bool kMixed = kMixed_;
  static constexpr bool kGathers = kGathers_;
  static constexpr bool kMixesOut = kMixed && kGathers;  // what a second one takes

  static constexpr int kN = 64 * kSide * kBlocks;
  static constexpr int kBoxN = kN / 2;  // if gated, one box is the gate's, one up's
  static constexpr int kSideBoxN = 32 * kBlocks;  // of a box, one warpgroup's
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
  // Rows of the result that a warpgroup puts together in shared memory at a time, and
  // how often it does until it waits for the first ones to be copied from there.
  static constexpr int kMostPassRows = kRows == 256 ? 64 : kOccupancy == 1 ? 32 : 16;
  static constexpr int kPassRows = kRows < kMostPassRows ? kRows : kMostPassRows;
  static constexpr int kMostPasses = kOccupancy == 1 ? 3 : 2;
  static constexpr int kPasses =
      kRows / kPassRows < kMostPasses ? kRows / kPassRows : kMostPasses;
  static constexpr int kPassPitch = kSideBoxN * 2;  // of one box
  static constexpr int kPassBytes = 2 * kPassRows * kPassPitch;
  static constexpr int kFixedBytes =
      1024 + (kDeep == 1 ? kPasses * kSide * kPassBytes : 0);
  static_assert(kPassBytes % 1024 == 0);
  static constexpr int kBudget = 227 * 1024 / kOccupancy - kFixedBytes - 1024;
  static constexpr int kFit = kBudget / (kStageBytes + kScaleBytes);
  static constexpr int kStages = kFit < 12 ? kFit : 12;
  static constexpr int kPitch = kN + 4;  // floats; free of bank conflicts
  static constexpr int kPartialBytes = kRows * kPitch * 4;
  static constexpr int kPipelineBytes = kStages * (kStageBytes + kScaleBytes);
  static constexpr int kSharedBytes =
      1024 + kFixedBytes +
      (kPipelineBytes > kDeep * kPartialBytes ? kPipelineBytes : kDeep * kPartialBytes);
  // Whether blocks can share k: if behind the barriers there is room for the other ones'
  // sums, too.
  static constexpr bool kSplits = 2048 + 2 * kDeep * kPartialBytes <= kSharedBytes;

  static_assert(kStages >= 2 && kSharedBytes <= 227 * 1024);
  static_assert(kStages > kDeep, "a warpgroup waits for one stage while it has one");
  static_assert(kDeep == 1 || kK == 128, "a scale word is one stage's");
};

struct Arguments {
  Gemm gemm;
  int num_row_tiles, num_n_tiles, split_k, group_rows;
  int split_shift;  // split_k is 1 << split_shift: no divisions before the first load
  bool scales_are_words;  // of four, aligned
  bool copies_out;        // to the result by the copy engine
};

// One tile of the result, or a part of k of it.
struct Place {
  int expert, first_slot, num_slots, n0;
  int first_word, num_words;  // of 128 of k, and maybe more than there are: zeros
};

__device__ __forceinline__ int NumRowTiles(const Arguments& a) {
  return a.gemm.tiles == nullptr ? a.num_row_tiles : *a.gemm.num_tiles;
}

// Tile `index` of those that there are; false past the last.
template <class S>
__device__ bool FindPlace(const Arguments& a, int num_row_tiles, int index,
                          Place* place) {
  const int num_n = a.num_n_tiles;
  if (index >= num_row_tiles * num_n) return false;
  // Neighbours share rows of x, and over `group_rows` tiles of rows weights, too.
  int row_tile, n_tile;
  if (a.group_rows == 1) {
    row_tile = index < num_n ? 0 : index / num_n;
    n_tile = index - row_tile * num_n;
  } else {
    const int group = index / (a.group_rows * num_n);
    const int first = group * a.group_rows, rest = index - first * num_n;
    const int in_group = min(a.group_rows, num_row_tiles - first);
    n_tile = rest / in_group;
    row_tile = first + rest - n_tile * in_group;
  }
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
  place->n0 = n_tile * (gated ? S::kBoxN : S::kN);
  constexpr int kBodyK = 128 * S::kBodyWords;
  const int bodies = (a.gemm.k + kBodyK - 1) / kBodyK;
  int first_body = 0, end_body = bodies;
  if (a.split_k > 1) {
    const int rank = blockIdx.x & (a.split_k - 1);
    first_body = bodies * rank >> a.split_shift;
    end_body = bodies * (rank + 1) >> a.split_shift;
  }
  place->first_word = first_body * S::kBodyWords;
  place->num_words = (end_body - first_body) * S::kBodyWords;
  return true;
}

struct Shared {
  uint32_t weights, rows, scales, full, empty, passes;
  // If blocks share k: barriers, whether the other ones have read their stages, and
  // whether their sums are here.
  uint32_t ready, arrived;
};

template <class S>
__device__ Shared DivideShared(uint32_t base) {
  Shared s;
  // The swizzle is one of addresses: what it applies to begins at a multiple of 1024.
  base = (base + 1023) / 1024 * 1024;
  s.full = base;
  s.empty = base + 8 * S::kStages;
  s.ready = base + 16 * S::kStages;
  s.arrived = s.ready + 8;
  s.passes = base + 1024;
  s.weights = base + S::kFixedBytes;
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

}  // namespace jmx8::wgmma

// What a warp of GemmWgmma has of the weights: the bytes of a step of 16 of k, then
// these as bf16. Of a lane's two rows one is in the first box and one in the second.
#pragma once

#include "wgmma_shape.cuh"
#include "widen.cuh"

namespace jmx8::wgmma {

// Which rows of weights a warp multiplies. Of each box a warpgroup has neighbouring
// rows, and a warp eight for each of its blocks: neighbours, or those that become
// neighbours when the result is mixed (mix.cu).
template <class S>
struct WeightRows {
  static constexpr int kBlockStep = S::kMixesOut ? 8 : 32;  // from one block to the next
  static_assert(!S::kMixesOut || S::kSideBoxN == 64);

  // The first block's, of a box. In the operand and in the sums the row of the same
  // number in the second box is eight rows below: those of gate and up meet in one lane.
  __device__ __forceinline__ static int First(int side) {
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32 / 4;
    const int row = S::kMixesOut ? lane / 2 * 16 + warp * 2 + lane % 2 : warp * 8 + lane;
    return side * S::kSideBoxN + row;
  }
};

// What both orders of k have in common.
template <class S>
struct Widener {
  static constexpr int kBlockStep = WeightRows<S>::kBlockStep;

  uint32_t spread[S::kBlocks][4];   // pairs of elements, extended to 16 bits
  uint32_t factors[S::kBlocks][2];  // of the MX block that is widened next
  uint32_t extras[S::kBlocks][2];   // its ExtraFactor, if block_has_large
  bool block_has_large;             // whether any of the warp's scales is

  __device__ __forceinline__ void Widen(uint32_t (&a)[S::kBlocks][4]) const {
#pragma unroll
    for (int b = 0; b < S::kBlocks; ++b) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        a[b][r] = MulBf16x2(ShiftPair(spread[b][r]), factors[b][r % 2]);
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
};

// The weights of activations whose columns are as they were. `row`: the lane's, of a box.
template <class S>
struct OrderedWeights : Widener<S> {
  uint32_t pairs[S::kBlocks][4];
  uint32_t codes[S::kBlocks][2];  // scales of one of four blocks of 32, by the lane
  uint32_t fast[S::kBlocks][2];   // their FastFactor
  bool has_large;
  int row;
  uint32_t offset;  // of the lane's first pair in a stage

  __device__ __forceinline__ explicit OrderedWeights(int row) : row(row) {
    const uint32_t swizzle = S::kK == 128 ? row & 7 : row >> 1 & 3;
    offset = row * S::kK + (swizzle << 4) + threadIdx.x % 4 * 2;
  }

  // Gets the bytes of step `step` of a word of 128 of k, and at its first the scales.
  __device__ __forceinline__ void Load(const Shared& s, int stage, int word, int step) {
    const uint32_t weights = s.weights + stage * S::kWeightBytes;
    constexpr uint32_t kBelow = S::kBoxN * S::kK;
#pragma unroll
    for (int b = 0; b < S::kBlocks; ++b) {
      const uint32_t at =
          (offset ^ (step % (S::kK / 16) << 4)) + weights + b * this->kBlockStep * S::kK;
      pairs[b][0] = ptx::LoadShared16(at);
      pairs[b][1] = ptx::LoadShared16(at + kBelow);
      pairs[b][2] = ptx::LoadShared16(at + 8);
      pairs[b][3] = ptx::LoadShared16(at + kBelow + 8);
    }
    if (step == 0) LoadScales(s, word);
  }

  __device__ __forceinline__ void LoadScales(const Shared& s, int word) {
    const uint32_t at = s.scales + word * S::kScaleBytes + 4 * row + threadIdx.x % 4;
    uint32_t largest = 0;
#pragma unroll
    for (int b = 0; b < S::kBlocks; ++b) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        codes[b][r] = ptx::LoadShared8(at + 4 * (b * this->kBlockStep + r * S::kBoxN));
        fast[b][r] = FastFactor(min(codes[b][r], kMaxFastScale));
        largest = max(largest, codes[b][r]);
      }
    }
    has_large = __any_sync(~0u, largest > kMaxFastScale);
  }

  // Takes the bytes out of the registers that the next ones are loaded to.
  __device__ __forceinline__ void Spread(int) {
#pragma unroll
    for (int b = 0; b < S::kBlocks; ++b) {
#pragma unroll
      for (int r = 0; r < 4; ++r) this->spread[b][r] = ExtendPair<0, true>(pairs[b][r]);
    }
  }

  // At the first step of an MX block, gets its factors from the lane that has them.
  __device__ __forceinline__ void FindFactors(int step) {
    if (step % 2 != 0) return;
    const int block = step / 2;
#pragma unroll
    for (int b = 0; b < S::kBlocks; ++b) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        this->factors[b][r] = __shfl_sync(~0u, fast[b][r], block, 4);
      }
    }
    this->block_has_large = has_large;
    if (!has_large) return;
#pragma unroll
    for (int b = 0; b < S::kBlocks; ++b) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        this->extras[b][r] = ExtraFactor(__shfl_sync(~0u, codes[b][r], block, 4));
      }
    }
  }
};

// The weights of activations that mix.cu has mixed: of 64 columns a lane has 16 that are
// neighbours, which are one load and have one scale.
template <class S>
struct MixedWeights : Widener<S> {
  static_assert(S::kK == 64);

  uint4 bytes[S::kBlocks][2];
  uint32_t codes[S::kBlocks][2];
  int row;
  uint32_t offset;  // of the lane's bytes in a stage

  __device__ __forceinline__ explicit MixedWeights(int row) : row(row) {
    offset = row * 64 + ((threadIdx.x % 4 ^ (row >> 1 & 3)) << 4);
  }

  __device__ __forceinline__ void Load(const Shared& s, int stage, int word, int step) {
    if (step % 4 != 0) return;
    const uint32_t weights = s.weights + stage * S::kWeightBytes + offset;
    const uint32_t scales = s.scales + word * S::kScaleBytes + 4 * row + step / 2 +
                            threadIdx.x % 4 / 2;
#pragma unroll
    for (int b = 0; b < S::kBlocks; ++b) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int n = b * this->kBlockStep + r * S::kBoxN;
        bytes[b][r] = ptx::LoadShared128(weights + n * 64);
        codes[b][r] = ptx::LoadShared8(scales + n * 4);
      }
    }
  }

  __device__ __forceinline__ void Spread(int step) {
#pragma unroll
    for (int b = 0; b < S::kBlocks; ++b) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint4& v = bytes[b][r];
        const uint32_t four = step % 4 == 0   ? v.x
                              : step % 4 == 1 ? v.y
                              : step % 4 == 2 ? v.z
                                              : v.w;
        this->spread[b][r] = ExtendPair<0, true>(four);
        this->spread[b][r + 2] = ExtendPair<1, true>(four);
      }
    }
  }

  __device__ __forceinline__ void FindFactors(int step) {
    if (step % 4 != 0) return;
    uint32_t largest = 0;
#pragma unroll
    for (int b = 0; b < S::kBlocks; ++b) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        this->factors[b][r] = FastFactor(min(codes[b][r], kMaxFastScale));
        largest = max(largest, codes[b][r]);
      }
    }
    this->block_has_large = __any_sync(~0u, largest > kMaxFastScale);
    if (!this->block_has_large) return;
#pragma unroll
    for (int b = 0; b < S::kBlocks; ++b) {
#pragma unroll
      for (int r = 0; r < 2; ++r) this->extras[b][r] = ExtraFactor(codes[b][r]);
    }
  }
};

}  // namespace jmx8::wgmma

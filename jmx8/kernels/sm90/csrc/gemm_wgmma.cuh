// Products with widened weights on Hopper's warpgroup matrix units: the weights are the
// operand in registers (their rows are the result's 64 rows), the activations are in
// shared memory. One, two or four warps keep `kStages` stages of both in flight.
#pragma once

#include "bias.cuh"
#include "plain.cuh"
#include "wgmma_consumer.cuh"
#include "wgmma_partials.cuh"
#include "wgmma_producer.cuh"

namespace jmx8::wgmma {

__device__ __forceinline__ void AddBias(const Gemm& g, int expert, int n, int count,
                                        float (&sum)[8]) {
  if (g.bias == nullptr) return;
  const int64_t first = int64_t{expert} * g.n + n;
  for (int j = 0; j < count; ++j) sum[j] += LoadBias(g, first + j);
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
    for (int j = 0; j < 4; ++j) {
      pairs[j] = __floats2bfloat162_rn(v[2 * j], v[2 * j + 1]);
    }
    *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(pairs);
    return;
  }
  for (int j = 0; j < count; ++j) out[j] = __float2bfloat16_rn(v[j]);
}

// The same where mix.cu would move them, in a row of multiples of 64.
__device__ __forceinline__ void StoreMixed(const Gemm& g, int64_t row, int n,
                                           const float (&v)[8]) {
  auto* out = static_cast<__nv_bfloat16*>(g.out) + row;
#pragma unroll
  for (int j = 0; j < 8; j += 2) {
    const int column = n + j, c = column / 16 % 4, s = column / 4 % 4;
    const int to = column / 64 * 64 + 16 * s + 8 * (column / 2 % 2) + 2 * c;
    *reinterpret_cast<uint32_t*>(out + to) = ptx::PackBf16(v[j], v[j + 1]);
  }
}

template <class S, bool kGated>
__device__ void Finish(const Arguments& a, const Place& p, const Partials<S>& partials) {
  const Gemm& g = a.gemm;
  const int columns = kGated ? g.n / 2 : g.n;  // of the result
  constexpr int kPerRow = (kGated ? S::kBoxN : S::kN) / 8;
  const unsigned items = partials.count * kPerRow;
  for (unsigned i = threadIdx.x; i < items; i += S::kConsumers) {
    const int row = i / kPerRow, n = i % kPerRow * 8;
    const int count = min(8, columns - p.n0 - n);
    if (count <= 0) continue;
    float value[8];
    partials.Sum(row, n, value);
    AddBias(g, p.expert, p.n0 + n, count, value);
    if constexpr (kGated) {
      float up[8];
      partials.Sum(row, n + S::kBoxN, up);
      AddBias(g, p.expert, columns + p.n0 + n, count, up);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        value[j] = ApplyGated(g.activation, value[j], up[j], g.alpha, g.beta, g.limit);
      }
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) value[j] = ApplyUngated(g.activation, value[j]);
    }
    const int64_t slot = p.first_slot + partials.first + row, out = slot * g.out_pitch;
    if constexpr (S::kMixesOut) {
      StoreMixed(g, out, p.n0 + n, value);
    } else {
      StoreColumns(g, out + p.n0 + n, count, g.out_pitch % 8 == 0, value);
    }
  }
}

// Whether sums go from registers to the result. If not, a block has one tile only, for
// the sums then take the place of the stages. Rare activations would be much code, once
// for each sum.
template <class S>
__host__ __device__ bool IsDirect(const Gemm& g, int split_k) {
  return S::kDeep == 1 && split_k == 1 && !g.out_is_f32 &&
         (!IsGated(g.activation) || g.activation == Activation::kSilu ||
          g.activation == Activation::kSwiGluOai);
}

// Stores the result if not.
template <class S>
__device__ __forceinline__ void Store(const Arguments& a, const Place& p,
                                      const Shared& s, int side, int deep,
                                      Consumer<S>* consumer) {
  const Partials<S> partials(a, p, s);
  ptx::NamedBarrier(1, S::kConsumers);  // all have read the stages
  if (partials.split_k > 1) partials.LetOthersSend(s);
  consumer->StorePartial(partials.own + deep * S::kPartialBytes, side);
  if (partials.split_k > 1) ptx::FenceAsyncProxy();
  ptx::NamedBarrier(1, S::kConsumers);
  if (partials.split_k > 1) partials.Exchange(s);
  if (IsGated(a.gemm.activation)) {
    Finish<S, true>(a, p, partials);
  } else {
    Finish<S, false>(a, p, partials);
  }
  __syncwarp();
}

// kPlain: with words of scales, too.
template <bool kPlain>
__device__ __forceinline__ std::conditional_t<kPlain, Arguments, const Arguments&> Known(
    const Arguments& given) {
  if constexpr (kPlain) {
    Arguments a = given;
    a.gemm = jmx8::Known<true>(given.gemm);
    a.scales_are_words = true;
    return a;
  } else {
    return given;
  }
}

template <class S, bool kPlain>
__global__ void __launch_bounds__(S::kThreads, S::kOccupancy)
    GemmWgmma(const __grid_constant__ Arguments given,
              const __grid_constant__ CUtensorMap w_map,
              const __grid_constant__ CUtensorMap x_map,
              const __grid_constant__ CUtensorMap out_map) {
  extern __shared__ uint8_t memory[];
  const Arguments& a = Known<kPlain>(given);
  const Shared s = DivideShared<S>(ptx::SharedAddress(memory));
  const bool splits = S::kSplits && a.split_k > 1;
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::kStages; ++i) {
      ptx::BarrierInit(s.full + 8 * i, S::kProducers + 1);
      ptx::BarrierInit(s.empty + 8 * i, S::kSide);
    }
    if (splits) {
      ptx::BarrierInit(s.ready, a.split_k - 1);
      ptx::BarrierInit(s.arrived, 1);
    }
    ptx::FenceBarrierInit();
  }
  __syncthreads();
  if (splits) ptx::ClusterArrive();  // the barriers are there
  if constexpr (S::kGathers) {
    ptx::WaitForKernelBefore();
    ptx::LetNextKernelStart();
  }
  // The same in all lanes, as the compiler must know.
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
  const int first = blockIdx.x >> a.split_shift, stride = gridDim.x >> a.split_shift;
  Place place;
  if (warpgroup == S::kConsumers / 128) {
    if constexpr (S::kMovesRegisters) {
      asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    }
    Producer<S> producer;
    for (int i = first; FindPlace<S>(a, NumRowTiles(a), i, &place); i += stride) {
      producer.Run(a, place, s, &w_map, &x_map, threadIdx.x - S::kConsumers);
    }
    __syncwarp();
    if (splits) {
      ptx::ClusterWait();
      ptx::ClusterArrive();
      ptx::ClusterWait();
    }
  } else {
    if constexpr (S::kMovesRegisters) {
      asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    }
    if (splits) ptx::ClusterWait();
    const int side = warpgroup % S::kSide, deep = warpgroup / S::kSide;
    Consumer<S> consumer(deep);
    const int num_row_tiles = NumRowTiles(a);
    const bool direct = IsDirect<S>(a.gemm, a.split_k);
    int i = first;
    bool is_there = FindPlace<S>(a, num_row_tiles, i, &place);
    while (is_there) {
      consumer.Run(place, s, side, deep);
      if (!direct) {
        Store<S>(a, place, s, side, deep, &consumer);
        break;  // else the compiler would not know that lanes go on together
      }
      const Place done = place;
      // Before the result is stored, as it takes a while.
      is_there = FindPlace<S>(a, num_row_tiles, i += stride, &place);
      consumer.StoreResult(a.gemm, done, s, side, a.copies_out ? &out_map : nullptr);
    }
    ptx::StoreTileWaitAll();
    if (splits) {  // the other blocks have this one's sums
      ptx::ClusterArrive();
      ptx::ClusterWait();
    }
  }
}

}  // namespace jmx8::wgmma

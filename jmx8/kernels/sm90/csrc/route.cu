// Which experts a token goes to: one warp per token, expert e in lane e % 32. Scores
// are compared as integers in XLA's total order (-NaN < -inf < -0 < 0 < inf < NaN), and
// made with the operations of xla_routing.py in float32, so that ties fall alike.
//
// Registers: RouteKernel <= 64

#include <cuda_bf16.h>

#include "kernels.h"
#include "launch.cuh"

namespace jmx8 {
namespace {

constexpr int kWarps = 4;  // of a thread block
constexpr int kMaxExperts = 512;
constexpr int kMaxTopK = 16;
constexpr unsigned kAllLanes = ~0u;
constexpr float kEpsilon = 1e-20f;  // as in xla_routing.py

// Below the key of every score: of experts that do not exist or are taken.
constexpr uint32_t kNoKey = 0;

__device__ __forceinline__ uint32_t SortKey(float score) {
  const uint32_t bits = __float_as_uint(score);
  return max(bits >> 31 ? ~bits : bits | 0x80000000u, kNoKey + 1);
}

__device__ __forceinline__ float FromSortKey(uint32_t key) {
  return __uint_as_float(key >> 31 ? key & 0x7FFFFFFFu : ~key);
}

__device__ __forceinline__ float WarpSum(float v) {
  for (int mask = 16; mask > 0; mask /= 2) v += __shfl_xor_sync(kAllLanes, v, mask);
  return v;
}

__device__ __forceinline__ float WarpMax(float v) {
  for (int mask = 16; mask > 0; mask /= 2) {
    v = fmaxf(v, __shfl_xor_sync(kAllLanes, v, mask));
  }
  return v;
}

// Removes the largest key of the warp and returns its index, of equal ones the lowest.
template <int kValues>
__device__ __forceinline__ int TakeBest(uint32_t (&keys)[kValues], int lane) {
  uint32_t best = keys[0];
  unsigned index = lane;
#pragma unroll
  for (int i = 1; i < kValues; ++i) {
    if (keys[i] > best) {
      best = keys[i];
      index = i * 32 + lane;
    }
  }
  const uint32_t top = __reduce_max_sync(kAllLanes, best);
  const int taken = __reduce_min_sync(kAllLanes, best == top ? index : kMaxExperts);
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    if (i * 32 + lane == taken) keys[i] = kNoKey;
  }
  return taken;
}

// NaN anywhere makes all of them NaN, as the sum is.
template <int kValues>
__device__ __forceinline__ void SoftmaxOfWarp(float (&v)[kValues], int count,
                                              int lane) {
  float largest = -INFINITY;
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    if (i * 32 + lane < count) largest = fmaxf(largest, v[i]);
  }
  largest = WarpMax(largest);
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    v[i] = i * 32 + lane < count ? expf(v[i] - largest) : 0.0f;
    sum += v[i];
  }
  sum = WarpSum(sum);
#pragma unroll
  for (int i = 0; i < kValues; ++i) v[i] /= sum;
}

__device__ __forceinline__ float Sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

__device__ __forceinline__ float SqrtSoftplus(float x) {
  // NaN is none of the two that fmaxf would choose from.
  return isnan(x) ? x : sqrtf(fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))));
}

template <int kValues>
__device__ __forceinline__ void ScoresOfWarp(float (&v)[kValues], const Route& p,
                                             int lane) {
  if (p.scores == Scores::kSoftmax) SoftmaxOfWarp(v, p.num_experts, lane);
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    if (p.scores == Scores::kSigmoid) v[i] = Sigmoid(v[i]);
    if (p.scores == Scores::kSqrtSoftplus) v[i] = SqrtSoftplus(v[i]);
  }
}

// What a group is worth. Each lane starts elsewhere, to spread over the banks.
__device__ __forceinline__ float SumOfBestTwo(const uint32_t* keys, int size,
                                              int lane) {
  uint32_t first = kNoKey, second = kNoKey;
  int at = lane % size;
#pragma unroll 8
  for (int i = 0; i < size; ++i) {
    const uint32_t key = keys[at];
    second = max(second, min(first, key));
    first = max(first, key);
    at = at + 1 == size ? 0 : at + 1;
  }
  return size == 1 ? FromSortKey(first) : FromSortKey(first) + FromSortKey(second);
}

// Gives the experts outside the best groups the score -inf. `shared` holds the keys.
template <int kValues>
__device__ __forceinline__ void KeepBestGroups(uint32_t (&keys)[kValues],
                                               const uint32_t* shared, const Route& p,
                                               int lane) {
  const int size = p.num_experts / p.num_groups;
  uint32_t groups[kValues];
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    const int group = i * 32 + lane;
    groups[i] = group < p.num_groups
                    ? SortKey(SumOfBestTwo(shared + group * size, size, lane))
                    : kNoKey;
  }
  unsigned kept = 0;  // one bit per expert of this lane
  for (int j = 0; j < p.topk_groups; ++j) {
    const int first = TakeBest(groups, lane) * size;
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      kept |= (static_cast<unsigned>(i * 32 + lane - first) < size) << i;
    }
  }
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    if (keys[i] != kNoKey && !(kept >> i & 1)) keys[i] = SortKey(-INFINITY);
  }
}

// Weighs the experts that lanes [0, top_k) hold the scores of.
__device__ __forceinline__ float Weight(float score, const Route& p, int lane) {
  float v[1] = {lane < p.top_k ? score : 0.0f};
  if (p.scores == Scores::kTopkSoftmax) {
    SoftmaxOfWarp(v, p.top_k, lane);
  } else if (p.renormalize) {
    v[0] /= WarpSum(v[0]) + kEpsilon;
  }
  return v[0] * p.scaling_factor;
}

template <int kValues, typename Logit>
__global__ void __launch_bounds__(32 * kWarps) RouteKernel(const Route p) {
  __shared__ float all_scores[kWarps][kValues * 32];
  __shared__ uint32_t all_keys[kWarps][kValues * 32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int token = blockIdx.x * kWarps + warp;
  if (token >= p.num_tokens) return;
  const Logit* logits =
      static_cast<const Logit*>(p.logits) + static_cast<size_t>(token) * p.num_experts;
  const float* bias = p.bias;
  if (bias != nullptr && p.bias_per_token) {
    bias += static_cast<size_t>(token) * p.num_experts;
  }

  float v[kValues];
  uint32_t keys[kValues];
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    const int expert = i * 32 + lane;
    v[i] = expert < p.num_experts ? static_cast<float>(logits[expert]) : 0.0f;
  }
  ScoresOfWarp(v, p, lane);
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    const int expert = i * 32 + lane;
    const bool exists = expert < p.num_experts;
    const float choice = exists && bias != nullptr ? v[i] + bias[expert] : v[i];
    keys[i] = exists ? SortKey(choice) : kNoKey;
    all_scores[warp][expert] = v[i];
    all_keys[warp][expert] = keys[i];
  }
  __syncwarp();
  if (p.num_groups > 1) KeepBestGroups(keys, all_keys[warp], p, lane);

  int id = 0;
  for (int j = 0; j < p.top_k; ++j) {
    const int best = TakeBest(keys, lane);
    if (lane == j) id = best;
  }
  const float weight = Weight(all_scores[warp][id], p, lane);
  if (lane < p.top_k) {
    p.ids[static_cast<size_t>(token) * p.top_k + lane] = id;
    p.weights[static_cast<size_t>(token) * p.top_k + lane] = weight;
  }
}

template <int kValues>
void Launch(const Route& p, cudaStream_t stream) {
  const int grid = CeilDiv(p.num_tokens, kWarps);
  if (p.logits_are_f32) {
    RouteKernel<kValues, float><<<grid, 32 * kWarps, 0, stream>>>(p);
  } else {
    RouteKernel<kValues, __nv_bfloat16><<<grid, 32 * kWarps, 0, stream>>>(p);
  }
}

}  // namespace

const char* LaunchRoute(const Route& p, cudaStream_t stream) {
  if (p.num_experts < 1 || p.num_experts > kMaxExperts) {
    return "route: the number of experts must be in [1, 512].";
  }
  if (p.num_groups < 1 || p.num_experts % p.num_groups != 0 || p.topk_groups < 1 ||
      p.topk_groups > p.num_groups) {
    return "route: num_groups must divide the number of experts, and topk_groups be in "
           "[1, num_groups].";
  }
  if (p.top_k < 1 || p.top_k > kMaxTopK ||
      p.top_k > p.num_experts / p.num_groups * p.topk_groups) {
    return "route: top_k must be in [1, 16] and at most the number of experts of "
           "topk_groups groups.";
  }
  if (p.num_tokens == 0) return nullptr;
  if (p.num_experts <= 32) {
    Launch<1>(p, stream);
  } else if (p.num_experts <= 64) {
    Launch<2>(p, stream);
  } else if (p.num_experts <= 128) {
    Launch<4>(p, stream);
  } else if (p.num_experts <= 256) {
    Launch<8>(p, stream);
  } else {
    Launch<16>(p, stream);
  }
  return LaunchError();
}

}  // namespace jmx8

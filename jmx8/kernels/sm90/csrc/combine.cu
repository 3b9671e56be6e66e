// The weighted sum of each token's expert outputs. A thread owns eight columns of one
// token and has up to kBatch of its rows in flight.
//
// Registers: CombineKernel <= 80

#include <cuda_bf16.h>

#include "kernels.h"
#include "launch.cuh"
#include "ptx.cuh"

namespace jmx8 {
namespace {

constexpr int kThreads = 128;
constexpr int kBatch = 8;
constexpr int kColumns = 8;  // 16 bytes of bf16

__device__ __forceinline__ void AddRow(float (&sum)[kColumns], float weight,
                                       uint4 row) {
  const uint32_t words[4] = {row.x, row.y, row.z, row.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sum[2 * i] = fmaf(weight, __uint_as_float(words[i] << 16), sum[2 * i]);
    sum[2 * i + 1] =
        fmaf(weight, __uint_as_float(words[i] & 0xFFFF0000), sum[2 * i + 1]);
  }
}

__device__ __forceinline__ uint32_t Bf16Pair(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

__global__ void __launch_bounds__(kThreads)
    CombineKernel(const uint4* rows, const int* slot_of_row, const float* weights,
                  uint4* out, uint32_t num_vectors, uint32_t vectors_per_row,
                  int top_k) {
  const uint32_t index = blockIdx.x * kThreads + threadIdx.x;
  if (index >= num_vectors) return;
  const uint32_t token = index / vectors_per_row;
  const uint32_t column = index - token * vectors_per_row;
  const size_t first = static_cast<size_t>(token) * top_k;
  ptx::WaitForKernelBefore();
  float sum[kColumns] = {};
  for (int j = 0; j < top_k; j += kBatch) {
    uint4 v[kBatch];
    float weight[kBatch];
    bool counts[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int slot = j + i < top_k ? slot_of_row[first + j + i] : -1;
      counts[i] = slot >= 0;
      if (!counts[i]) continue;
      v[i] = rows[static_cast<size_t>(slot) * vectors_per_row + column];
      weight[i] = weights == nullptr ? 1.0f : weights[first + j + i];
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (counts[i]) AddRow(sum, weight[i], v[i]);
    }
  }
  out[index] = {Bf16Pair(sum[0], sum[1]), Bf16Pair(sum[2], sum[3]),
                Bf16Pair(sum[4], sum[5]), Bf16Pair(sum[6], sum[7])};
}

}  // namespace

const char* LaunchCombine(const Combine& p, cudaStream_t stream) {
  if (p.hidden_size % kColumns != 0) {
    return "combine: the hidden size must be a multiple of 8.";
  }
  if (!IsAligned(p.rows, 16) || !IsAligned(p.out, 16)) {
    return "combine: rows and out must be aligned to 16 bytes.";
  }
  const int vectors_per_row = p.hidden_size / kColumns;
  const int64_t num_vectors = static_cast<int64_t>(p.num_tokens) * vectors_per_row;
  if (num_vectors > INT32_MAX) {
    return "combine: out must have less than 2**34 elements.";
  }
  if (num_vectors == 0) return nullptr;
  cudaLaunchConfig_t config = {};
  config.gridDim = CeilDiv<int>(num_vectors, kThreads);
  config.blockDim = kThreads;
  config.stream = stream;
  cudaLaunchAttribute early = EarlyStart();
  config.attrs = &early;
  config.numAttrs = p.starts_early;
  const cudaError_t error = cudaLaunchKernelEx(
      &config, CombineKernel, static_cast<const uint4*>(p.rows), p.slot_of_row,
      p.weights, static_cast<uint4*>(p.out), static_cast<uint32_t>(num_vectors),
      static_cast<uint32_t>(vectors_per_row), p.top_k);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace jmx8

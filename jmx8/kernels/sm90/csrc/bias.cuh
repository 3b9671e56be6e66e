// Reading a Gemm's bias, which has one of two types.
#pragma once

#include <cuda_bf16.h>

#include "kernels.h"

namespace jmx8 {

__device__ __forceinline__ float LoadBias(const Gemm& g, int64_t index) {
  if (g.bias_is_f32) return static_cast<const float*>(g.bias)[index];
  return __bfloat162float(static_cast<const __nv_bfloat16*>(g.bias)[index]);
}

}  // namespace jmx8

// What comes between the two matmuls of an expert, in float32; see xla_activation.py.
#pragma once

#include "kernels.h"

namespace jmx8 {

// Within 2^-20 of itself, in few instructions; what it is for is rounded to bf16.
__device__ __forceinline__ float Sigmoid(float x) {
  float sigmoid;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(sigmoid) : "f"(1.0f + __expf(-x)));
  return sigmoid;
}

__device__ __forceinline__ float ApplySilu(float gate, float up) {
  return gate * Sigmoid(gate) * up;
}

__device__ __forceinline__ float ApplySwiGlu(float gate, float up, float alpha,
                                             float beta, float limit) {
  // Comparisons rather than fminf, which would return the limit for NaN.
  gate = gate > limit ? limit : gate;
  up = up > limit ? limit : up < -limit ? -limit : up;
  return gate * Sigmoid(alpha * gate) * (up + beta);
}

// kSwiGluOai reads the three parameters, the others none.
__device__ __forceinline__ float ApplyGated(Activation activation, float gate, float up,
                                            float alpha, float beta, float limit) {
  switch (activation) {
    case Activation::kSilu:
      return ApplySilu(gate, up);
    case Activation::kGelu:
      return 0.5f * gate * erfcf(gate * -0.70710678f) * up;
    case Activation::kGeluTanh:
      return 0.5f * gate *
             (1.0f + tanhf(0.79788456f * (gate + 0.044715f * gate * gate * gate))) * up;
    default:
      return ApplySwiGlu(gate, up, alpha, beta, limit);
  }
}

__device__ __forceinline__ float ApplyUngated(Activation activation, float x) {
  if (activation != Activation::kRelu2) return x;
  return x <= 0.0f ? 0.0f : x * x;
}

}  // namespace jmx8

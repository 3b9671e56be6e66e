// What comes between the two matmuls of an expert, in float32; see xla_activation.py.
#pragma once

#include "kernels.h"

namespace jmx8 {

__device__ __forceinline__ float Sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// kSwiGluOai reads the three parameters, the others none.
__device__ __forceinline__ float ApplyGated(Activation activation, float gate, float up,
                                            float alpha, float beta, float limit) {
  switch (activation) {
    case Activation::kSilu:
      return gate * Sigmoid(gate) * up;
    case Activation::kGelu:
      return 0.5f * gate * erfcf(gate * -0.70710678f) * up;
    case Activation::kGeluTanh:
      return 0.5f * gate *
             (1.0f + tanhf(0.79788456f * (gate + 0.044715f * gate * gate * gate))) * up;
    default:
      // Comparisons rather than fminf, which would return the limit for NaN.
      gate = gate > limit ? limit : gate;
      up = up > limit ? limit : up < -limit ? -limit : up;
      return gate * Sigmoid(alpha * gate) * (up + beta);
  }
}

__device__ __forceinline__ float ApplyUngated(Activation activation, float x) {
  if (activation != Activation::kRelu2) return x;
  return x <= 0.0f ? 0.0f : x * x;
}

}  // namespace jmx8

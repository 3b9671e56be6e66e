// bf16 -> MXFP8 in one pass. Four lanes hold a block, 16 bytes each. The scale comes
// from integers alone; the elements from a product with a power of two.
//
// Registers: QuantizeKernel <= 32

#include <cuda_bf16.h>

#include "kernels.h"
#include "launch.cuh"

namespace jmx8 {
namespace {

constexpr int kThreads = 256;
constexpr int kVectors = 4;  // of a thread: enough bytes in flight to fill the memory
constexpr int kLanesPerBlock = 4;

constexpr uint32_t kInfinity = 0x7F80;      // magnitudes as bf16 bits
constexpr uint32_t kMaxMantissa = 0x60;     // of 448 = 1.75 * 2**8
constexpr uint32_t kMinScaled = 0x04E0;     // 1.75 * 2**-118
constexpr uint32_t kMagnitudes = 0x7FFF7FFF;
constexpr float kMaxElement = 448.0f;

__device__ __forceinline__ uint32_t MaxPair(uint32_t a, uint32_t b) {
  uint32_t out;  // of a number and a NaN, the number
  asm("max.bf16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  return out;
}

// Takes the largest even element in the low half, the largest odd one in the high half;
// NaN where there is no number.
__device__ __forceinline__ uint32_t ScaleCode(uint32_t pair) {
  const uint32_t even = pair & 0xFFFF, odd = pair >> 16;
  if (odd > kInfinity) return 255;
  const uint32_t amax = max(odd, even > kInfinity ? 0u : even);
  if (amax == kInfinity) return 254;
  if (amax < kMinScaled) return 0;
  return (amax >> 7) - 8 + ((amax & 0x7F) > kMaxMantissa);
}

// 2**(127 - code): 0 for codes 0 and 254, NaN for 255.
__device__ __forceinline__ float InverseScale(uint32_t code) {
  const uint32_t bits = code == 0 ? 0 : (254 - code) << 23;
  return __uint_as_float(code == 255 ? 0x7FC00000 : bits);
}

__device__ __forceinline__ float Scaled(uint32_t bf16_bits, float inverse) {
  float out;  // subnormal values count as zeros
  asm("mul.ftz.f32 %0, %1, %2;"
      : "=f"(out)
      : "f"(__uint_as_float(bf16_bits)), "f"(inverse));
  return fminf(out, kMaxElement);  // which makes NaN 448
}

__device__ __forceinline__ uint32_t RoundPair(uint32_t pair, float inverse) {
  uint16_t out;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;"
      : "=h"(out)
      : "f"(Scaled(pair & 0xFFFF0000, inverse)), "f"(Scaled(pair << 16, inverse)));
  return out;
}

__global__ void __launch_bounds__(kThreads)
    QuantizeKernel(const uint4* x, int64_t num_vectors, uint2* elements,
                   uint8_t* scales) {
  const int64_t first =
      static_cast<int64_t>(blockIdx.x) * (kThreads * kVectors) + threadIdx.x;
  uint4 v[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int64_t index = first + i * kThreads;
    v[i] = index < num_vectors ? x[index] : uint4{};
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int64_t index = first + i * kThreads;
    uint32_t amax = MaxPair(MaxPair(v[i].x & kMagnitudes, v[i].y & kMagnitudes),
                            MaxPair(v[i].z & kMagnitudes, v[i].w & kMagnitudes));
    amax = MaxPair(amax, __shfl_xor_sync(~0u, amax, 1));
    amax = MaxPair(amax, __shfl_xor_sync(~0u, amax, 2));
    if (index >= num_vectors) continue;
    const uint32_t code = ScaleCode(amax);
    const float inverse = InverseScale(code);
    elements[index] = {
        RoundPair(v[i].x, inverse) | RoundPair(v[i].y, inverse) << 16,
        RoundPair(v[i].z, inverse) | RoundPair(v[i].w, inverse) << 16};
    if (index % kLanesPerBlock == 0) scales[index / kLanesPerBlock] = code;
  }
}

}  // namespace

const char* LaunchQuantize(const Quantize& p, cudaStream_t stream) {
  if (!IsAligned(p.x, 16) || !IsAligned(p.elements, 8)) {
    return "quantize: x must be aligned to 16 bytes and elements to 8.";
  }
  const int64_t num_vectors = p.num_blocks * kLanesPerBlock;
  const int64_t grid = CeilDiv<int64_t>(num_vectors, kThreads * kVectors);
  if (grid > INT32_MAX) return "quantize: x must have less than 2**44 elements.";
  if (grid == 0) return nullptr;
  QuantizeKernel<<<static_cast<int>(grid), kThreads, 0, stream>>>(
      static_cast<const uint4*>(p.x), num_vectors,
      reinterpret_cast<uint2*>(p.elements), p.scales);
  return LaunchError();
}

}  // namespace jmx8

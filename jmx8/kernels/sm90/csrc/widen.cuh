// Exact widening of MXFP8 to bf16: element * 2^(scale - 127).
//
// Moving an e4m3 code's seven low bits to bits 4..10 of a bf16 gives the element times
// 2^-120, subnormal elements too. One multiplication by a power of two brings the rest:
// it is exact, except that results below 2^-126 are rounded once, to nearest even, as
// the float32 product rounded to bf16 would be. bf16 has no 2^128, so scale codes above
// kMaxFastScale take a second multiplication; overflow gives infinity there, and code
// 255 NaN, as in float32. The element codes 0x7f and 0xff, NaN, are read as +-480:
// quantization never makes them.
#pragma once

#include <cstdint>

namespace jmx8 {

constexpr uint32_t kMaxFastScale = 134;

// 2^(code - 7), twice; of codes up to kMaxFastScale.
__host__ __device__ __forceinline__ uint32_t FastFactor(uint32_t code) {
  return code * 0x00800080u + 0x3c003c00u;
}

// What is left to multiply with after FastFactor(min(code, kMaxFastScale)).
__host__ __device__ __forceinline__ uint32_t ExtraFactor(uint32_t code) {
  if (code == 255) return 0x7fc07fc0u;
  uint32_t rest = code > kMaxFastScale ? code - kMaxFastScale : 0;
  return (rest + 127) * 0x00800080u;
}

#ifdef __CUDACC__

__device__ __forceinline__ uint32_t MulBf16x2(uint32_t a, uint32_t b) {
  uint32_t out;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  return out;
}

// Factors of one MX block. kAnyScale: of any scale code, at the price of another
// multiplication per pair.
template <bool kAnyScale>
struct Factors {
  uint32_t fast, extra;

  __device__ __forceinline__ explicit Factors(uint32_t code)
      : fast(FastFactor(kAnyScale ? min(code, kMaxFastScale) : code)),
        extra(kAnyScale ? ExtraFactor(code) : 0) {}

  __device__ __forceinline__ uint32_t Apply(uint32_t pair) const {
    pair = MulBf16x2(pair, fast);
    return kAnyScale ? MulBf16x2(pair, extra) : pair;
  }
};

// Elements 2 kPair and 2 kPair + 1 of four, extended by their signs to 16 bits.
// kInOrder: the compiler must not move it up to where the bytes are not there yet.
template <int kPair, bool kInOrder = false>
__device__ __forceinline__ uint32_t ExtendPair(uint32_t bytes) {
  constexpr uint32_t kBytesAndSigns = kPair == 0 ? 0x9180 : 0xb3a2;
  uint32_t extended;
  if constexpr (kInOrder) {
    asm volatile("prmt.b32 %0, %1, 0, %2;"
                 : "=r"(extended)
                 : "r"(bytes), "n"(kBytesAndSigns));
  } else {
    asm("prmt.b32 %0, %1, 0, %2;" : "=r"(extended) : "r"(bytes), "n"(kBytesAndSigns));
  }
  return extended;
}

// An extended pair times 2^-120: its bits where bf16 has exponent and mantissa.
__device__ __forceinline__ uint32_t ShiftPair(uint32_t extended) {
  return (extended << 4) & 0x87f087f0u;
}

template <int kPair>
__device__ __forceinline__ uint32_t SpreadPair(uint32_t bytes) {
  return ShiftPair(ExtendPair<kPair>(bytes));
}

#endif

}  // namespace jmx8

// Matmuls of the most common kind have kernels of their own: for few rows, what the others
// ask before the first load and after the last product takes up to a tenth of the time.
#pragma once

#include <type_traits>

#include "kernels.h"

namespace jmx8 {

inline bool IsPlain(const Gemm& g) {
  return g.tiles == nullptr && g.activation == Activation::kNone && !g.out_is_f32 &&
         g.k % 128 == 0 && g.out_pitch % 8 == 0;
}

// The same matmul. kPlain: as one of which the compiler knows that it is plain.
template <bool kPlain>
__device__ __forceinline__ std::conditional_t<kPlain, Gemm, const Gemm&> Known(
    const Gemm& given) {
  if constexpr (kPlain) {
    Gemm g = given;
    g.slot_rows = nullptr;
    g.tiles = nullptr;
    g.activation = Activation::kNone;
    g.out_is_f32 = false;
    __builtin_assume(g.k % 128 == 0);
    __builtin_assume(g.out_pitch % 8 == 0);
    return g;
  } else {
    return given;
  }
}

}  // namespace jmx8

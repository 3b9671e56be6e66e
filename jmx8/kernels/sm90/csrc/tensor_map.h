// How weights and activations are described to the copy engine.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "kernels.h"

namespace jmx8 {

using EncodeTensorMap = decltype(&cuTensorMapEncodeTiled);

inline EncodeTensorMap FindEncodeTensorMap() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                       cudaEnableDefault, &found) != cudaSuccess) {
    return nullptr;
  }
  return reinterpret_cast<EncodeTensorMap>(function);
}

inline bool Encode(CUtensorMap* map, CUtensorMapDataType type, int rank,
                   const void* data, const cuuint64_t* size, const cuuint64_t* pitch,
                   const cuuint32_t* box, CUtensorMapSwizzle swizzle) {
  static const EncodeTensorMap encode = FindEncodeTensorMap();
  const cuuint32_t ones[3] = {1, 1, 1};
  return encode != nullptr &&
         encode(map, type, rank, const_cast<void*>(data), size, pitch, box, ones,
                CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// Of rows of `bytes` bytes, 64 or 128: chunks of 16 bytes are exchanged so that a column
// has all banks.
inline CUtensorMapSwizzle SwizzleOf(int bytes) {
  return bytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
}

// The elements as [num_experts, n, k], in boxes of `box_rows` rows of `box_k` bytes, 64
// or 128.
inline const char* EncodeElements(const Gemm& g, int box_rows, int box_k,
                                  CUtensorMap* map) {
  const cuuint64_t k = g.k, n = g.n;
  const cuuint64_t size[3] = {k, n, static_cast<cuuint64_t>(g.num_experts)};
  const cuuint64_t pitch[2] = {k, k * n};
  const cuuint32_t box[3] = {static_cast<cuuint32_t>(box_k),
                             static_cast<cuuint32_t>(box_rows), 1};
  if (Encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 3, g.w, size, pitch, box,
             SwizzleOf(box_k))) {
    return nullptr;
  }
  return "the weights cannot be described to the copy engine; they must begin at a "
         "multiple of 16 bytes";
}

// bf16 [rows, columns], in boxes of `box_rows` rows of `box_columns` columns, 32 or 64.
inline bool EncodeMatrix(const void* data, int rows, int columns, int box_rows,
                         int box_columns, CUtensorMap* map) {
  const cuuint64_t size[2] = {static_cast<cuuint64_t>(columns),
                              static_cast<cuuint64_t>(rows)};
  const cuuint64_t pitch[1] = {size[0] * 2};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_columns),
                             static_cast<cuuint32_t>(box_rows)};
  return Encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, data, size, pitch, box,
                SwizzleOf(box_columns * 2));
}

// The activations as [num_x_rows, k], in boxes of `box_rows` rows of 64 columns.
inline const char* EncodeRows(const Gemm& g, int box_rows, CUtensorMap* map) {
  if (EncodeMatrix(g.x, g.num_x_rows, g.k, box_rows, 64, map)) return nullptr;
  return "the activations cannot be described to the copy engine; they must begin at a "
         "multiple of 16 bytes";
}

// The result as [num_slots, out_pitch], in boxes as EncodeMatrix takes them.
inline const char* EncodeOut(const Gemm& g, int box_rows, int box_columns,
                             CUtensorMap* map) {
  if (EncodeMatrix(g.out, g.num_slots, g.out_pitch, box_rows, box_columns, map)) {
    return nullptr;
  }
  return "the result cannot be described to the copy engine; it must begin at a "
         "multiple of 16 bytes";
}

}  // namespace jmx8

// What the functions that launch kernels share.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace jmx8 {

// What went wrong with the launch just made, or nullptr.
inline const char* LaunchError() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

inline bool IsAligned(const void* pointer, int bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// What a kernel is launched with that may start before the one before it has ended.
inline cudaLaunchAttribute EarlyStart() {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  return attribute;
}

template <typename T>
constexpr __host__ __device__ T CeilDiv(T a, T b) {
  return (a + b - 1) / b;
}

}  // namespace jmx8

// Checks of the tensors that TVM-FFI functions are given, since below they would be
// read, not refused.
#pragma once

#include <cuda_runtime.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/tvm_ffi.h>

#include <climits>
#include <initializer_list>
#include <string>
#include <vector>

namespace jmx8 {

namespace ffi = tvm::ffi;
using ffi::Optional;
using ffi::TensorView;

constexpr DLDataType kBf16{kDLBfloat, 16, 1};
constexpr DLDataType kF32{kDLFloat, 32, 1};
constexpr DLDataType kInt32{kDLInt, 32, 1};
constexpr DLDataType kUint8{kDLUInt, 8, 1};
constexpr DLDataType kE4m3{kDLFloat8_e4m3fn, 8, 1};
constexpr DLDataType kE8m0{kDLFloat8_e8m0fnu, 8, 1};
constexpr int64_t kAny = -1;  // a size that is not checked

inline std::string ToString(const int64_t* sizes, size_t count) {
  std::string text = "[";
  for (size_t i = 0; i < count; ++i) {
    if (i > 0) text += ", ";
    text += sizes[i] == kAny ? "any" : std::to_string(sizes[i]);
  }
  return text + "]";
}

inline std::string ToString(const TensorView& t) {
  return std::string(ffi::DLDataTypeToString(t.dtype())) + " " +
         ToString(t.shape().data(), t.shape().size());
}

// Checks the tensors of one call; the first that is wrong is named in a ValueError.
class Checker {
 public:
  explicit Checker(const char* function) : function_(function) {}

  void True(bool holds, const std::string& what) const {
    if (!holds) TVM_FFI_THROW(ValueError) << function_ << ": " << what << ".";
  }

  void Tensor(const char* name, const TensorView& t,
              std::initializer_list<DLDataType> dtypes,
              const std::vector<int64_t>& shape) {
    bool ok = t.shape().size() == shape.size();
    for (size_t i = 0; ok && i < shape.size(); ++i) {
      ok = t.shape()[i] <= INT_MAX && (shape[i] == kAny || shape[i] == t.shape()[i]);
    }
    bool of_dtype = false;
    std::string expected;
    for (DLDataType dtype : dtypes) {
      of_dtype |= t.dtype() == dtype;
      if (!expected.empty()) expected += " or ";
      expected += ffi::DLDataTypeToString(dtype);
    }
    True(ok && of_dtype, std::string(name) + " must be " + expected + " " +
                             ToString(shape.data(), shape.size()) + ", got " +
                             ToString(t));
    True(t.IsContiguous(), std::string(name) + " must be contiguous");
    tensors_.push_back({name, t.device()});
  }

  // Last, so that everything else is told on any machine.
  cudaStream_t Stream() const {
    const DLDevice device = tensors_.front().device;
    for (const Seen& seen : tensors_) {
      True(seen.device.device_type == kDLCUDA,
           std::string(seen.name) + " must be in the memory of a CUDA device");
      True(seen.device.device_id == device.device_id, std::string(seen.name) +
                                                          " must be on the device of " +
                                                          tensors_.front().name);
    }
    return static_cast<cudaStream_t>(
        TVMFFIEnvGetStream(device.device_type, device.device_id));
  }

  int device_id() const { return tensors_.front().device.device_id; }

 private:
  struct Seen {
    const char* name;
    DLDevice device;
  };
  const char* function_;
  std::vector<Seen> tensors_;
};

// Launches what writes `num_outputs` elements, on the tensors' device and its stream.
template <typename Launcher>
void Launch(const Checker& check, int64_t num_outputs, Launcher launch) {
  const cudaStream_t stream = check.Stream();
  if (num_outputs == 0) return;
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  const bool elsewhere = before != check.device_id();
  if (error == cudaSuccess && elsewhere) error = cudaSetDevice(check.device_id());
  if (error != cudaSuccess) TVM_FFI_THROW(RuntimeError) << cudaGetErrorString(error);
  const char* problem = launch(stream);
  if (elsewhere) cudaSetDevice(before);
  if (problem != nullptr) TVM_FFI_THROW(RuntimeError) << problem;
}

template <typename T>
T* Data(const TensorView& t) {
  return static_cast<T*>(t.data_ptr());
}

template <typename T>
T* Data(const Optional<TensorView>& t) {
  return t.has_value() ? Data<T>(*t) : nullptr;
}

}  // namespace jmx8

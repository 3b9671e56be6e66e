// The library's TVM-FFI functions: what kernels.h declares, of tensors whose dtypes and
// shapes are checked here, since below they would be read, not refused.

#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/tvm_ffi.h>

#include <algorithm>
#include <climits>
#include <initializer_list>
#include <string>
#include <vector>

#include "kernels.h"

namespace jmx8 {
namespace {

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

std::string ToString(const int64_t* sizes, size_t count) {
  std::string text = "[";
  for (size_t i = 0; i < count; ++i) {
    if (i > 0) text += ", ";
    text += sizes[i] == kAny ? "any" : std::to_string(sizes[i]);
  }
  return text + "]";
}

std::string ToString(const TensorView& t) {
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

// Checks slot_rows, tiles and num_tiles against each other and the rows of x and out.
void CheckSlots(Checker& check, const Optional<TensorView>& slot_rows,
                const Optional<TensorView>& tiles,
                const Optional<TensorView>& num_tiles, const Gemm& g) {
  check.True(tiles.has_value() == num_tiles.has_value(),
             "tiles and num_tiles belong together");
  if (tiles.has_value()) {
    check.Tensor("tiles", *tiles, {kInt32}, {kAny, 4});
    check.Tensor("num_tiles", *num_tiles, {kInt32}, {1});
  }
  if (slot_rows.has_value()) {
    check.True(tiles.has_value(), "slot_rows must be None without tiles");
    check.Tensor("slot_rows", *slot_rows, {kInt32}, {g.num_slots});
  } else {
    check.True(g.num_slots == g.num_x_rows, "out must have the rows of x, which are " +
                                                std::to_string(g.num_x_rows) +
                                                ", got " + std::to_string(g.num_slots));
  }
}

void ExportGemm(TensorView x, TensorView w, TensorView scales,
                Optional<TensorView> bias, TensorView out,
                Optional<TensorView> slot_rows, Optional<TensorView> tiles,
                Optional<TensorView> num_tiles, int64_t activation, double alpha,
                double beta, double limit, int64_t kernel, int64_t tile_rows,
                int64_t variant, int64_t split_k) {
  Checker check("gemm");
  check.True(activation >= 0 && activation <= static_cast<int>(Activation::kRelu2),
             "activation must be the number of one");
  const auto act = static_cast<Activation>(activation);
  check.True(tile_rows >= 1 && tile_rows <= INT_MAX && split_k >= 1 &&
                 split_k <= INT_MAX && variant >= 0 && variant <= INT_MAX,
             "tile_rows and split_k must be positive, and variant not negative");
  check.Tensor("x", x, {kBf16}, {kAny, kAny});
  const int64_t k = x.size(1);
  check.True(k % 32 == 0, "x must have a multiple of 32 columns");
  // The axes of one weight matrix, and of each expert's.
  std::vector<int64_t> axes{kAny};
  if (tiles.has_value()) axes = {kAny, kAny};
  const auto with = [&axes](int64_t size) {
    std::vector<int64_t> shape = axes;
    shape.push_back(size);
    return shape;
  };
  check.Tensor("w", w, {kE4m3, kUint8}, with(k));
  axes.assign(w.shape().begin(), w.shape().end() - 1);
  const int64_t n = axes.back();
  check.Tensor("scales", scales, {kE8m0, kUint8}, with(k / 32));
  if (bias.has_value()) check.Tensor("bias", *bias, {kBf16, kF32}, axes);
  check.True(!IsGated(act) || n % 2 == 0,
             "w must have an even number of rows for a gated activation");
  check.Tensor("out", out, {kBf16, kF32}, {kAny, IsGated(act) ? n / 2 : n});

  Gemm g{};
  g.x = x.data_ptr();
  g.w = Data<uint8_t>(w);
  g.scales = Data<uint8_t>(scales);
  g.bias = Data<void>(bias);
  g.out = out.data_ptr();
  g.bias_is_f32 = bias.has_value() && (*bias).dtype() == kF32;
  g.out_is_f32 = out.dtype() == kF32;
  g.num_x_rows = x.size(0);
  g.num_slots = out.size(0);
  g.n = n;
  g.k = k;
  g.num_experts = tiles.has_value() ? axes.front() : 1;
  g.slot_rows = Data<int>(slot_rows);
  g.tiles = Data<Tile>(tiles);
  g.num_tiles = Data<int>(num_tiles);
  g.max_tiles = tiles.has_value() ? (*tiles).size(0) : 0;
  g.activation = act;
  g.alpha = alpha;
  g.beta = beta;
  g.limit = limit;
  CheckSlots(check, slot_rows, tiles, num_tiles, g);
  const GemmConfig config{static_cast<int>(kernel), static_cast<int>(tile_rows),
                          static_cast<int>(variant), static_cast<int>(split_k)};
  check.True(kernel == 0 || kernel == 1, "kernel must be 0 (mma) or 1 (wgmma)");
  Launch(check, out.numel(), [&](cudaStream_t stream) {
    return kernel == 0 ? LaunchGemmMma(g, config, stream)
                       : LaunchGemmWgmma(g, config, stream);
  });
}

int64_t ExportPermuteWorkspace(int64_t num_rows, int64_t num_experts) {
  return PermuteWorkspace(num_rows, num_experts);
}

void ExportPermute(TensorView ids, TensorView slot_rows, TensorView slot_of_row,
                   TensorView tiles, TensorView num_tiles, TensorView workspace,
                   int64_t num_experts, int64_t tile_rows, int64_t row_divisor) {
  Checker check("permute");
  check.True(num_experts >= 1 && num_experts <= INT_MAX && tile_rows >= 1 &&
                 tile_rows <= INT_MAX && row_divisor >= 1 && row_divisor <= INT_MAX,
             "num_experts, tile_rows and row_divisor must be positive");
  check.Tensor("ids", ids, {kInt32}, {kAny, kAny});
  const int64_t num_rows = ids.numel();
  check.Tensor("slot_rows", slot_rows, {kInt32}, {num_rows});
  check.Tensor("slot_of_row", slot_of_row, {kInt32}, {ids.size(0), ids.size(1)});
  check.Tensor("tiles", tiles, {kInt32}, {kAny, 4});
  // Each expert may have one tile that is not full, and no tile is empty.
  const int64_t max_tiles = std::min(num_rows, num_experts + num_rows / tile_rows);
  check.True(tiles.size(0) >= max_tiles, "tiles must have at least " +
                                             std::to_string(max_tiles) + " rows, got " +
                                             ToString(tiles));
  check.Tensor("num_tiles", num_tiles, {kInt32}, {1});
  check.Tensor("workspace", workspace, {kUint8}, {kAny});
  const int64_t bytes = PermuteWorkspace(num_rows, num_experts);
  check.True(workspace.size(0) >= bytes, "workspace must have at least " +
                                             std::to_string(bytes) + " bytes, got " +
                                             ToString(workspace));
  const Permute p{Data<int>(ids),
                  static_cast<int>(ids.size(0)),
                  static_cast<int>(ids.size(1)),
                  static_cast<int>(num_experts),
                  static_cast<int>(tile_rows),
                  static_cast<int>(row_divisor),
                  Data<int>(slot_rows),
                  Data<int>(slot_of_row),
                  Data<Tile>(tiles),
                  Data<int>(num_tiles),
                  workspace.data_ptr()};
  Launch(check, num_tiles.numel(), [&](cudaStream_t s) { return LaunchPermute(p, s); });
}

void ExportCombine(TensorView rows, TensorView slot_of_row,
                   Optional<TensorView> weights, TensorView out) {
  Checker check("combine");
  check.Tensor("rows", rows, {kBf16}, {kAny, kAny});
  check.Tensor("slot_of_row", slot_of_row, {kInt32}, {kAny, kAny});
  const int64_t num_tokens = slot_of_row.size(0);
  const int64_t top_k = slot_of_row.size(1);
  if (weights.has_value())
    check.Tensor("weights", *weights, {kF32}, {num_tokens, top_k});
  check.Tensor("out", out, {kBf16}, {num_tokens, rows.size(1)});
  const Combine c{rows.data_ptr(),
                  Data<int>(slot_of_row),
                  Data<float>(weights),
                  out.data_ptr(),
                  static_cast<int>(num_tokens),
                  static_cast<int>(top_k),
                  static_cast<int>(rows.size(1))};
  Launch(check, out.numel(), [&](cudaStream_t s) { return LaunchCombine(c, s); });
}

void ExportRoute(TensorView logits, Optional<TensorView> bias, TensorView ids,
                 TensorView weights, int64_t scores, int64_t num_groups,
                 int64_t topk_groups, bool renormalize, double scaling_factor) {
  Checker check("route");
  check.True(scores >= 0 && scores <= static_cast<int>(Scores::kSqrtSoftplus),
             "scores must be the number of one");
  check.Tensor("logits", logits, {kBf16, kF32}, {kAny, kAny});
  const int64_t num_tokens = logits.size(0);
  const int64_t num_experts = logits.size(1);
  check.True(num_groups >= 1 && topk_groups >= 1 && topk_groups <= num_groups &&
                 num_experts % num_groups == 0,
             "num_groups must divide the experts, and topk_groups be in "
             "[1, num_groups]");
  const bool bias_per_token = bias.has_value() && (*bias).ndim() == 2;
  if (bias_per_token) {
    check.Tensor("bias", *bias, {kF32}, {num_tokens, num_experts});
  } else if (bias.has_value()) {
    check.Tensor("bias", *bias, {kF32}, {num_experts});
  }
  check.Tensor("ids", ids, {kInt32}, {num_tokens, kAny});
  check.Tensor("weights", weights, {kF32}, {num_tokens, ids.size(1)});
  const Route r{logits.data_ptr(),
                logits.dtype() == kF32,
                Data<float>(bias),
                bias_per_token,
                static_cast<int>(num_tokens),
                static_cast<int>(num_experts),
                static_cast<int>(ids.size(1)),
                static_cast<Scores>(scores),
                static_cast<int>(num_groups),
                static_cast<int>(topk_groups),
                renormalize,
                static_cast<float>(scaling_factor),
                Data<int>(ids),
                Data<float>(weights)};
  Launch(check, ids.numel(), [&](cudaStream_t s) { return LaunchRoute(r, s); });
}

void ExportQuantize(TensorView x, TensorView elements, TensorView scales) {
  Checker check("quantize");
  check.True(x.ndim() >= 1 && x.size(-1) % 32 == 0,
             "x must have a multiple of 32 columns, got " + ToString(x));
  std::vector<int64_t> shape(x.shape().begin(), x.shape().end());
  check.Tensor("x", x, {kBf16}, shape);
  check.Tensor("elements", elements, {kE4m3, kUint8}, shape);
  shape.back() /= 32;
  check.Tensor("scales", scales, {kE8m0, kUint8}, shape);
  const Quantize q{x.data_ptr(), x.numel() / 32, Data<uint8_t>(elements),
                   Data<uint8_t>(scales)};
  Launch(check, x.numel(), [&](cudaStream_t s) { return LaunchQuantize(q, s); });
}

}  // namespace
}  // namespace jmx8

TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm, jmx8::ExportGemm);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(permute_workspace, jmx8::ExportPermuteWorkspace);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(permute, jmx8::ExportPermute);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(combine, jmx8::ExportCombine);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(route, jmx8::ExportRoute);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(quantize, jmx8::ExportQuantize);

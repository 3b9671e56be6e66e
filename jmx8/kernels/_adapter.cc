// Turns the flat buffers of an XLA custom call into a kernel's own argument list.
//
// `bind(function, plan)` returns a function of all operands and all outputs, in that
// order, that calls `function` with the arguments that `plan` lists. Each entry of the
// plan is an array: [0, i] is buffer i; [1, value] is a constant, None included;
// [2, i, j, ...] is the array of buffers i, j, ... What `function` returns is dropped:
// the bridge refuses a result that shares memory with a buffer.

#include <tvm/ffi/tvm_ffi.h>

#include <utility>
#include <vector>

namespace {

namespace ffi = tvm::ffi;

constexpr int kMaxArguments = 64;

enum Kind : int64_t { kBuffer = 0, kConstant = 1, kBuffers = 2 };

struct Argument {
  int64_t kind;
  std::vector<int64_t> buffers;
  ffi::Any constant;
};

class BoundFunction {
 public:
  BoundFunction(ffi::Function function, ffi::Array<ffi::Array<ffi::Any>> plan)
      : function_(std::move(function)) {
    TVM_FFI_CHECK(plan.size() <= kMaxArguments, ValueError)
        << "at most " << kMaxArguments << " arguments, got " << plan.size();
    for (const ffi::Array<ffi::Any>& entry : plan) {
      Argument argument{entry[0].cast<int64_t>(), {}, nullptr};
      if (argument.kind == kConstant) {
        argument.constant = entry[1];
      } else {
        for (size_t i = 1; i < entry.size(); ++i) {
          argument.buffers.push_back(entry[i].cast<int64_t>());
          num_buffers_ = std::max(num_buffers_, argument.buffers.back() + 1);
        }
      }
      plan_.push_back(std::move(argument));
    }
  }

  void operator()(const ffi::AnyView* buffers, int32_t num_buffers, ffi::Any*) const {
    TVM_FFI_CHECK(num_buffers >= num_buffers_, ValueError)
        << "expected at least " << num_buffers_ << " buffers, got " << num_buffers;
    ffi::AnyView arguments[kMaxArguments];
    std::vector<ffi::Any> arrays;
    arrays.reserve(plan_.size());  // views of its elements must stay valid
    int32_t count = 0;
    for (const Argument& argument : plan_) {
      if (argument.kind == kConstant) {
        arguments[count++] = argument.constant;
      } else if (argument.kind == kBuffer) {
        arguments[count++] = buffers[argument.buffers[0]];
      } else {
        ffi::Array<ffi::Any> array;
        for (int64_t i : argument.buffers) array.push_back(buffers[i]);
        arrays.emplace_back(std::move(array));
        arguments[count++] = arrays.back();
      }
    }
    ffi::Any result;
    function_.CallPacked(arguments, count, &result);
  }

 private:
  ffi::Function function_;
  std::vector<Argument> plan_;
  int64_t num_buffers_ = 0;
};

ffi::Function Bind(ffi::Function function, ffi::Array<ffi::Array<ffi::Any>> plan) {
  return ffi::Function::FromPacked(
      [bound = BoundFunction(std::move(function), std::move(plan))](
          const ffi::AnyView* args, int32_t num_args, ffi::Any* result) {
        bound(args, num_args, result);
      });
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(bind, Bind);

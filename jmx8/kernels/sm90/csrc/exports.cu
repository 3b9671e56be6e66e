// The library's TVM-FFI functions: what kernels.h declares, of tensors whose dtypes and
// shapes are checked here.

#include <algorithm>

#include "checker.h"
#include "kernels.h"

namespace jmx8 {
namespace {

// What an expert's matmul has in place of a row of x for each row of the result.
struct Slots {
  Optional<TensorView> slot_rows, tiles, num_tiles;
};

struct ActivationArguments {
  int64_t number;
  double alpha, beta, limit;
};

// Checks slot_rows, tiles and num_tiles against each other and the rows of x and out.
void SetSlots(Checker& check, const Slots& slots, Gemm& g) {
  check.True(slots.tiles.has_value() == slots.num_tiles.has_value(),
             "tiles and num_tiles belong together");
  if (slots.tiles.has_value()) {
    check.Tensor("tiles", *slots.tiles, {kInt32}, {kAny, 4});
    check.Tensor("num_tiles", *slots.num_tiles, {kInt32}, {1});
    g.max_tiles = (*slots.tiles).size(0);
  }
  if (slots.slot_rows.has_value()) {
    check.True(slots.tiles.has_value(), "slot_rows must be None without tiles");
    check.Tensor("slot_rows", *slots.slot_rows, {kInt32}, {g.num_slots});
  } else {
    check.True(g.num_slots == g.num_x_rows, "out must have the rows of x, which are " +
                                                std::to_string(g.num_x_rows) +
                                                ", got " + std::to_string(g.num_slots));
  }
  g.slot_rows = Data<int>(slots.slot_rows);
  g.tiles = Data<Tile>(slots.tiles);
  g.num_tiles = Data<int>(slots.num_tiles);
}

// Checks the tensors of a matmul against each other. A wide result has more columns
// than are written, or as many.
Gemm MakeGemm(Checker& check, TensorView x, TensorView w, TensorView scales,
              Optional<TensorView> bias, TensorView out, bool is_wide,
              const Slots& slots, const ActivationArguments& activation) {
  check.True(activation.number >= 0 &&
                 activation.number <= static_cast<int>(Activation::kRelu2),
             "activation must be the number of one");
  Gemm g{};
  g.activation = static_cast<Activation>(activation.number);
  g.alpha = activation.alpha;
  g.beta = activation.beta;
  g.limit = activation.limit;
  const bool has_tiles = slots.tiles.has_value();
  check.Tensor("x", x, {kBf16}, {kAny, kAny});
  const int64_t k = x.size(1);
  check.True(k % 32 == 0, "x must have a multiple of 32 columns");
  // The axes of one weight matrix, and of each expert's.
  std::vector<int64_t> axes(has_tiles ? 2 : 1, kAny);
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
  const bool gated = IsGated(g.activation);
  check.True(!gated || n % 2 == 0,
             "w must have an even number of rows for a gated activation");
  const int64_t columns = gated ? n / 2 : n;
  check.Tensor("out", out, {kBf16, kF32}, {kAny, is_wide ? kAny : columns});
  check.True(out.size(1) >= columns, "out must have at least " +
                                         std::to_string(columns) + " columns, got " +
                                         ToString(out));
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
  g.num_experts = has_tiles ? axes.front() : 1;
  g.out_pitch = out.size(1);
  SetSlots(check, slots, g);
  return g;
}

GemmConfig MakeConfig(const Checker& check, int64_t kernel, int64_t tile_rows,
                      int64_t variant, int64_t split_k) {
  check.True(tile_rows >= 1 && tile_rows <= INT_MAX && split_k >= 1 &&
                 split_k <= INT_MAX && variant >= 0 && variant <= INT_MAX,
             "tile_rows and split_k must be positive, and variant not negative");
  check.True(kernel == 0 || kernel == 1, "kernel must be 0 (mma) or 1 (wgmma)");
  return {static_cast<int>(kernel), static_cast<int>(tile_rows),
          static_cast<int>(variant), static_cast<int>(split_k)};
}

const char* LaunchGemm(const Gemm& g, const GemmConfig& config, cudaStream_t stream) {
  return config.kernel == 0 ? LaunchGemmMma(g, config, stream)
                            : LaunchGemmWgmma(g, config, stream);
}

void ExportGemm(TensorView x, TensorView w, TensorView scales,
                Optional<TensorView> bias, TensorView out,
                Optional<TensorView> slot_rows, Optional<TensorView> tiles,
                Optional<TensorView> num_tiles, int64_t activation, double alpha,
                double beta, double limit, int64_t kernel, int64_t tile_rows,
                int64_t variant, int64_t split_k) {
  Checker check("gemm");
  const GemmConfig config = MakeConfig(check, kernel, tile_rows, variant, split_k);
  const Gemm g = MakeGemm(check, x, w, scales, bias, out, false,
                          {slot_rows, tiles, num_tiles},
                          {activation, alpha, beta, limit});
  Launch(check, out.numel(),
         [&](cudaStream_t stream) { return LaunchGemm(g, config, stream); });
}

Permute MakePermute(Checker& check, TensorView ids, TensorView slot_rows,
                    TensorView slot_of_row, TensorView tiles, TensorView num_tiles,
                    int64_t num_experts, int64_t tile_rows, int64_t row_divisor) {
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
  return {Data<int>(ids),
          static_cast<int>(ids.size(0)),
          static_cast<int>(ids.size(1)),
          static_cast<int>(num_experts),
          static_cast<int>(tile_rows),
          static_cast<int>(row_divisor),
          Data<int>(slot_rows),
          Data<int>(slot_of_row),
          Data<Tile>(tiles),
          Data<int>(num_tiles)};
}

void ExportPermute(TensorView ids, TensorView slot_rows, TensorView slot_of_row,
                   TensorView tiles, TensorView num_tiles, int64_t num_experts,
                   int64_t tile_rows, int64_t row_divisor) {
  Checker check("permute");
  const Permute p = MakePermute(check, ids, slot_rows, slot_of_row, tiles, num_tiles,
                                num_experts, tile_rows, row_divisor);
  Launch(check, num_tiles.numel(), [&](cudaStream_t s) { return LaunchPermute(p, s); });
}

Combine MakeCombine(Checker& check, TensorView rows, TensorView slot_of_row,
                    Optional<TensorView> weights, TensorView out) {
  const int64_t num_tokens = slot_of_row.size(0);
  const int64_t top_k = slot_of_row.size(1);
  check.Tensor("rows", rows, {kBf16}, {num_tokens * top_k, kAny});
  if (weights.has_value()) {
    check.Tensor("weights", *weights, {kF32}, {num_tokens, top_k});
  }
  check.Tensor("out", out, {kBf16}, {num_tokens, rows.size(1)});
  return {rows.data_ptr(),
          Data<int>(slot_of_row),
          Data<float>(weights),
          out.data_ptr(),
          static_cast<int>(num_tokens),
          static_cast<int>(top_k),
          static_cast<int>(rows.size(1)),
          true};
}

void ExportMix(TensorView x, TensorView out) {
  Checker check("mix");
  check.Tensor("x", x, {kBf16}, {kAny, kAny});
  check.Tensor("out", out, {kBf16}, {x.size(0), x.size(1)});
  check.True(x.size(1) % 64 == 0, "x must have a multiple of 64 columns");
  const Mix m{x.data_ptr(), out.data_ptr(), x.numel(), false};
  Launch(check, out.numel(), [&](cudaStream_t s) { return LaunchMix(m, s); });
}

// Lets both matmuls have mixed rows: x is mixed to where the second result will be.
Mix MixRows(const Checker& check, const GemmConfig& first_config,
            const GemmConfig& second_config, TensorView x, TensorView rows,
            Gemm& first, Gemm& second) {
  check.True(TakesMixed(second_config) && first_config.split_k == 1,
             "a first matmul of mixed rows needs split_k 1, and a second one of them");
  check.True(first.k % 64 == 0 && second.k % 64 == 0,
             "x and hidden must have multiples of 64 columns to be mixed");
  check.True(rows.numel() >= x.numel(), "rows must have room for x");
  first.x = rows.data_ptr();
  return {x.data_ptr(), rows.data_ptr(), x.numel(), true};
}

// A whole layer of experts. One call, so that each kernel can start while the one
// before it ends: weights are on their way before the rows that they multiply are there.
void ExportMoe(TensorView x, TensorView w13, TensorView w13_scales,
               Optional<TensorView> w13_bias, TensorView w2, TensorView w2_scales,
               Optional<TensorView> w2_bias, TensorView ids,
               Optional<TensorView> weights, TensorView out, TensorView slot_rows,
               TensorView slot_of_row, TensorView tiles, TensorView num_tiles,
               TensorView hidden, TensorView rows, int64_t row_divisor,
               int64_t activation, double alpha, double beta, double limit,
               int64_t tile_rows, int64_t first_kernel, int64_t first_variant,
               int64_t first_split_k, int64_t second_kernel, int64_t second_variant,
               int64_t second_split_k) {
  Checker check("moe");
  const GemmConfig first_config =
      MakeConfig(check, first_kernel, tile_rows, first_variant, first_split_k);
  const GemmConfig second_config =
      MakeConfig(check, second_kernel, tile_rows, second_variant, second_split_k);
  Checker of_first("moe, first matmul"), of_second("moe, second matmul");
  Gemm first = MakeGemm(of_first, x, w13, w13_scales, w13_bias, hidden, true,
                        {slot_rows, tiles, num_tiles}, {activation, alpha, beta, limit});
  Gemm second = MakeGemm(of_second, hidden, w2, w2_scales, w2_bias, rows, false,
                         {std::nullopt, tiles, num_tiles}, {0, 0, 0, 0});
  check.True(first.num_experts == second.num_experts,
             "w13 and w2 must have as many experts");
  const Permute permute =
      MakePermute(check, ids, slot_rows, slot_of_row, tiles, num_tiles,
                  first.num_experts, tile_rows, row_divisor);
  const Combine combine = MakeCombine(check, rows, slot_of_row, weights, out);
  const bool mixes = TakesMixed(first_config);
  check.True(mixes || !TakesMixed(second_config),
             "a second matmul of mixed rows needs a first one of them");
  Mix mix{};
  if (mixes) mix = MixRows(check, first_config, second_config, x, rows, first, second);
  first.starts_early = second.starts_early = true;
  const bool is_padded =
      first.out_pitch > (IsGated(first.activation) ? first.n / 2 : first.n);
  of_first.Stream();
  of_second.Stream();
  Launch(check, out.numel(), [&](cudaStream_t s) -> const char* {
    if (is_padded) {  // what is multiplied by zeros must be finite
      const size_t bytes = hidden.numel() * sizeof(uint16_t);
      const cudaError_t error = cudaMemsetAsync(hidden.data_ptr(), 0, bytes, s);
      if (error != cudaSuccess) return cudaGetErrorString(error);
    }
    const char* problem = LaunchPermute(permute, s);
    if (!problem && mixes) problem = LaunchMix(mix, s);
    if (!problem) problem = LaunchGemm(first, first_config, s);
    if (!problem) problem = LaunchGemm(second, second_config, s);
    return problem ? problem : LaunchCombine(combine, s);
  });
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
TVM_FFI_DLL_EXPORT_TYPED_FUNC(permute, jmx8::ExportPermute);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(mix, jmx8::ExportMix);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(moe, jmx8::ExportMoe);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(route, jmx8::ExportRoute);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(quantize, jmx8::ExportQuantize);

// What the kernels compute, and the functions that launch them. No function here
// allocates, synchronizes or keeps state; each returns nullptr or what is wrong.
//
// Each kernel's file states how many registers any instance of it may take, in a line
// of its own: "// Registers: NameOfKernel <= 168", the plain name of the __global__
// function. The tests compile everything and fail on a kernel that takes more, that
// states nothing, or that spills.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace jmx8 {

// As in xla_activation.py. All but kNone and kRelu2 halve their input: rows [0, n / 2)
// of a weight are the gate's, rows [n / 2, n) those of up.
enum class Activation : int { kNone, kSilu, kGelu, kGeluTanh, kSwiGluOai, kRelu2 };

constexpr bool IsGated(Activation a) {
  return a != Activation::kNone && a != Activation::kRelu2;
}

// Some of an expert's rows, which one column of thread blocks works on.
struct Tile {
  int expert;
  int first_slot;
  int num_slots;
  int unused;
};

// out[slot] = activation(x[row of slot] @ widen(w[expert of slot]).T + bias[expert]).
struct Gemm {
  const void* x;          // bf16 [num_x_rows, k]
  const uint8_t* w;       // e4m3 [num_experts, n, k]
  const uint8_t* scales;  // e8m0 [num_experts, n, k / 32]
  const void* bias;       // [num_experts, n] or nullptr
  void* out;              // [num_slots, out_pitch]; n columns, n / 2 if gated
  bool bias_is_f32;       // else bf16
  bool out_is_f32;        // else bf16
  int num_x_rows;
  int num_slots;          // a bound, if there are tiles
  int n, k, num_experts, out_pitch;
  // With experts; nullptr for one weight matrix, whose slots are the rows of x.
  const int* slot_rows;   // [num_slots] row of x that a slot reads; nullptr: its own
  const Tile* tiles;      // [max_tiles]
  const int* num_tiles;   // [1]
  int max_tiles;
  Activation activation;
  float alpha, beta, limit;  // of kSwiGluOai; limit is infinite for none
  // Whether it may start before the kernel that was launched before it has ended. That
  // one makes slot_rows and tiles if there are slot_rows, else x and nothing else.
  bool starts_early;
};

// How a Gemm is computed. Kernels refuse what they were not compiled for.
struct GemmConfig {
  int kernel;     // 0: mma.sync (gemm_mma.cu), 1: wgmma (gemm_wgmma.cu)
  int tile_rows;  // rows of x that a thread block works on: the most a Tile may have
  int variant;    // the kernel's own
  int split_k;    // thread blocks that share one output tile, each with a part of k
};

// Whether the columns of x must be mixed. Those of the result are, too, if the rows of
// x are gathered: it is what another such matmul takes.
inline bool TakesMixed(const GemmConfig& config) {
  return config.kernel == 1 && config.variant == 8;
}

const char* LaunchGemmMma(const Gemm&, const GemmConfig&, cudaStream_t);
const char* LaunchGemmWgmma(const Gemm&, const GemmConfig&, cudaStream_t);

// Sorts the routed rows by expert, in the order of their flat index within one expert.
// Slots of all experts are contiguous; ids outside [0, num_experts) get none. Slots and
// tiles past the last one used are not written.
struct Permute {
  const int* ids;      // [num_tokens * top_k]
  int num_tokens, top_k, num_experts;
  int tile_rows;       // the most slots that a tile has
  int row_divisor;     // slot_rows holds the flat index divided by this: top_k for the
                       // token, 1 for the flat index itself
  int* slot_rows;      // [num_tokens * top_k]
  int* slot_of_row;    // [num_tokens * top_k], -1 for ids outside the range
  Tile* tiles;         // [max_tiles]; all but an expert's last are full
  int* num_tiles;      // [1]
};
const char* LaunchPermute(const Permute&, cudaStream_t);

// out: x with its columns mixed, see mix.cu.
struct Mix {
  const void* x;  // bf16 [num_elements], of rows of a multiple of 64
  void* out;      // the same
  int64_t num_elements;
  bool starts_early;  // before the kernel before it, which must not make x, has ended
};
const char* LaunchMix(const Mix&, cudaStream_t);

// out[t] = sum over j of weights[t, j] * rows[slot_of_row[t, j]], in float32, in the
// order of j; slots of -1 count nothing. weights nullptr: ones.
struct Combine {
  const void* rows;         // bf16 [num_slots, hidden_size]
  const int* slot_of_row;   // [num_tokens, top_k]
  const float* weights;     // [num_tokens, top_k]
  void* out;                // bf16 [num_tokens, hidden_size]
  int num_tokens, top_k, hidden_size;
  bool starts_early;        // before the kernel before it, which makes rows, has ended
};
const char* LaunchCombine(const Combine&, cudaStream_t);

// As ops/routing.py: scores, bias for the choice, groups, top-k with ties to the lower
// index, renormalization, scaling. num_experts <= 512, top_k <= 16.
enum class Scores : int { kSoftmax, kTopkSoftmax, kSigmoid, kSqrtSoftplus };
struct Route {
  const void* logits;  // [num_tokens, num_experts]
  bool logits_are_f32;  // else bf16
  const float* bias;   // [num_experts], [num_tokens, num_experts], or nullptr
  bool bias_per_token;
  int num_tokens, num_experts, top_k;
  Scores scores;
  int num_groups, topk_groups;
  bool renormalize;
  float scaling_factor;
  int* ids;            // [num_tokens, top_k]
  float* weights;      // [num_tokens, top_k]
};
const char* LaunchRoute(const Route&, cudaStream_t);

// As _mx_array.quantize, bit for bit, non-finite values included ("keep").
struct Quantize {
  const void* x;       // bf16 [num_blocks, 32]
  int64_t num_blocks;
  uint8_t* elements;   // e4m3 [num_blocks, 32]
  uint8_t* scales;     // e8m0 [num_blocks]
};
const char* LaunchQuantize(const Quantize&, cudaStream_t);

}  // namespace jmx8

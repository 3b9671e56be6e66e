// Mixes the columns of x as the products with wide loads of weights want them: of each
// 64 columns, those that a lane of a warp multiplies with four of its neighbouring
// elements of the weights come to where wgmma takes that lane's operands from. Column
// 16 c + 4 s + 2 h + e goes to 16 s + 8 h + 2 c + e (c, s < 4; h, e < 2). A thread
// makes eight columns.
//
// Registers: MixKernel <= 32

#include "kernels.h"
#include "launch.cuh"
#include "ptx.cuh"

namespace jmx8 {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    MixKernel(const uint32_t* x, uint4* out, int64_t num_vectors) {
  ptx::LetNextKernelStart();
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < num_vectors) {
    const uint32_t* from = x + i / 8 * 32 + i % 8;
    out[i] = {from[0], from[8], from[16], from[24]};
  }
  // Only so that whoever waits for this kernel waits for the one before it, too.
  if (blockIdx.x == gridDim.x - 1) ptx::WaitForKernelBefore();
}

}  // namespace

const char* LaunchMix(const Mix& m, cudaStream_t stream) {
  if (m.num_elements % 64 != 0) return "mix: rows must have a multiple of 64 columns.";
  if (!IsAligned(m.x, 16) || !IsAligned(m.out, 16)) {
    return "mix: x and out must be aligned to 16 bytes.";
  }
  const int64_t num_vectors = m.num_elements / 8;
  const int64_t blocks = CeilDiv<int64_t>(num_vectors, kThreads);
  if (blocks == 0) return nullptr;
  if (blocks > INT32_MAX) return "mix: x must have less than 2**42 elements.";
  cudaLaunchConfig_t config = {};
  config.gridDim = static_cast<unsigned>(blocks);
  config.blockDim = kThreads;
  config.stream = stream;
  cudaLaunchAttribute early = EarlyStart();
  config.attrs = &early;
  config.numAttrs = m.starts_early;
  const cudaError_t error =
      cudaLaunchKernelEx(&config, MixKernel, static_cast<const uint32_t*>(m.x),
                         static_cast<uint4*>(m.out), num_vectors);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace jmx8

// A stable counting sort of the routed rows by expert, in one launch of one thread block
// or of one cluster. Each warp owns a run of rows and counts them per expert in shared
// memory; a scan over experts, blocks and warps turns the counts into first slots; then
// each warp walks its rows once more, counting on from there.
//
// Registers: PermuteKernel <= 64

#include <cooperative_groups.h>

#include <climits>

#include "kernels.h"
#include "launch.cuh"

namespace jmx8 {
namespace {

namespace cg = cooperative_groups;

constexpr int kMaxBlocks = 8;  // the largest cluster that every Hopper GPU has
constexpr int kMaxExperts = 1024;
constexpr int kUnroll = 4;  // rows of a thread in flight
constexpr unsigned kAllLanes = ~0u;

struct PermutePlan {
  int warps;
  int blocks;
};

// In dynamic shared memory, each [num_experts].
struct Shared {
  int* counts;      // of the rows of this block; other blocks read it
  int* first_slot;  // of each expert
  int* num_slots;
  int* tile_end;    // the number of tiles of the experts up to this one
  int* next_slot;   // [num_warps, num_experts]: a warp's counts, then its next slots

  __device__ Shared(int* memory, int num_experts)
      : counts(memory),
        first_slot(counts + num_experts),
        num_slots(first_slot + num_experts),
        tile_end(num_slots + num_experts),
        next_slot(tile_end + num_experts) {}
};

size_t SharedBytes(const PermutePlan& plan, int num_experts) {
  return static_cast<size_t>(plan.warps + 4) * num_experts * sizeof(int);
}

// Counts rows [first, end) per expert.
__device__ __forceinline__ void CountRows(const Permute& p, unsigned first, unsigned end,
                                          int* counts) {
#pragma unroll kUnroll
  for (unsigned row = first + threadIdx.x % 32; row < end; row += 32) {
    const unsigned id = p.ids[row];
    if (id < p.num_experts) atomicAdd(&counts[id], 1);
  }
}

// The lanes whose id has the same lowest bits. (match.any takes a step per distinct id.)
__device__ __forceinline__ unsigned Peers(unsigned id, int num_bits) {
  unsigned peers = kAllLanes;
#pragma unroll 4
  for (int bit = 0; bit < num_bits; ++bit) {
    const bool is_set = id >> bit & 1;
    const unsigned set = __ballot_sync(kAllLanes, is_set);
    peers &= is_set ? set : ~set;
  }
  return peers;
}

// Gives rows [first, end) their slots, counting on from `next` of their experts.
__device__ __forceinline__ void PlaceRows(const Permute& p, unsigned first, unsigned end,
                                          int* next) {
  const unsigned lane = threadIdx.x % 32;
  const int num_bits = 32 - __clz(p.num_experts);  // num_experts: no expert
  for (unsigned begin = first; begin < end; begin += 32 * kUnroll) {
    unsigned id[kUnroll], peers[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const unsigned row = begin + 32 * i + lane;
      id[i] = p.num_experts;
      if (row < end) id[i] = min(id[i], static_cast<unsigned>(p.ids[row]));
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) peers[i] = Peers(id[i], num_bits);
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const unsigned row = begin + 32 * i + lane;
      const int before = __popc(peers[i] & ((1u << lane) - 1));
      const bool has_slot = id[i] < p.num_experts;
      const int slot = has_slot ? next[id[i]] + before : -1;
      __syncwarp();
      if (has_slot && before == 0) next[id[i]] = slot + __popc(peers[i]);
      __syncwarp();
      if (row < end) p.slot_of_row[row] = slot;
      if (has_slot) p.slot_rows[slot] = row / p.row_divisor;
    }
  }
}

// The sum of the values of the threads before this one.
__device__ __forceinline__ uint64_t SumBefore(uint64_t value) {
  __shared__ uint64_t warp_sums[32];
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint64_t sum = value;
#pragma unroll
  for (int delta = 1; delta < 32; delta *= 2) {
    const uint64_t other = __shfl_up_sync(kAllLanes, sum, delta);
    if (lane >= delta) sum += other;
  }
  if (lane == 31) warp_sums[warp] = sum;
  __syncthreads();
  const uint64_t other = lane < warp ? warp_sums[lane] : 0;
  const unsigned low = __reduce_add_sync(kAllLanes, static_cast<unsigned>(other));
  const unsigned high = __reduce_add_sync(kAllLanes, static_cast<unsigned>(other >> 32));
  return sum - value + (static_cast<uint64_t>(high) << 32 | low);
}

// Turns the warps' counts of this thread's expert into their first slots.
template <int kWarps>
__device__ __forceinline__ void PlaceExpert(const Permute& p, const Shared& shared,
                                            const cg::cluster_group& cluster) {
  const int expert = threadIdx.x;
  const bool exists = expert < p.num_experts;
  int counts[kWarps], total = 0, before = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    counts[i] = exists ? shared.next_slot[i * p.num_experts + expert] : 0;
    total += counts[i];
  }
  if (cluster.num_blocks() > 1) {
    if (exists) shared.counts[expert] = total;
    cluster.sync();
    total = 0;
#pragma unroll
    for (unsigned i = 0; i < kMaxBlocks; ++i) {
      if (!exists || i >= cluster.num_blocks()) continue;
      const int count = cluster.map_shared_rank(shared.counts, i)[expert];
      if (i < cluster.block_rank()) before += count;
      total += count;
    }
  }
  const unsigned tiles = CeilDiv(total, p.tile_rows);
  const uint64_t sums = SumBefore(static_cast<uint64_t>(tiles) << 32 | total);
  if (!exists) return;
  int next = static_cast<int>(sums) + before;
  shared.first_slot[expert] = static_cast<int>(sums);
  shared.num_slots[expert] = total;
  shared.tile_end[expert] = static_cast<int>(sums >> 32) + tiles;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    shared.next_slot[i * p.num_experts + expert] = next;
    next += counts[i];
  }
}

__device__ __forceinline__ Tile MakeTile(const Permute& p, const Shared& shared,
                                         int index) {
  int low = 0, high = p.num_experts - 1;  // the first expert whose tiles end after index
  while (low < high) {
    const int middle = (low + high) / 2;
    if (shared.tile_end[middle] > index) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  const int num_slots = shared.num_slots[low];
  const int tiles = CeilDiv(num_slots, p.tile_rows);
  const int nth = index - (shared.tile_end[low] - tiles);
  const int size = num_slots / tiles, larger = num_slots % tiles;
  return {low, shared.first_slot[low] + nth * size + min(nth, larger),
          size + (nth < larger), 0};
}

template <int kWarps>
__global__ void __launch_bounds__(32 * kWarps) PermuteKernel(const Permute p) {
  extern __shared__ int memory[];
  const cg::cluster_group cluster = cg::this_cluster();
  const Shared shared(memory, p.num_experts);
  const unsigned num_rows = p.num_tokens * p.top_k;
  const unsigned num_threads = cluster.num_blocks() * (32 * kWarps);
  const unsigned thread = cluster.block_rank() * (32 * kWarps) + threadIdx.x;
  const unsigned rows_per_warp = 32 * CeilDiv(num_rows, num_threads);
  const unsigned first = thread / 32 * rows_per_warp;
  const unsigned end = min(first + rows_per_warp, num_rows);
  int* next = shared.next_slot + threadIdx.x / 32 * p.num_experts;

  for (int i = threadIdx.x % 32; i < p.num_experts; i += 32) next[i] = 0;
  __syncwarp();
  CountRows(p, first, end, next);
  __syncthreads();
  PlaceExpert<kWarps>(p, shared, cluster);
  __syncthreads();
  PlaceRows(p, first, end, next);
  const int num_tiles = shared.tile_end[p.num_experts - 1];
  for (unsigned i = thread; i < num_tiles; i += num_threads) {
    p.tiles[i] = MakeTile(p, shared, i);
  }
  if (thread == 0) *p.num_tiles = num_tiles;
  if (cluster.num_blocks() > 1) cluster.sync();  // others may still read the counts
}

PermutePlan MakePlan(int num_rows, int num_experts) {
  PermutePlan plan{8, 1};
  while (plan.warps * 32 < num_experts) plan.warps *= 2;
  while (plan.blocks < kMaxBlocks && plan.blocks * plan.warps * 32 * 2 < num_rows) {
    plan.blocks *= 2;
  }
  return plan;
}

template <int kWarps>
const char* LaunchPlan(const Permute& p, const PermutePlan& plan, cudaStream_t stream) {
  const size_t bytes = SharedBytes(plan, p.num_experts);
  const auto kernel = PermuteKernel<kWarps>;
  cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(plan.blocks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = plan.blocks;
  config.blockDim = 32 * kWarps;
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = plan.blocks > 1;
  error = cudaLaunchKernelEx(&config, kernel, p);
  return error == cudaSuccess ? LaunchError() : cudaGetErrorString(error);
}

const char* LaunchPlan(const Permute& p, const PermutePlan& plan, cudaStream_t stream) {
  if (plan.warps == 8) return LaunchPlan<8>(p, plan, stream);
  if (plan.warps == 16) return LaunchPlan<16>(p, plan, stream);
  return LaunchPlan<32>(p, plan, stream);
}

}  // namespace

// The kernel needs none.
size_t PermuteWorkspace(int, int) { return 0; }

const char* LaunchPermute(const Permute& p, cudaStream_t stream) {
  const int64_t num_rows = static_cast<int64_t>(p.num_tokens) * p.top_k;
  if (num_rows > INT_MAX) return "permute: there must be less than 2**31 rows.";
  if (p.num_experts < 1 || p.num_experts > kMaxExperts) {
    return "permute: the number of experts must be in [1, 1024].";
  }
  if (p.tile_rows < 1 || p.row_divisor < 1) {
    return "permute: tile_rows and row_divisor must be positive.";
  }
  return LaunchPlan(p, MakePlan(num_rows, p.num_experts), stream);
}

}  // namespace jmx8

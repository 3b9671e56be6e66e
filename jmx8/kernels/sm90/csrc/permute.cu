// A stable counting sort of the routed rows by expert, in one launch of one thread
// block or of one cluster. Each warp owns a run of rows and counts them per expert in
// shared memory; a scan over experts, blocks and warps turns the counts into first
// slots; then each warp walks its rows once more, counting on from there.
//
// Registers: PermuteKernel <= 64

#include <climits>

#include "kernels.h"
#include "launch.cuh"
#include "ptx.cuh"

namespace jmx8 {
namespace {

constexpr int kMaxBlocks = 8;  // the largest cluster that every Hopper GPU has
constexpr int kMaxExperts = 1024;
constexpr unsigned kAllLanes = ~0u;

// n / divisor for n < 2**31, as a product.
struct Divisor {
  unsigned factor;
  int shift;

  explicit Divisor(unsigned divisor) : shift(31) {
    while ((1ull << (shift - 31)) < divisor) ++shift;
    factor = ((1ull << shift) + divisor - 1) / divisor;
  }
  __device__ __forceinline__ unsigned Divide(unsigned n) const {
    return static_cast<uint64_t>(n) * factor >> shift;
  }
};

struct Plan {
  int warps;   // of a block: enough for a thread per expert
  int blocks;  // of the cluster
  int rows_per_thread;
  Divisor tile_rows, row_divisor;
};

// In dynamic shared memory, each [num_experts].
struct Shared {
  int* first_slot;
  int* num_slots;
  int* tile_end;      // the number of tiles of the experts up to this one
  int* next_slot;     // [warps, num_experts]: a warp's counts, then its next slots
  int* block_counts;  // [blocks, num_experts], if there are several

  __device__ Shared(int* memory, int warps, int num_experts)
      : first_slot(memory),
        num_slots(first_slot + num_experts),
        tile_end(num_slots + num_experts),
        next_slot(tile_end + num_experts),
        block_counts(next_slot + warps * num_experts) {}
};

size_t SharedBytes(const Plan& plan, int num_experts) {
  return static_cast<size_t>(3 + plan.warps + plan.blocks) * num_experts * sizeof(int);
}

// Writes to another block of the cluster and counts the bytes on its barrier.
__device__ __forceinline__ void StoreRemote(uint32_t address, int value,
                                            uint32_t barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.s32 "
      "[%0], %1, [%2];" ::"r"(address),
      "r"(value), "r"(barrier)
      : "memory");
}

// The rows of a warp, in steps of 32. A row without an expert has id num_experts.
struct Rows {
  const int* ids;
  unsigned first, end;  // of this lane's; of the warp's
  unsigned num_experts;

  __device__ __forceinline__ unsigned Id(int step) const {
    const unsigned row = first + 32 * step;
    if (row >= end) return num_experts;
    return min(static_cast<unsigned>(ids[row]), num_experts);
  }
};

__device__ __forceinline__ void CountRows(const Rows& rows, int steps, int* counts) {
  constexpr int kInFlight = 4;
#pragma unroll 1
  for (int step = 0; step < steps; step += kInFlight) {
    unsigned id[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) id[i] = rows.Id(step + i);
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (id[i] < rows.num_experts) atomicAdd(&counts[id[i]], 1);
    }
  }
}

// The lanes of the same id. (match.any takes a step per distinct id.)
template <int kBits>
__device__ __forceinline__ unsigned Peers(unsigned id, bool is_valid) {
  unsigned peers = __ballot_sync(kAllLanes, is_valid);
#pragma unroll
  for (int bit = 0; bit < kBits; ++bit) {
    const bool is_set = id >> bit & 1;
    const unsigned set = __ballot_sync(kAllLanes, is_set);
    peers &= is_set ? set : ~set;
  }
  return peers;
}

// Gives the rows their slots, counting on from `next` of their experts.
template <int kBits>
__device__ __forceinline__ void PlaceRows(const Permute& p, const Plan& plan,
                                          const Rows& rows, int* next) {
  const unsigned earlier_lanes = (1u << threadIdx.x % 32) - 1;
  unsigned next_id = rows.Id(0);
  for (int step = 0; step < plan.rows_per_thread; ++step) {
    const unsigned id = next_id, row = rows.first + 32 * step;
    next_id = rows.Id(step + 1);
    const bool is_valid = id < rows.num_experts;
    const unsigned peers = Peers<kBits>(id, is_valid);
    const int before = __popc(peers & earlier_lanes);
    const int slot = is_valid ? next[id] + before : -1;
    __syncwarp();
    if (is_valid && before == 0) next[id] = slot + __popc(peers);
    __syncwarp();
    if (row < rows.end) p.slot_of_row[row] = slot;
    if (is_valid) p.slot_rows[slot] = plan.row_divisor.Divide(row);
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
  const unsigned low_word = other, high_word = other >> 32;
  const unsigned low = __reduce_add_sync(kAllLanes, low_word);
  const unsigned high = __reduce_add_sync(kAllLanes, high_word);
  return sum - value + (static_cast<uint64_t>(high) << 32 | low);
}

// Sends an expert's count to all blocks, and waits for theirs. Returns the sum of the
// blocks before this one, and makes the count that of all.
__device__ __forceinline__ int SumBlocks(const Permute& p, const Plan& plan,
                                         int* block_counts, uint32_t barrier,
                                         int& count) {
  const int rank = ptx::ClusterRank(), expert = threadIdx.x;
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  if (expert >= p.num_experts) return 0;
  const uint32_t own = ptx::SharedAddress(block_counts + rank * p.num_experts + expert);
#pragma unroll
  for (int i = 0; i < kMaxBlocks; ++i) {
    if (i >= plan.blocks) break;
    StoreRemote(ptx::MapShared(own, i), count, ptx::MapShared(barrier, i));
  }
  ptx::BarrierWait(barrier, 0);
  int before = 0;
  count = 0;
#pragma unroll
  for (int i = 0; i < kMaxBlocks; ++i) {
    if (i >= plan.blocks) break;
    if (i == rank) before = count;
    count += block_counts[i * p.num_experts + expert];
  }
  return before;
}

// Turns the warps' counts of this thread's expert into their first slots.
template <int kWarps>
__device__ __forceinline__ void PlaceExpert(const Permute& p, const Plan& plan,
                                            const Shared& shared, uint32_t barrier) {
  const int expert = threadIdx.x;
  const bool exists = expert < p.num_experts;
  int* counts = shared.next_slot + expert;
  int total = 0, before = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) total += exists ? counts[i * p.num_experts] : 0;
  if (plan.blocks > 1) before = SumBlocks(p, plan, shared.block_counts, barrier, total);
  const unsigned tiles = total == 0 ? 0 : plan.tile_rows.Divide(total - 1) + 1;
  const uint64_t sums = SumBefore(static_cast<uint64_t>(tiles) << 32 | total);
  if (!exists) return;
  int next = static_cast<int>(sums) + before;
  shared.first_slot[expert] = static_cast<int>(sums);
  shared.num_slots[expert] = total;
  shared.tile_end[expert] = static_cast<int>(sums >> 32) + tiles;
  constexpr int kBatch = 8;  // read before the first is overwritten
#pragma unroll
  for (int first = 0; first < kWarps; first += kBatch) {
    int count[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) count[i] = counts[(first + i) * p.num_experts];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      counts[(first + i) * p.num_experts] = next;
      next += count[i];
    }
  }
}

// As a Tile.
__device__ __forceinline__ int4 MakeTile(const Permute& p, const Shared& shared,
                                         int index) {
  // Finds the first expert whose tiles end after index.
  int low = 0, high = p.num_experts - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (shared.tile_end[middle] > index) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  const int first_tile = low == 0 ? 0 : shared.tile_end[low - 1];
  const int before = (index - first_tile) * p.tile_rows;
  return {low, shared.first_slot[low] + before,
          min(p.tile_rows, shared.num_slots[low] - before), 0};
}

// There are at most 32 * kWarps = 2**kBits experts.
template <int kWarps, int kBits>
__global__ void __launch_bounds__(32 * kWarps)
    PermuteKernel(const Permute p, const Plan plan) {
  static_assert(1 << kBits == 32 * kWarps);
  extern __shared__ int memory[];
  __shared__ uint64_t barrier_memory;
  const Shared shared(memory, kWarps, p.num_experts);
  const uint32_t barrier = ptx::SharedAddress(&barrier_memory);
  if (plan.blocks > 1) {
    if (threadIdx.x == 0) {
      ptx::BarrierInit(barrier, 1);
      ptx::FenceBarrierInit();
      ptx::BarrierArriveExpect(barrier, plan.blocks * p.num_experts * sizeof(int));
    }
    __syncwarp();
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  }
  const unsigned rank = plan.blocks > 1 ? ptx::ClusterRank() : 0;
  const unsigned thread = rank * (32 * kWarps) + threadIdx.x, lane = threadIdx.x % 32;
  const unsigned first = thread / 32 * 32 * plan.rows_per_thread;
  const unsigned num_rows = p.num_tokens * p.top_k;
  const unsigned end = min(first + 32 * plan.rows_per_thread, num_rows);
  const Rows rows{p.ids, first + lane, end, static_cast<unsigned>(p.num_experts)};
  int* next = shared.next_slot + threadIdx.x / 32 * p.num_experts;
  ptx::LetNextKernelStart();

  for (int i = lane; i < p.num_experts; i += 32) next[i] = 0;
  __syncwarp();
  CountRows(rows, plan.rows_per_thread, next);
  __syncthreads();
  PlaceExpert<kWarps>(p, plan, shared, barrier);
  __syncthreads();
  PlaceRows<kBits>(p, plan, rows, next);

  const int num_tiles = shared.tile_end[p.num_experts - 1];
  const int num_threads = plan.blocks * (32 * kWarps);
  // From the last thread on: with few rows it has none.
#pragma unroll 1
  for (int i = num_threads - 1 - thread; i < num_tiles; i += num_threads) {
    reinterpret_cast<int4*>(p.tiles)[i] = MakeTile(p, shared, i);
  }
  if (thread == num_threads - 1) *p.num_tiles = num_tiles;
}

// At most two rows per thread, as far as the cluster can grow.
Plan MakePlan(const Permute& p) {
  const unsigned num_rows = p.num_tokens * p.top_k;
  int warps = 8, blocks = 1;
  while (warps * 32 < p.num_experts || (warps < 16 && num_rows > 8 * 512)) warps *= 2;
  while (blocks < kMaxBlocks && blocks * warps * 32 * 2u < num_rows) blocks *= 2;
  const int rows_per_thread = CeilDiv<unsigned>(num_rows, blocks * warps * 32);
  return {warps, blocks, rows_per_thread, Divisor(p.tile_rows), Divisor(p.row_divisor)};
}

template <int kWarps, int kBits>
const char* LaunchPlan(const Permute& p, const Plan& plan, cudaStream_t stream) {
  const size_t bytes = SharedBytes(plan, p.num_experts);
  const auto kernel = PermuteKernel<kWarps, kBits>;
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
  error = cudaLaunchKernelEx(&config, kernel, p, plan);
  return error == cudaSuccess ? LaunchError() : cudaGetErrorString(error);
}

const char* LaunchPlan(const Permute& p, const Plan& plan, cudaStream_t stream) {
  if (plan.warps == 8) return LaunchPlan<8, 8>(p, plan, stream);
  if (plan.warps == 16) return LaunchPlan<16, 9>(p, plan, stream);
  return LaunchPlan<32, 10>(p, plan, stream);
}

}  // namespace

const char* LaunchPermute(const Permute& p, cudaStream_t stream) {
  const int64_t num_rows = static_cast<int64_t>(p.num_tokens) * p.top_k;
  if (num_rows > INT_MAX) return "permute: there must be less than 2**31 rows.";
  if (p.num_experts < 1 || p.num_experts > kMaxExperts) {
    return "permute: the number of experts must be in [1, 1024].";
  }
  if (p.tile_rows < 1 || p.row_divisor < 1) {
    return "permute: tile_rows and row_divisor must be positive.";
  }
  if (!IsAligned(p.tiles, 16)) return "permute: tiles must be aligned to 16 bytes.";
  return LaunchPlan(p, MakePlan(p), stream);
}

}  // namespace jmx8

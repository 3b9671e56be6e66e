// How thread blocks that share k add up their sums.
#pragma once

#include "wgmma_shape.cuh"

namespace jmx8::wgmma {

// The sums of a tile from all blocks and warpgroups that share k, in shared memory. Each
// block finishes some of the rows, and gets the other ones' sums of these.
template <class S>
struct Partials {
  uint32_t own;     // float32 [kDeep, kRows, kPitch]
  uint32_t others;  // [split_k - 1, kDeep, rows_each, kPitch], of the rows from `first`
  int split_k, rank, num_rows, rows_each, first, count;

  __device__ __forceinline__ Partials(const Arguments& a, const Place& p,
                                      const Shared& s)
      : own(s.passes), others(s.passes + S::kDeep * S::kPartialBytes),
        split_k(S::kSplits ? a.split_k : 1), rank(blockIdx.x & (split_k - 1)),
        num_rows(p.num_slots), rows_each((num_rows + split_k - 1) >> a.split_shift),
        first(rank * rows_each), count(RowsOf(rank)) {}

  __device__ __forceinline__ int RowsOf(int rank) const {
    return max(0, min(rows_each, num_rows - rank * rows_each));
  }

  // Where block `to` has what block `from` sends.
  __device__ __forceinline__ uint32_t Sent(int from, int to) const {
    return others + (from < to ? from : from - 1) * SentBytes();
  }

  __device__ __forceinline__ int SentBytes() const {
    return 4 * S::kDeep * rows_each * S::kPitch;
  }

  // Eight neighbouring columns of a row, in a fixed order.
  __device__ __forceinline__ void Sum(int row, int n, float (&sum)[8]) const {
#pragma unroll
    for (int j = 0; j < 8; ++j) sum[j] = 0;
    uint32_t sent = others + 4 * (row * S::kPitch + n);
#pragma unroll 1
    for (int from = 0; from < split_k; ++from) {
      uint32_t at = sent, bytes = 4 * rows_each * S::kPitch;  // from deep to deep
      if (from == rank) {
        at = own + 4 * ((first + row) * S::kPitch + n), bytes = S::kPartialBytes;
      } else {
        sent += SentBytes();
      }
#pragma unroll
      for (int deep = 0; deep < S::kDeep; ++deep, at += bytes) {
        AddFour(ptx::LoadShared128(at), &sum[0]);
        AddFour(ptx::LoadShared128(at + 16), &sum[4]);
      }
    }
  }

  __device__ __forceinline__ static void AddFour(const uint4& floats, float* sum) {
    sum[0] += __uint_as_float(floats.x), sum[1] += __uint_as_float(floats.y);
    sum[2] += __uint_as_float(floats.z), sum[3] += __uint_as_float(floats.w);
  }

  // To be called when this block has read its stages: lets the other ones write here.
  __device__ __forceinline__ void LetOthersSend(const Shared& s) const {
    const int to = threadIdx.x;
    if (to < split_k && to != rank) ptx::BarrierArriveThere(ptx::MapShared(s.ready, to));
  }

  // Sends the sums that other blocks finish, and waits for those that this one does.
  __device__ __forceinline__ void Exchange(const Shared& s) const {
    const int to = threadIdx.x;
    if (to == rank) {
      const int bytes = 4 * (split_k - 1) * S::kDeep * count * S::kPitch;
      ptx::BarrierArriveExpect(s.arrived, bytes);
    } else if (to < split_k) {
      // Even if there is nothing to send: no arrival may come when this block has ended.
      ptx::BarrierWait(s.ready, 0);
#pragma unroll
      for (int deep = 0; deep < S::kDeep; ++deep) {
        if (RowsOf(to) == 0) break;
        ptx::CopyThere(
            ptx::MapShared(Sent(rank, to), to) + 4 * deep * rows_each * S::kPitch,
            own + deep * S::kPartialBytes + 4 * to * rows_each * S::kPitch,
            4 * RowsOf(to) * S::kPitch, ptx::MapShared(s.arrived, to));
      }
    }
    __syncwarp();
    ptx::BarrierWait(s.arrived, 0);
  }
};

}  // namespace jmx8::wgmma

// Rows too long for a block's registers beside the sums over columns: each input is read once, into shared memory, where a thread
// finds its own packs twice, and a row of more than a block has room for is shared by a cluster of blocks.
//
// A thread copies for itself alone, so that a row costs one barrier, that of its sums; a pack's place takes that of the row after the
// next as soon as the pack is used up.
#pragma once
#include "common/cluster.cuh"
#include "common/mma.cuh"
#include "norm_backward.cuh"

namespace norm_backward {

constexpr int STAGED_THREADS = 512, STAGES = 2;

// Leaves the sums over its rows of a block's columns in partial[0 (and 1)][cluster's index].
template <typename T, int PACKS, bool LAYER_NORM, bool CLUSTERS>
__global__ void __launch_bounds__(STAGED_THREADS) norm_backward_staged(const Arguments<T> a, int cluster, int share) {
  using C = compute_t<T>;
  constexpr int VEC = vector_width<T>;
  MEGALM_DYNAMIC_SHARED(T, staged);  // [STAGES, 2 (grad_y, sum), PACKS, blockDim.x, VEC]
  const int rank = blockIdx.x % cluster, groups = gridDim.x / cluster;
  const int begin = rank * share, end = min(a.width, begin + share);
  const auto place = [&](int stage, int which, int p) {
    return staged + (((stage * 2 + which) * PACKS + p) * int(blockDim.x) + int(threadIdx.x)) * VEC;
  };
  const auto fetch = [&](int stage, int p, uint32_t row, int column) {
    copy_async(place(stage, 0, p), a.grad_y + int64_t(row) * a.width + column, true);
    copy_async(place(stage, 1, p), a.sum + a.address(row) + column, true);
  };
  C weight_sums[PACKS][VEC] = {}, bias_sums[PACKS][VEC] = {};
  uint32_t row = blockIdx.x / cluster;
#pragma unroll
  for (int stage = 0; stage < STAGES; stage++) {
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
      const int column = begin + (p * blockDim.x + threadIdx.x) * VEC;
      if (row + stage * groups < a.rows && column < end) fetch(stage, p, row + stage * groups, column);
    }
    copy_commit();
  }
  if constexpr (CLUSTERS) cluster_barrier();  // the others are there: their shared memory may be written to
  RowStatistics<C> now, next;
  next.fetch(a, row);
  for (int stage = 0; row < a.rows; row += groups, stage ^= 1) {
    now = next;
    next.fetch(a, row + groups);
    Pack<T, VEC> others[PACKS];  // of grad_sum
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
      const int column = begin + (p * blockDim.x + threadIdx.x) * VEC;
      others[p] = Pack<T, VEC>{};
      if (a.grad_sum != nullptr && column < end) others[p] = load<VEC>(a.grad_sum + int64_t(row) * a.width + column);
    }
    copy_wait<STAGES - 1>();  // this thread's packs of this row
    Two<C> sums{C(0), C(0)};
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
      const int column = begin + (p * blockDim.x + threadIdx.x) * VEC;
      if (column >= end) continue;
      add<LAYER_NORM>(sums, weight_sums[p], bias_sums[p], load<VEC>(place(stage, 0, p)), load<VEC>(place(stage, 1, p)),
                      load<VEC>(a.weight + column), now);
    }
    sums = sum_cluster<CLUSTERS, STAGED_THREADS / WARP>(sums, cluster, rank, stage);
    const Two<C> means{sums.first / C(a.width), LAYER_NORM ? sums.second / C(a.width) : C(0)};
    const uint32_t later = row + STAGES * groups;
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
      const int column = begin + (p * blockDim.x + threadIdx.x) * VEC;
      if (column < end)
        write(a.grad_x + int64_t(row) * a.width + column, load<VEC>(place(stage, 0, p)), load<VEC>(place(stage, 1, p)),
              load<VEC>(a.weight + column), others[p], now, means);
      __syncwarp();  // keeps the compiler from reading the place after it is filled again
      if (column < end && later < a.rows) fetch(stage, p, later, column);
    }
    copy_commit();
  }
#pragma unroll
  for (int p = 0; p < PACKS; p++) {
    const int column = begin + (p * blockDim.x + threadIdx.x) * VEC;
    if (column >= end) continue;
    C *out = a.partial + int64_t(blockIdx.x / cluster) * a.width + column;
    leave<VEC>(out, weight_sums[p]);
    if (LAYER_NORM) leave<VEC>(out + int64_t(groups) * a.width, bias_sums[p]);
  }
}

}  // namespace norm_backward

// Sums over rows, the first stage, for kernels that go through [rows, width] anyway: a block of (WARP, TILE_ROWS) threads has the
// WARP * VEC columns of blockIdx.x in every gridDim.y-th group of rows. The second stage: columns.cuh.
#pragma once
#include "common/common.cuh"

constexpr int TILE_ROWS = 8;

// The grid for tiles whose threads have `unroll` rows in flight: as many blocks as the device holds, so that partial sums stay few.
template <typename Kernel> inline dim3 tile_grid(Kernel kernel, int64_t rows, int64_t width, int vec, int unroll) {
  const int64_t across = ceil_div(width, int64_t(WARP * vec)), groups = ceil_div(rows, int64_t(TILE_ROWS * unroll));
  return dim3(unsigned(across), unsigned(min(groups, max(int64_t(1), resident_blocks(kernel, WARP * TILE_ROWS, 0) / across))));
}

// Leaves the sums of the block's rows in partial [gridDim.y, width], from each thread's sums of its own. All threads take part.
template <int VEC, typename C> __device__ __forceinline__ void leave_tile_sums(const C (&sums)[VEC], C *partial, int width) {
  MEGALM_SHARED(C, shared, TILE_ROWS * WARP * VEC);
#pragma unroll
  for (int i = 0; i < VEC; i++) shared[(threadIdx.y * VEC + i) * WARP + threadIdx.x] = sums[i];
  __syncthreads();
  for (int at = threadIdx.y; at < VEC; at += TILE_ROWS) {
    const int column = (blockIdx.x * WARP + threadIdx.x) * VEC + at;
    if (column >= width) continue;
    C total = C(0);
    for (int y = 0; y < TILE_ROWS; y++) total += shared[(y * VEC + at) * WARP + threadIdx.x];
    partial[int64_t(blockIdx.y) * width + column] = total;
  }
}

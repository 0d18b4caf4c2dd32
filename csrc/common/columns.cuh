// Sums over rows, the second stage: from the partial sums of many blocks to one row. No atomics, so that the order is fixed.
#pragma once
#include "common/common.cuh"

constexpr int MAX_COLUMN_ROWS = 32;

// out[z] = sum over blocks of partial[z]: partial [gridDim.y, blocks, width] -> out0 [width] (and out1 [width] where gridDim.y is 2).
template <typename T, typename C>
__global__ void __launch_bounds__(WARP * MAX_COLUMN_ROWS)
    sum_blocks(const C *__restrict__ partial, T *__restrict__ out0, T *__restrict__ out1, int64_t blocks, int width) {
  MEGALM_SHARED(C, sums, MAX_COLUMN_ROWS * WARP);
  const int column = blockIdx.x * WARP + threadIdx.x;
  const C *from = partial + blockIdx.y * blocks * width + column;
  C sum = C(0);
  if (column < width) {
#pragma unroll 8
    for (int64_t block = threadIdx.y; block < blocks; block += blockDim.y) sum += from[block * width];
  }
  sums[threadIdx.y * WARP + threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || column >= width) return;
  for (unsigned y = 1; y < blockDim.y; y++) sum += sums[y * WARP + threadIdx.x];
  (blockIdx.y == 0 ? out0 : out1)[column] = narrow<T>(sum);
}

template <typename T, typename C>
void launch_sum_blocks(const C *partial, T *out0, T *out1, int64_t blocks, int64_t width, megalm_stream stream) {
  const auto kernel = sum_blocks<T, C>;
  const dim3 grid(unsigned(ceil_div(width, int64_t(WARP))), out1 == nullptr ? 1 : 2);
  const int rows = blocks <= 8 ? 4 : blocks <= 256 ? 8 : MAX_COLUMN_ROWS;
  MEGALM_LAUNCH(kernel, grid, dim3(WARP, rows), 0, stream, partial, out0, out1, blocks, int(width));
}

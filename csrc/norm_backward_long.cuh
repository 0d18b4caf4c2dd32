// Rows of any length, where norm_backward_staged.cuh can't serve: a kernel for grad_x and one for the sums over rows, each of which
// reads the inputs.
#pragma once
#include "common/column_tiles.cuh"
#include "norm_backward.cuh"

namespace norm_backward {

constexpr int LONG_THREADS = 512;

// A block a row, without the sums over rows: what the second loop reads again is in L1 or L2.
template <typename T, int VEC, bool LAYER_NORM>
__global__ void __launch_bounds__(LONG_THREADS) norm_backward_long(const Arguments<T> a) {
  using C = compute_t<T>;
  const int64_t row = blockIdx.x;
  const int first = threadIdx.x * VEC, step = LONG_THREADS * VEC;
  const T *grad_y = a.grad_y + row * a.width, *sum = a.sum + a.address(blockIdx.x);
  RowStatistics<C> statistics;
  statistics.fetch(a, blockIdx.x);
  Two<C> sums{C(0), C(0)};
  C unused[VEC] = {};
  for (int column = first; column < a.width; column += step)
    add<LAYER_NORM>(sums, unused, unused, load<VEC>(grad_y + column), load<VEC>(sum + column), load<VEC>(a.weight + column),
                    statistics);
  sums = sum_row(sums);
  const Two<C> means{sums.first / C(a.width), sums.second / C(a.width)};
  for (int column = first; column < a.width; column += step) {
    Pack<T, VEC> other{};
    if (a.grad_sum != nullptr) other = load<VEC>(a.grad_sum + row * a.width + column);
    write(a.grad_x + row * a.width + column, load<VEC>(grad_y + column), load<VEC>(sum + column), load<VEC>(a.weight + column), other,
          statistics, means);
  }
}

constexpr int LONG_UNROLL = 2;

// The sums over rows, by tiles (common/column_tiles.cuh).
template <typename T, int VEC, bool LAYER_NORM>
__global__ void __launch_bounds__(WARP * TILE_ROWS) norm_backward_tiles(const Arguments<T> a) {
  using C = compute_t<T>;
  const int column = (blockIdx.x * WARP + threadIdx.x) * VEC;
  C weight_sums[VEC] = {}, bias_sums[VEC] = {};
  const uint32_t step = gridDim.y * (TILE_ROWS * LONG_UNROLL);
  for (uint32_t first = blockIdx.y * (TILE_ROWS * LONG_UNROLL) + threadIdx.y; column < a.width && first < a.rows; first += step) {
    Pack<T, VEC> grads[LONG_UNROLL], values[LONG_UNROLL];
    RowStatistics<C> statistics[LONG_UNROLL];
#pragma unroll
    for (int u = 0; u < LONG_UNROLL; u++) {
      const uint32_t row = first + u * TILE_ROWS;
      grads[u] = values[u] = Pack<T, VEC>{};
      statistics[u].fetch(a, row);
      if (row >= a.rows) continue;
      grads[u] = load<VEC>(a.grad_y + int64_t(row) * a.width + column);
      values[u] = load<VEC>(a.sum + a.address(row) + column);
    }
#pragma unroll
    for (int u = 0; u < LONG_UNROLL; u++) {
#pragma unroll
      for (int i = 0; i < VEC; i++) {
        weight_sums[i] += grads[u][i] * (values[u][i] - statistics[u].mean) * statistics[u].rstd;
        if (LAYER_NORM) bias_sums[i] += grads[u][i];
      }
    }
  }
  leave_tile_sums<VEC>(weight_sums, a.partial, a.width);
  if (!LAYER_NORM) return;
  __syncthreads();  // the weight's have been added up
  leave_tile_sums<VEC>(bias_sums, a.partial + int64_t(gridDim.y) * a.width, a.width);
}

}  // namespace norm_backward

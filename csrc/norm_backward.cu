// LayerNorm and RMSNorm, backward: each gradient and each input element is read once. Math: norm.h.
//
// A block goes through rows with a grid's stride and keeps the sums over its rows of the weight's and bias's gradient in registers,
// with the next row's loads in flight while the current one is reduced. Long rows wait in shared memory instead of registers
// (norm_backward_staged.cuh); what neither has room for, or is not aligned, goes through the caches again (norm_backward_long.cuh).
#include "common/columns.cuh"
#include "norm_backward_long.cuh"
#include "norm_backward_staged.cuh"

namespace norm_backward {

constexpr int64_t MAX_WIDTH = INT32_MAX / 2, MAX_ROWS = INT32_MAX;
constexpr int HELD_THREADS = 512;

// What a thread reads of one row.
template <typename T, int VEC, int PACKS> struct Row {
  Pack<T, VEC> grad[PACKS], sum[PACKS];
  RowStatistics<compute_t<T>> statistics;

  __device__ __forceinline__ void fetch(const Arguments<T> &a, uint32_t row) {
    statistics.fetch(a, row);
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
      const int column = (p * blockDim.x + threadIdx.x) * VEC;
      grad[p] = sum[p] = Pack<T, VEC>{};
      if (row >= a.rows || column >= a.width) continue;
      grad[p] = load<VEC>(a.grad_y + int64_t(row) * a.width + column);
      sum[p] = load<VEC>(a.sum + a.address(row) + column);
    }
  }
};

// Leaves the sums of grad_y xhat (and grad_y) over this block's rows in partial[0 (and 1)][blockIdx.x].
template <typename T, int VEC, int PACKS, bool LAYER_NORM>
__global__ void __launch_bounds__(PACKS == 1 ? SMALL_BLOCK : HELD_THREADS) norm_backward(const Arguments<T> a) {
  using C = compute_t<T>;
  const C scale = C(1) / C(a.width);
  const uint32_t stride = gridDim.x * blockDim.y;
  C weight_sums[PACKS][VEC] = {}, bias_sums[PACKS][VEC] = {};
  Row<T, VEC, PACKS> next;
  next.fetch(a, blockIdx.x * blockDim.y + threadIdx.y);
  for (uint32_t first = blockIdx.x * blockDim.y; first < a.rows; first += stride) {
    const uint32_t row = first + threadIdx.y;
    const bool here = row < a.rows;  // all threads go through the reductions
    const Row<T, VEC, PACKS> now = next;
    next.fetch(a, row + stride);
    Pack<T, VEC> others[PACKS];  // of grad_sum
    Two<C> sums{C(0), C(0)};
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
      const int column = (p * blockDim.x + threadIdx.x) * VEC;
      const bool inside = here && column < a.width;
      Pack<T, VEC> gain{};
      if (inside) gain = load<VEC>(a.weight + column);
      others[p] = Pack<T, VEC>{};
      if (inside && a.grad_sum != nullptr) others[p] = load<VEC>(a.grad_sum + int64_t(row) * a.width + column);
      add<LAYER_NORM>(sums, weight_sums[p], bias_sums[p], now.grad[p], now.sum[p], gain, now.statistics);
    }
    sums = sum_row(sums);
    const Two<C> means{sums.first * scale, LAYER_NORM ? sums.second * scale : C(0)};
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
      const int column = (p * blockDim.x + threadIdx.x) * VEC;
      if (!here || column >= a.width) continue;
      const Pack<T, VEC> gain = load<VEC>(a.weight + column);  // from L1: kept, it would cost the registers of a row
      write(a.grad_x + int64_t(row) * a.width + column, now.grad[p], now.sum[p], gain, others[p], now.statistics, means);
    }
  }
  MEGALM_DYNAMIC_SHARED(C, shared);  // [blockDim.y, width] where a block has several rows
#pragma unroll
  for (int which = 0; which < (LAYER_NORM ? 2 : 1); which++) {
    C *out = a.partial + (int64_t(which) * gridDim.x + blockIdx.x) * a.width;
    C *mine = blockDim.y == 1 ? out : shared + threadIdx.y * a.width;
    __syncthreads();
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
      const int column = (p * blockDim.x + threadIdx.x) * VEC;
      if (column < a.width) leave<VEC>(mine + column, which == 0 ? weight_sums[p] : bias_sums[p]);
    }
    if (blockDim.y == 1) continue;
    __syncthreads();
    const int thread = threadIdx.y * blockDim.x + threadIdx.x;
    for (int column = thread; column < a.width; column += blockDim.x * blockDim.y) {
      C total = C(0);
      for (unsigned y = 0; y < blockDim.y; y++) total += shared[y * a.width + column];
      out[column] = total;
    }
  }
}

template <typename T> Arguments<T> arguments(const megalm_norm_backward_params &p) {
  using C = compute_t<T>;
  return {(const T *)p.grad_y, (const T *)p.grad_sum, (const T *)p.sum, (const T *)p.weight, (const C *)p.mean, (const C *)p.rstd,
          (T *)p.grad_x, (C *)p.partial, {p.outer_stride, p.inner_stride, uint32_t(p.inner)}, uint32_t(p.rows), int(p.width)};
}

// Either launches (stream given) or only says how many blocks of partial sums there will be: both must come from one place.
struct Launcher {
  const megalm_norm_backward_params &p;
  megalm_stream stream;
  bool count_only;
  int64_t blocks = 0;

  template <typename T, int VEC, int PACKS, bool LAYER_NORM> void held() {
    const auto kernel = norm_backward<T, VEC, PACKS, LAYER_NORM>;
    const RowShape shape = row_shape(p.width, VEC, PACKS);
    const size_t shared = shape.rows > 1 ? shape.rows * p.width * sizeof(compute_t<T>) : 0;
    // Each block leaves a row of partial sums: no more blocks than the loads in flight need.
    const int64_t most = min(resident_blocks(kernel, shape.threads * shape.rows, shared), int64_t(4) * processors());
    blocks = min(ceil_div(p.rows, int64_t(shape.rows)), most);
    if (count_only) return;
    MEGALM_LAUNCH(kernel, dim3(unsigned(blocks)), shape.block(), shared, stream, arguments<T>(p));
  }

  template <typename T, int PACKS, bool LAYER_NORM, bool CLUSTERS> bool staged() {
    constexpr int VEC = vector_width<T>, UNIT = PACKS * VEC * WARP;
    const auto kernel = norm_backward_staged<T, PACKS, LAYER_NORM, CLUSTERS>;
    if (CLUSTERS && !has_clusters(kernel)) return false;
    // Two blocks of a cluster fit a multiprocessor where they are half as large: one computes while the other waits.
    int cluster = 1, most = CLUSTERS ? STAGED_THREADS / 2 : STAGED_THREADS;
    while (CLUSTERS && cluster < MAX_CLUSTER && p.width > int64_t(cluster) * most * PACKS * VEC) cluster *= 2;
    if (p.width > int64_t(cluster) * most * PACKS * VEC) most = STAGED_THREADS;
    if (p.width > int64_t(cluster) * most * PACKS * VEC) return false;
    const int share = int(ceil_div(p.width / VEC, int64_t(cluster))) * VEC, threads = ceil_div(share, UNIT) * WARP;
    const size_t shared = size_t(STAGES) * 2 * PACKS * threads * VEC * sizeof(T);
    if (!allow_shared(kernel, shared)) return false;
    blocks = min(p.rows, CLUSTERS ? resident_clusters(kernel, cluster, threads, shared) : resident_blocks(kernel, threads, shared));
    if (count_only) return true;
    const dim3 grid(unsigned(blocks * cluster));
    if constexpr (CLUSTERS)
      MEGALM_LAUNCH_CLUSTERS(kernel, cluster, grid, dim3(threads), shared, stream, arguments<T>(p), cluster, share);
    else
      MEGALM_LAUNCH(kernel, grid, dim3(threads), shared, stream, arguments<T>(p), cluster, share);
    return true;
  }

  template <typename T, int VEC, bool LAYER_NORM> void long_rows() {
    const auto tiles = norm_backward_tiles<T, VEC, LAYER_NORM>;
    const dim3 grid = tile_grid(tiles, p.rows, p.width, VEC, LONG_UNROLL);
    blocks = grid.y;
    if (count_only) return;
    const auto rows = norm_backward_long<T, VEC, LAYER_NORM>;
    MEGALM_LAUNCH(rows, dim3(unsigned(p.rows)), dim3(LONG_THREADS), 0, stream, arguments<T>(p));
    MEGALM_LAUNCH(tiles, grid, dim3(WARP, TILE_ROWS), 0, stream, arguments<T>(p));
  }

  template <typename T, bool LAYER_NORM> void typed() {
    constexpr int VEC = vector_width<T>, HELD = HELD_THREADS * VEC;
    const bool vectors = p.width % VEC == 0 && aligned<T>(p.sum, p.outer_stride) && aligned<T>(p.sum, p.inner_stride) &&
                         aligned<T>(p.grad_y) && aligned<T>(p.grad_sum) && aligned<T>(p.weight) && aligned<T>(p.grad_x);
    if (!vectors) return p.width <= 4 * HELD_THREADS ? held<T, 1, 4, LAYER_NORM>() : long_rows<T, 1, LAYER_NORM>();
    if (p.width <= 16 * VEC) return held<T, VEC, 1, LAYER_NORM>();
    if (p.width <= 2 * HELD) return held<T, VEC, 2, LAYER_NORM>();
    if (p.width <= 3 * HELD && staged<T, 3, LAYER_NORM, false>()) return;
    if (p.width <= 4 * HELD && staged<T, 4, LAYER_NORM, false>()) return;
    if (p.width <= 4 * HELD || !staged<T, 4, LAYER_NORM, true>()) long_rows<T, VEC, LAYER_NORM>();
  }

  int run() {
    if (p.width < 1 || p.width > MAX_WIDTH || p.rows < 1 || p.rows > MAX_ROWS || p.inner < 1 || !aligned<float>(p.partial))
      return cudaErrorInvalidValue;
    MEGALM_DISPATCH(p.dtype, p.layer_norm ? typed<T, true>() : typed<T, false>());
    return cudaSuccess;
  }
};

int run(const megalm_norm_backward_params &p, megalm_stream stream) {
  Launcher launcher{p, stream, false};
  const int error = launcher.run();
  if (error != cudaSuccess) return error;
  if (launcher.blocks != p.blocks) return cudaErrorInvalidValue;
  MEGALM_DISPATCH(p.dtype, launch_sum_blocks((const compute_t<T> *)p.partial, (T *)p.grad_weight,
                                             p.layer_norm ? (T *)p.grad_bias : (T *)nullptr, p.blocks, p.width, stream));
  return cudaSuccess;
}

}  // namespace norm_backward

MEGALM_DEFINE(norm_backward, norm_backward::run)

int64_t megalm_norm_backward_blocks(const megalm_norm_backward_params *params) {
  norm_backward::Launcher launcher{*params, nullptr, true};
  return launcher.run() == cudaSuccess ? launcher.blocks : 0;
}

// LayerNorm and RMSNorm, backward: each gradient and each input element is read once. Math: norm.h.
//
// A block goes through rows with a grid's stride and keeps the sums over its rows of the weight's and bias's gradient in registers,
// with the next row's loads in flight while the current one is reduced. Rows too long for that (more than 512 threads with four
// packs each) go through the caches again, and leave those sums to a kernel of their own.
#include "common/columns.cuh"
#include "common/reduce.cuh"
#include "common/rows.cuh"
#include "norm.h"

namespace {

constexpr int64_t MAX_WIDTH = INT32_MAX / 2, MAX_ROWS = INT32_MAX;
constexpr int HELD_THREADS = 512, LONG_THREADS = 512;
constexpr int TILE_ROWS = 8;  // rows at a time of a tile in the kernel for long rows

template <typename T> struct Arguments {
  const T *grad_y, *grad_sum, *sum, *weight;
  const compute_t<T> *mean, *rstd;
  T *grad_x;
  compute_t<T> *partial;
  RowAddress address;
  uint32_t rows;
  int width;
};

// What a thread reads of one row.
template <typename T, int VEC, int PACKS> struct Row {
  Pack<T, VEC> grad[PACKS], sum[PACKS];
  compute_t<T> mean, rstd;

  __device__ __forceinline__ void fetch(const Arguments<T> &a, uint32_t row) {
    const bool here = row < a.rows;
    mean = here && a.mean != nullptr ? a.mean[row] : compute_t<T>(0);
    rstd = here ? a.rstd[row] : compute_t<T>(0);
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
      const int column = (p * blockDim.x + threadIdx.x) * VEC;
      grad[p] = sum[p] = Pack<T, VEC>{};
      if (!here || column >= a.width) continue;
      grad[p] = load<VEC>(a.grad_y + int64_t(row) * a.width + column);
      sum[p] = load<VEC>(a.sum + a.address(row) + column);
    }
  }
};

// Leaves the sums of grad_y xhat (and grad_y) over this block's rows in partial[0 (and 1)][blockIdx.x].
template <typename T, int VEC, int PACKS, bool LAYER_NORM>
__global__ void __launch_bounds__(PACKS == 1 ? SMALL_BLOCK : HELD_THREADS) norm_backward(const Arguments<T> a) {
  using C = compute_t<T>;
  constexpr bool PREFETCH = PACKS * VEC * (LAYER_NORM ? 2 : 1) <= 48, EARLY = PACKS <= 2;
  const C scale = C(1) / C(a.width);
  const uint32_t stride = gridDim.x * blockDim.y;
  C weight_sums[PACKS][VEC] = {}, bias_sums[PACKS][VEC] = {};
  Row<T, VEC, PACKS> next;
  if (PREFETCH) next.fetch(a, blockIdx.x * blockDim.y + threadIdx.y);
  for (uint32_t first = blockIdx.x * blockDim.y; first < a.rows; first += stride) {
    const uint32_t row = first + threadIdx.y;
    const bool here = row < a.rows;  // all threads go through the reductions
    Row<T, VEC, PACKS> now;
    if (PREFETCH) {
      now = next;
      next.fetch(a, row + stride);
    } else {
      now.fetch(a, row);
    }
    Pack<T, VEC> others[PACKS];  // of grad_sum, early where registers allow
    Two<C> sums{C(0), C(0)};
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
      const int column = (p * blockDim.x + threadIdx.x) * VEC;
      const bool inside = here && column < a.width;
      Pack<T, VEC> gain{};
      if (inside) gain = load<VEC>(a.weight + column);
      others[p] = Pack<T, VEC>{};
      if (EARLY && inside && a.grad_sum != nullptr) others[p] = load<VEC>(a.grad_sum + int64_t(row) * a.width + column);
#pragma unroll
      for (int i = 0; i < VEC; i++) {
        const C xhat = (now.sum[p][i] - now.mean) * now.rstd, grad = now.grad[p][i], scaled = grad * gain[i];
        sums.first += scaled * xhat;
        if (LAYER_NORM) sums.second += scaled;
        weight_sums[p][i] += grad * xhat;
        if (LAYER_NORM) bias_sums[p][i] += grad;
      }
    }
    sums = sum_row(sums);
    const C along = sums.first * scale, level = LAYER_NORM ? sums.second * scale : C(0);
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
      const int column = (p * blockDim.x + threadIdx.x) * VEC;
      if (!here || column >= a.width) continue;
      const Pack<T, VEC> gain = load<VEC>(a.weight + column);  // from L1: kept, it would cost the registers of a row
      if (!EARLY && a.grad_sum != nullptr) others[p] = load<VEC>(a.grad_sum + int64_t(row) * a.width + column);
      C out[VEC];
#pragma unroll
      for (int i = 0; i < VEC; i++) {
        const C xhat = (now.sum[p][i] - now.mean) * now.rstd;
        out[i] = now.rstd * (now.grad[p][i] * gain[i] - along * xhat - level) + others[p][i];
      }
      store<VEC>(a.grad_x + int64_t(row) * a.width + column, out);
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
      if (column >= a.width) continue;
#pragma unroll
      for (int i = 0; i < VEC; i++) mine[column + i] = which == 0 ? weight_sums[p][i] : bias_sums[p][i];
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

// A block a row of any length, without the sums over rows: what the second loop reads again is in L1 or L2.
template <typename T, int VEC, bool LAYER_NORM>
__global__ void __launch_bounds__(LONG_THREADS) norm_backward_long(const Arguments<T> a) {
  using C = compute_t<T>;
  const int64_t row = blockIdx.x;
  const int first = threadIdx.x * VEC, step = LONG_THREADS * VEC;
  const T *grad_y = a.grad_y + row * a.width, *sum = a.sum + a.address(blockIdx.x);
  const C mean = LAYER_NORM ? a.mean[row] : C(0), rstd = a.rstd[row];
  Two<C> sums{C(0), C(0)};
  for (int column = first; column < a.width; column += step) {
    const Pack<T, VEC> grad = load<VEC>(grad_y + column), value = load<VEC>(sum + column), gain = load<VEC>(a.weight + column);
#pragma unroll
    for (int i = 0; i < VEC; i++) {
      sums.first += grad[i] * gain[i] * (value[i] - mean) * rstd;
      if (LAYER_NORM) sums.second += grad[i] * gain[i];
    }
  }
  sums = sum_row(sums);
  const C along = sums.first / C(a.width), level = sums.second / C(a.width);
  for (int column = first; column < a.width; column += step) {
    const Pack<T, VEC> grad = load<VEC>(grad_y + column), value = load<VEC>(sum + column), gain = load<VEC>(a.weight + column);
    Pack<T, VEC> other{};
    if (a.grad_sum != nullptr) other = load<VEC>(a.grad_sum + row * a.width + column);
    C out[VEC];
#pragma unroll
    for (int i = 0; i < VEC; i++) out[i] = rstd * (grad[i] * gain[i] - along * (value[i] - mean) * rstd - level) + other[i];
    store<VEC>(a.grad_x + row * a.width + column, out);
  }
}

// The sums over rows for long rows: block (x, y) has WARP * VEC columns of every gridDim.y-th group of TILE_ROWS rows.
template <typename T, int VEC, bool LAYER_NORM>
__global__ void __launch_bounds__(WARP * TILE_ROWS) norm_backward_tiles(const Arguments<T> a) {
  using C = compute_t<T>;
  const int column = (blockIdx.x * WARP + threadIdx.x) * VEC;
  C weight_sums[VEC] = {}, bias_sums[VEC] = {};
  if (column < a.width) {
    for (uint32_t row = blockIdx.y * TILE_ROWS + threadIdx.y; row < a.rows; row += gridDim.y * TILE_ROWS) {
      const Pack<T, VEC> grad = load<VEC>(a.grad_y + int64_t(row) * a.width + column);
      const Pack<T, VEC> sum = load<VEC>(a.sum + a.address(row) + column);
      const C mean = LAYER_NORM ? a.mean[row] : C(0), rstd = a.rstd[row];
#pragma unroll
      for (int i = 0; i < VEC; i++) {
        weight_sums[i] += grad[i] * (sum[i] - mean) * rstd;
        if (LAYER_NORM) bias_sums[i] += grad[i];
      }
    }
  }
  MEGALM_SHARED(C, shared, TILE_ROWS * WARP * VEC);
#pragma unroll
  for (int which = 0; which < (LAYER_NORM ? 2 : 1); which++) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < VEC; i++) shared[(threadIdx.y * WARP + threadIdx.x) * VEC + i] = which == 0 ? weight_sums[i] : bias_sums[i];
    __syncthreads();
    for (int at = threadIdx.y * WARP + threadIdx.x; at < WARP * VEC; at += WARP * TILE_ROWS) {
      const int mine = blockIdx.x * WARP * VEC + at;
      C total = C(0);
      for (int y = 0; y < TILE_ROWS; y++) total += shared[y * WARP * VEC + at];
      if (mine < a.width) a.partial[(int64_t(which) * gridDim.y + blockIdx.y) * a.width + mine] = total;
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

  template <typename T, int VEC, bool LAYER_NORM> void long_rows() {
    const int64_t across = ceil_div(p.width, int64_t(WARP * VEC));
    blocks = min(ceil_div(p.rows, int64_t(TILE_ROWS)), max(int64_t(1), int64_t(8) * processors() / across));
    if (count_only) return;
    const auto rows = norm_backward_long<T, VEC, LAYER_NORM>;
    MEGALM_LAUNCH(rows, dim3(unsigned(p.rows)), dim3(LONG_THREADS), 0, stream, arguments<T>(p));
    const auto tiles = norm_backward_tiles<T, VEC, LAYER_NORM>;
    MEGALM_LAUNCH(tiles, dim3(unsigned(across), unsigned(blocks)), dim3(WARP, TILE_ROWS), 0, stream, arguments<T>(p));
  }

  template <typename T, bool LAYER_NORM> void typed() {
    constexpr int VEC = vector_width<T>, HELD = HELD_THREADS * VEC;
    const bool vectors = p.width % VEC == 0 && aligned<T>(p.sum, p.outer_stride) && aligned<T>(p.sum, p.inner_stride) &&
                         aligned<T>(p.grad_y) && aligned<T>(p.grad_sum) && aligned<T>(p.weight) && aligned<T>(p.grad_x);
    if (!vectors) return p.width <= 4 * HELD_THREADS ? held<T, 1, 4, LAYER_NORM>() : long_rows<T, 1, LAYER_NORM>();
    if (p.width <= 16 * VEC) return held<T, VEC, 1, LAYER_NORM>();
    if (p.width <= 2 * HELD) return held<T, VEC, 2, LAYER_NORM>();
    if (p.width <= 3 * HELD) return held<T, VEC, 3, LAYER_NORM>();
    return p.width <= 4 * HELD ? held<T, VEC, 4, LAYER_NORM>() : long_rows<T, VEC, LAYER_NORM>();
  }

  int run() {
    if (p.width < 1 || p.width > MAX_WIDTH || p.rows < 1 || p.rows > MAX_ROWS || p.inner < 1) return cudaErrorInvalidValue;
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

}  // namespace

MEGALM_DEFINE(norm_backward, run)

int64_t megalm_norm_backward_blocks(const megalm_norm_backward_params *params) {
  Launcher launcher{*params, nullptr, true};
  return launcher.run() == cudaSuccess ? launcher.blocks : 0;
}

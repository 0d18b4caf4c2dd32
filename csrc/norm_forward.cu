// LayerNorm and RMSNorm, forward: one pass over memory. A row stays in the registers of the threads that share it, so that the
// variance is that of the differences from the mean and each element is read once. Math: norm.h. Rows too long for that go through
// the caches again instead.
#include "common/reduce.cuh"
#include "common/rows.cuh"
#include "norm.h"

namespace {

constexpr int64_t MAX_WIDTH = INT32_MAX / 2, MAX_ROWS = INT32_MAX;
constexpr int MAX_THREADS = 1024, HELD_PACKS = 4, LONG_THREADS = 512;

template <typename T, int VEC, int PACKS>
__global__ void __launch_bounds__(PACKS == 1 ? SMALL_BLOCK : MAX_THREADS)
    norm_forward(const T *__restrict__ x, const T *residual, const T *__restrict__ weight, const T *__restrict__ bias,
                             T *__restrict__ y, T *sum, compute_t<T> *__restrict__ means, compute_t<T> *__restrict__ rstds,
                             RowAddress address, uint32_t rows, int width, compute_t<T> eps, bool layer_norm) {
  using C = compute_t<T>;
  const C scale = C(1) / C(width);
  for (uint32_t first = blockIdx.x * blockDim.y; first < rows; first += gridDim.x * blockDim.y) {
    const uint32_t row = first + threadIdx.y;
    const bool here = row < rows;  // all threads go through the reductions
    // All loads before the first store, which the compiler may not move them across: `sum` can be the residual.
    Pack<T, VEC> packs[PACKS], others[PACKS];
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
      const int column = (p * blockDim.x + threadIdx.x) * VEC;
      packs[p] = others[p] = Pack<T, VEC>{};
      if (!here || column >= width) continue;
      packs[p] = load<VEC>(x + address(row) + column);
      if (residual != nullptr) others[p] = load<VEC>(residual + int64_t(row) * width + column);
    }
    C values[PACKS][VEC];
    C total = C(0);
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
      const int column = (p * blockDim.x + threadIdx.x) * VEC;
      if (residual != nullptr) {
#pragma unroll
        for (int i = 0; i < VEC; i++) values[p][i] = packs[p][i] + others[p][i];
        packs[p].set(values[p]);  // the sum as it is stored is what backward will see
        if (here && column < width) store<VEC>(sum + int64_t(row) * width + column, packs[p]);
      }
#pragma unroll
      for (int i = 0; i < VEC; i++) total += values[p][i] = packs[p][i];
    }
    const C mean = layer_norm ? reduce_row<Sum>(total) * scale : C(0);
    C squares = C(0);
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
      const bool inside = (p * blockDim.x + threadIdx.x) * VEC < width;
#pragma unroll
      for (int i = 0; i < VEC; i++) {
        values[p][i] -= mean;
        if (inside) squares += values[p][i] * values[p][i];
      }
    }
    const C rstd = inverse_root(reduce_row<Sum>(squares) * scale + eps);
    if (here && threadIdx.x == 0) {
      if (layer_norm) means[row] = mean;
      rstds[row] = rstd;
    }
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
      const int column = (p * blockDim.x + threadIdx.x) * VEC;
      if (!here || column >= width) continue;
      const Pack<T, VEC> gain = load<VEC>(weight + column);
      Pack<T, VEC> shift{};
      if (bias != nullptr) shift = load<VEC>(bias + column);
#pragma unroll
      for (int i = 0; i < VEC; i++) values[p][i] = values[p][i] * rstd * gain[i] + shift[i];
      store<VEC>(y + int64_t(row) * width + column, values[p]);
    }
  }
}

// A block a row of any length: what the loops read a second time is in L1 or L2.
template <typename T, int VEC>
__global__ void __launch_bounds__(LONG_THREADS)
    norm_forward_long(const T *x, const T *residual, const T *__restrict__ weight, const T *__restrict__ bias, T *__restrict__ y,
                      T *sum, compute_t<T> *__restrict__ means, compute_t<T> *__restrict__ rstds, RowAddress address, int width,
                      compute_t<T> eps, bool layer_norm) {
  using C = compute_t<T>;
  const int64_t row = blockIdx.x;
  const int first = threadIdx.x * VEC, step = LONG_THREADS * VEC;
  const T *from = x + address(blockIdx.x);
  C total = C(0);
  for (int column = first; column < width; column += step) {
    Pack<T, VEC> pack = load<VEC>(from + column);
    if (residual != nullptr) {
      const Pack<T, VEC> other = load<VEC>(residual + row * width + column);
      C values[VEC];
#pragma unroll
      for (int i = 0; i < VEC; i++) values[i] = pack[i] + other[i];
      pack.set(values);
      store<VEC>(sum + row * width + column, pack);
    }
#pragma unroll
    for (int i = 0; i < VEC; i++) total += pack[i];
  }
  if (residual != nullptr) from = sum + row * width;  // a thread reads what it wrote itself
  const C mean = layer_norm ? reduce_row<Sum>(total) / C(width) : C(0);
  C squares = C(0);
  for (int column = first; column < width; column += step) {
    const Pack<T, VEC> pack = load<VEC>(from + column);
#pragma unroll
    for (int i = 0; i < VEC; i++) squares += (pack[i] - mean) * (pack[i] - mean);
  }
  const C rstd = inverse_root(reduce_row<Sum>(squares) / C(width) + eps);
  if (threadIdx.x == 0) {
    if (layer_norm) means[row] = mean;
    rstds[row] = rstd;
  }
  for (int column = first; column < width; column += step) {
    const Pack<T, VEC> pack = load<VEC>(from + column), gain = load<VEC>(weight + column);
    Pack<T, VEC> shift{};
    if (bias != nullptr) shift = load<VEC>(bias + column);
    C values[VEC];
#pragma unroll
    for (int i = 0; i < VEC; i++) values[i] = (pack[i] - mean) * rstd * gain[i] + shift[i];
    store<VEC>(y + row * width + column, values);
  }
}

template <typename T, int VEC> int launch_long(const megalm_norm_forward_params &p, megalm_stream stream) {
  using C = compute_t<T>;
  const auto kernel = norm_forward_long<T, VEC>;
  const RowAddress address{p.outer_stride, p.inner_stride, uint32_t(p.inner)};
  MEGALM_LAUNCH(kernel, dim3(unsigned(p.rows)), dim3(LONG_THREADS), 0, stream, (const T *)p.x, (const T *)p.residual,
                (const T *)p.weight, (const T *)p.bias, (T *)p.y, (T *)p.sum, (C *)p.mean, (C *)p.rstd, address, int(p.width),
                C(p.eps), p.layer_norm != 0);
  return cudaSuccess;
}

template <typename T, int VEC, int PACKS> int launch(const megalm_norm_forward_params &p, megalm_stream stream) {
  using C = compute_t<T>;
  const RowShape shape = row_shape(p.width, VEC, PACKS);
  const auto kernel = norm_forward<T, VEC, PACKS>;
  const int64_t needed = ceil_div(p.rows, int64_t(shape.rows));
  // Many small rows loop, so that a block's start is paid once; a large row is a block of its own and finds its weights in L1.
  const int64_t grid = shape.rows > 1 ? min(needed, 4 * resident_blocks(kernel, shape.threads * shape.rows, 0)) : needed;
  const RowAddress address{p.outer_stride, p.inner_stride, uint32_t(p.inner)};
  MEGALM_LAUNCH(kernel, dim3(unsigned(grid)), shape.block(), 0, stream, (const T *)p.x, (const T *)p.residual, (const T *)p.weight,
                (const T *)p.bias, (T *)p.y, (T *)p.sum, (C *)p.mean, (C *)p.rstd, address, uint32_t(p.rows), int(p.width),
                C(p.eps), p.layer_norm != 0);
  return cudaSuccess;
}

template <typename T> int run_typed(const megalm_norm_forward_params &p, megalm_stream stream) {
  constexpr int VEC = vector_width<T>;
  const bool vectors = p.width % VEC == 0 && aligned<T>(p.x, p.outer_stride) && aligned<T>(p.x, p.inner_stride) &&
                       aligned<T>(p.residual) && aligned<T>(p.weight) && aligned<T>(p.bias) && aligned<T>(p.y) && aligned<T>(p.sum);
  if (vectors) {
    if (p.width <= 16 * VEC) return launch<T, VEC, 1>(p, stream);
    return p.width <= MAX_THREADS * HELD_PACKS * VEC ? launch<T, VEC, HELD_PACKS>(p, stream) : launch_long<T, VEC>(p, stream);
  }
  return p.width <= MAX_THREADS * HELD_PACKS ? launch<T, 1, HELD_PACKS>(p, stream) : launch_long<T, 1>(p, stream);
}

int run(const megalm_norm_forward_params &p, megalm_stream stream) {
  if (p.width < 1 || p.width > MAX_WIDTH || p.rows > MAX_ROWS || p.inner < 1) return cudaErrorInvalidValue;
  if (p.rows < 1) return cudaSuccess;
  MEGALM_DISPATCH(p.dtype, return run_typed<T>(p, stream));
  return cudaSuccess;
}

}  // namespace

MEGALM_DEFINE(norm_forward, run)

// Scaled masked softmax, backward: gradient and probability are read once and kept in registers. Math: softmax.h.
#include "common/reduce.cuh"
#include "common/rows.cuh"
#include "softmax.h"

namespace {

constexpr int64_t MAX_ROWS = INT32_MAX, MAX_KEYS = INT32_MAX / 2;
constexpr int MAX_THREADS = 512, LONG_THREADS = 512;

template <typename T> struct Arguments {
  const T *grad_y, *y;
  T *grad_x;
  uint32_t rows;
  int queries, keys;
  compute_t<T> scale;
  bool causal;

  // How many keys causality lets a row see.
  __device__ __forceinline__ int seen(uint32_t row) const {
    return causal ? max(0, min(keys, int(row % queries) + 1 + keys - queries)) : keys;
  }
};

// Adds one pack to the sums of grad_y y and of y.
template <typename T, int VEC>
__device__ __forceinline__ void add(Two<compute_t<T>> &sums, const Pack<T, VEC> &grad, const Pack<T, VEC> &y) {
#pragma unroll
  for (int i = 0; i < VEC; i++) sums.first += grad[i] * y[i], sums.second += y[i];
}

template <typename C> __device__ __forceinline__ C factor(const Two<C> &sums, C scale) {
  return sums.second == C(0) ? C(0) : scale / sums.second;
}

// Not grad_y less a quotient: where one key has it all, only what is left of the difference counts.
template <typename T, int VEC>
__device__ __forceinline__ void write(T *to, const Pack<T, VEC> &grad, const Pack<T, VEC> &y, const Two<compute_t<T>> &sums,
                                      compute_t<T> factor) {
  compute_t<T> out[VEC];
#pragma unroll
  for (int i = 0; i < VEC; i++) out[i] = factor * y[i] * fma(grad[i], sums.second, -sums.first);
  store<VEC>(to, out);
}

// grad_x may be grad_y: a thread writes only where it has read.
template <typename T, int VEC, int PACKS>
__global__ void __launch_bounds__(PACKS == 8 ? MAX_THREADS : SMALL_BLOCK) softmax_backward(const Arguments<T> a) {
  using C = compute_t<T>;
  for (uint32_t first = blockIdx.x * blockDim.y; first < a.rows; first += gridDim.x * blockDim.y) {
    const uint32_t row = first + threadIdx.y;
    const bool here = row < a.rows;  // all threads go through the reductions
    const int64_t start = int64_t(row) * a.keys;
    const int seen = a.seen(row);
    Pack<T, VEC> grads[PACKS], ys[PACKS];
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
      const int column = (p * blockDim.x + threadIdx.x) * VEC;
      grads[p] = ys[p] = Pack<T, VEC>{};
      if (!here || column >= seen) continue;
      grads[p] = load<VEC>(a.grad_y + start + column);
      ys[p] = load<VEC>(a.y + start + column);
    }
    Two<C> sums{C(0), C(0)};
#pragma unroll
    for (int p = 0; p < PACKS; p++) add(sums, grads[p], ys[p]);
    sums = sum_row(sums);
    const C scale = factor(sums, a.scale);
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
      const int column = (p * blockDim.x + threadIdx.x) * VEC;
      if (here && column < a.keys) write(a.grad_x + start + column, grads[p], ys[p], sums, scale);
    }
  }
}

// A block a row of any length: what the second loop reads again is in L1 or L2.
template <typename T, int VEC> __global__ void __launch_bounds__(LONG_THREADS) softmax_backward_long(const Arguments<T> a) {
  using C = compute_t<T>;
  const int64_t start = int64_t(blockIdx.x) * a.keys;
  const int seen = a.seen(blockIdx.x), first = threadIdx.x * VEC, step = LONG_THREADS * VEC;
  Two<C> sums{C(0), C(0)};
  for (int column = first; column < seen; column += step)
    add(sums, load<VEC>(a.grad_y + start + column), load<VEC>(a.y + start + column));
  sums = sum_row(sums);
  const C scale = factor(sums, a.scale);
  for (int column = first; column < a.keys; column += step) {
    Pack<T, VEC> grad{}, y{};
    if (column < seen) grad = load<VEC>(a.grad_y + start + column), y = load<VEC>(a.y + start + column);
    write(a.grad_x + start + column, grad, y, sums, scale);
  }
}

template <typename T, int VEC, int PACKS> int launch(const Arguments<T> &a, megalm_stream stream) {
  const RowShape shape = row_shape(a.keys, VEC, PACKS);
  const auto kernel = softmax_backward<T, VEC, PACKS>;
  const int64_t needed = ceil_div(int64_t(a.rows), int64_t(shape.rows));
  const int64_t grid = shape.rows > 1 ? min(needed, 4 * resident_blocks(kernel, shape.threads * shape.rows, 0)) : needed;
  MEGALM_LAUNCH(kernel, dim3(unsigned(grid)), shape.block(), 0, stream, a);
  return cudaSuccess;
}

template <typename T, int VEC> int launch_any(const Arguments<T> &a, megalm_stream stream) {
  if constexpr (VEC > 1) {
    if (a.keys <= 16 * VEC) return launch<T, VEC, 1>(a, stream);
    if (a.keys <= WARP * 4 * VEC) return launch<T, VEC, 4>(a, stream);
  }
  if (a.keys <= MAX_THREADS * 8 * VEC) return launch<T, VEC, 8>(a, stream);
  const auto kernel = softmax_backward_long<T, VEC>;
  MEGALM_LAUNCH(kernel, dim3(a.rows), dim3(LONG_THREADS), 0, stream, a);
  return cudaSuccess;
}

template <typename T> int run_typed(const megalm_softmax_backward_params &p, megalm_stream stream) {
  constexpr int VEC = vector_width<T>;
  const Arguments<T> a{(const T *)p.grad_y, (const T *)p.y, (T *)p.grad_x, uint32_t(p.batch * p.heads * p.queries),
                       int(p.queries), int(p.keys), compute_t<T>(p.scale), p.causal != 0};
  const bool vectors = p.keys % VEC == 0 && aligned<T>(p.grad_y) && aligned<T>(p.y) && aligned<T>(p.grad_x);
  return vectors ? launch_any<T, VEC>(a, stream) : launch_any<T, 1>(a, stream);
}

int run(const megalm_softmax_backward_params &p, megalm_stream stream) {
  if (p.batch < 1 || p.heads < 1 || p.queries < 1 || p.keys < 1) return cudaSuccess;
  if (p.keys > MAX_KEYS || p.batch > MAX_ROWS || p.heads > MAX_ROWS / p.batch || p.queries > MAX_ROWS / (p.batch * p.heads))
    return cudaErrorInvalidValue;
  MEGALM_DISPATCH(p.dtype, return run_typed<T>(p, stream));
  return cudaSuccess;
}

}  // namespace

MEGALM_DEFINE(softmax_backward, run)

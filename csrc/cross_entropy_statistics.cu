// Statistics of rows of logits, each read once: a block a row, the maximum raised on the way. Math: cross_entropy.h.
#include "cross_entropy.cuh"

namespace {

template <typename T, int VEC>
__global__ void __launch_bounds__(MAX_THREADS)
    cross_entropy_statistics(const T *__restrict__ logits, const int64_t *__restrict__ targets, compute_t<T> *__restrict__ maximum,
                             compute_t<T> *__restrict__ total, compute_t<T> *__restrict__ expected, int columns, int64_t row_stride,
                             int64_t vocab_start, compute_t<T> hit, compute_t<T> level) {
  using C = compute_t<T>;
  const T *row = logits + blockIdx.x * row_stride;
  const int target = local_target(targets[blockIdx.x], vocab_start, columns);
  const C target_logit = threadIdx.x == 0 && target >= 0 ? widen<C>(row[target]) : C(0);
  const Statistics<T> found = row_statistics<T, VEC>(row, columns, level != C(0));
  if (threadIdx.x > 0) return;
  maximum[blockIdx.x] = found.maximum;
  total[blockIdx.x] = found.exponentials();
  expected[blockIdx.x] = hit * target_logit + level * found.sum;
}

template <typename T, int VEC> int launch(const megalm_cross_entropy_statistics_params &p, megalm_stream stream) {
  using C = compute_t<T>;
  const auto kernel = cross_entropy_statistics<T, VEC>;
  // Fewer rows than multiprocessors: what one can have in flight is the limit.
  const int threads = row_threads(p.columns / VEC, p.rows <= processors() ? MAX_THREADS : MAX_THREADS / 2);
  MEGALM_LAUNCH(kernel, dim3(unsigned(p.rows)), dim3(threads), 0, stream, (const T *)p.logits, p.targets, (C *)p.maximum,
                (C *)p.total, (C *)p.expected, int(p.columns), p.row_stride, p.vocab_start, C(p.hit), C(p.level));
  return cudaSuccess;
}

int run(const megalm_cross_entropy_statistics_params &p, megalm_stream stream) {
  if (p.columns < 0 || p.columns > MAX_WIDTH || p.rows > MAX_ROWS) return cudaErrorInvalidValue;
  if (p.rows < 1) return cudaSuccess;
  MEGALM_DISPATCH(p.dtype, return aligned<T>(p.logits, p.row_stride) ? launch<T, vector_width<T>>(p, stream)
                                                                     : launch<T, 1>(p, stream));
  return cudaSuccess;
}

}  // namespace

MEGALM_DEFINE(cross_entropy_statistics, run)

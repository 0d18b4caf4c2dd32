// Loss and gradient where one rank holds the whole vocabulary: a block a row, which reads it for the statistics, and again, the
// other way round, for the gradient in its place: what it read last is still in a cache, however long the row. Math:
// cross_entropy.h.
#include "cross_entropy.cuh"

namespace {

// Bytes of rows in progress that the L2 cache keeps until they are read again; it has 40 MB or more on A100, H100 and later.
constexpr int64_t CACHED_BYTES = 36 << 20;

template <typename T, int VEC>
__global__ void __launch_bounds__(MAX_THREADS)
    cross_entropy_loss(T *logits, const int64_t *__restrict__ targets, const double *__restrict__ weight, double *__restrict__ loss,
                       int width, int columns, int64_t row_stride, compute_t<T> hit, compute_t<T> level, double z_loss) {
  using C = compute_t<T>;
  T *row = logits + blockIdx.x * row_stride;
  const int target = local_target(targets[blockIdx.x], 0, columns);
  const C target_logit = threadIdx.x == 0 && target >= 0 ? widen<C>(row[target]) : C(0);
  const Statistics<T> found = row_statistics<T, VEC>(row, columns, level != C(0));
  __syncthreads();  // the target's logit has been read, which another thread will write

  const int count = columns / VEC;
  int batch = batches_of(count) - 1;
  Pack<T, VEC> now[PACKS], next[PACKS];
  fetch(next, row, batch, count);
  C slope = C(1);
  if (z_loss != 0.0) slope += C(2) * C(z_loss) * (found.maximum + logarithm(found.exponentials()));
  if (threadIdx.x == 0) {
    const double lse = double(found.maximum) + log(double(found.exponentials()));
    loss[blockIdx.x] = weight[blockIdx.x] * (lse - double(hit * target_logit + level * found.sum) + z_loss * lse * lse);
  }
  const C scale = C(weight[blockIdx.x]);
  const Gradient<T> gradient{found.base, scale * slope / found.total, scale * level, scale * hit, target};
  for (; batch >= 0; batch--) {
#pragma unroll
    for (int p = 0; p < PACKS; p++) now[p] = next[p];
    fetch(next, row, batch - 1, count);
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
      const int at = (batch * PACKS + p) * int(blockDim.x) + int(threadIdx.x);
      if (at < count) gradient.write(row, at, now[p]);
    }
  }
  gradient.write_rest(row, count * VEC, columns, width);
}

template <typename T, int VEC> int launch(const megalm_cross_entropy_loss_params &p, megalm_stream stream) {
  using C = compute_t<T>;
  const auto kernel = cross_entropy_loss<T, VEC>;
  // Two rows a multiprocessor hide each other's reductions; where the cache can't hold them, or rows are few, one takes it whole.
  const int64_t pairs = int64_t(2) * processors();
  const bool whole = p.rows <= processors() || pairs * p.columns * int64_t(sizeof(T)) > CACHED_BYTES;
  const int threads = row_threads(p.columns / VEC, whole ? MAX_THREADS : MAX_THREADS / 2);
  MEGALM_LAUNCH(kernel, dim3(unsigned(p.rows)), dim3(threads), 0, stream, (T *)p.logits, p.targets, p.weight, p.loss, int(p.width),
                int(p.columns), p.row_stride, C(p.hit), C(p.level), p.z_loss);
  return cudaSuccess;
}

int run(const megalm_cross_entropy_loss_params &p, megalm_stream stream) {
  if (p.columns < 1 || p.columns > p.width || p.width > MAX_WIDTH || p.rows > MAX_ROWS) return cudaErrorInvalidValue;
  if (p.rows < 1) return cudaSuccess;
  MEGALM_DISPATCH(p.dtype, return aligned<T>(p.logits, p.row_stride) ? launch<T, vector_width<T>>(p, stream)
                                                                     : launch<T, 1>(p, stream));
  return cudaSuccess;
}

}  // namespace

MEGALM_DEFINE(cross_entropy_loss, run)

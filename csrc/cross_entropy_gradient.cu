// The gradient in the place of the logits, from the log-sum-exp of the whole vocabulary: each element is read and written once, in
// tiles, so that few rows fill the device too. Math: cross_entropy.h.
#include "cross_entropy.cuh"

namespace {

constexpr int TILE_THREADS = 256;

// Block b has tile b % tiles of row b / tiles: TILE_THREADS * PACKS packs; the last one has what is behind the packs too.
template <typename T, int VEC>
__global__ void __launch_bounds__(TILE_THREADS)
    cross_entropy_gradient(T *logits, const int64_t *__restrict__ targets, const double *__restrict__ logsumexp,
                           const double *__restrict__ weight, int width, int columns, int64_t row_stride, int64_t vocab_start,
                           unsigned tiles, compute_t<T> hit, compute_t<T> level, compute_t<T> z_loss) {
  using C = compute_t<T>;
  const unsigned index = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  T *row = logits + index * row_stride;
  const int count = columns / VEC;
  Pack<T, VEC> packs[PACKS];
  fetch(packs, row, int(tile), count);
  C rest;
  const double lse = logsumexp[index];
  const C base = Power<T>::base(lse, rest), scale = C(weight[index]);
  const Gradient<T> gradient{base, scale * rest * (C(1) + C(2) * z_loss * C(lse)), scale * level, scale * hit,
                             local_target(targets[index], vocab_start, columns)};
#pragma unroll
  for (int p = 0; p < PACKS; p++) {
    const int at = (int(tile) * PACKS + p) * TILE_THREADS + int(threadIdx.x);
    if (at < count) gradient.write(row, at, packs[p]);
  }
  if (tile + 1 == tiles) gradient.write_rest(row, count * VEC, columns, width);
}

template <typename T, int VEC> int launch(const megalm_cross_entropy_gradient_params &p, megalm_stream stream) {
  using C = compute_t<T>;
  const auto kernel = cross_entropy_gradient<T, VEC>;
  const int64_t tiles = max(int64_t(1), ceil_div(p.columns / VEC, int64_t(TILE_THREADS * PACKS)));
  if (p.rows * tiles > MAX_ROWS) return cudaErrorInvalidValue;
  MEGALM_LAUNCH(kernel, dim3(unsigned(p.rows * tiles)), dim3(TILE_THREADS), 0, stream, (T *)p.logits, p.targets, p.logsumexp,
                p.weight, int(p.width), int(p.columns), p.row_stride, p.vocab_start, unsigned(tiles), C(p.hit), C(p.level),
                C(p.z_loss));
  return cudaSuccess;
}

int run(const megalm_cross_entropy_gradient_params &p, megalm_stream stream) {
  if (p.columns < 0 || p.columns > p.width || p.width > MAX_WIDTH || p.rows > MAX_ROWS) return cudaErrorInvalidValue;
  if (p.rows < 1) return cudaSuccess;
  MEGALM_DISPATCH(p.dtype, return aligned<T>(p.logits, p.row_stride) ? launch<T, vector_width<T>>(p, stream)
                                                                     : launch<T, 1>(p, stream));
  return cudaSuccess;
}

}  // namespace

MEGALM_DEFINE(cross_entropy_gradient, run)

// bias_dropout_add, forward: one pass, each element read once, one call of Philox for four elements. Math: dropout.h.
#include "common/hidden_mask.cuh"
#include "dropout.h"

namespace {

constexpr int THREADS = 256, UNROLL = 2;

template <typename T, int VEC>
__global__ void __launch_bounds__(THREADS)
    dropout_forward(const T *__restrict__ x, const T *__restrict__ bias, const T *__restrict__ residual, T *__restrict__ out,
                    const HiddenMask mask, Divisor packs_a_row, uint32_t total, compute_t<T> scale) {
  using C = compute_t<T>;
  const uint32_t first = blockIdx.x * (THREADS * UNROLL) + threadIdx.x;
  Pack<T, VEC> values[UNROLL], others[UNROLL];
#pragma unroll
  for (int u = 0; u < UNROLL; u++) {
    const uint32_t pack = first + u * THREADS;
    values[u] = others[u] = Pack<T, VEC>{};
    if (pack >= total) continue;
    values[u] = load<VEC>(x + int64_t(pack) * VEC);
    if (residual != nullptr) others[u] = load<VEC>(residual + int64_t(pack) * VEC);
  }
#pragma unroll
  for (int u = 0; u < UNROLL; u++) {
    const uint32_t pack = first + u * THREADS;
    if (pack >= total) continue;
    const uint32_t row = packs_a_row(pack);
    const int column = int(pack - row * packs_a_row.divisor) * VEC;
    bool kept[VEC];
    mask.keep(kept, row, column);
    Pack<T, VEC> shift{};
    if (bias != nullptr) shift = load<VEC>(bias + column);
    C values_out[VEC];
#pragma unroll
    for (int i = 0; i < VEC; i++) {
      const C value = bias == nullptr ? values[u][i] : values[u][i] + shift[i];
      values_out[i] = others[u][i] + (kept[i] ? value * scale : C(0));
    }
    store<VEC>(out + int64_t(pack) * VEC, values_out);
  }
}

template <typename T, int VEC> int launch(const megalm_dropout_forward_params &p, megalm_stream stream) {
  const int64_t packs_a_row = p.width / VEC, total = p.rows * packs_a_row;
  if (total > INT32_MAX) return cudaErrorInvalidValue;
  const auto kernel = dropout_forward<T, VEC>;
  MEGALM_LAUNCH(kernel, dim3(unsigned(ceil_div(total, int64_t(THREADS * UNROLL)))), dim3(THREADS), 0, stream, (const T *)p.x,
                (const T *)p.bias, (const T *)p.residual, (T *)p.out, hidden_mask(p), Divisor(uint32_t(packs_a_row)),
                uint32_t(total), compute_t<T>(p.scale));
  return cudaSuccess;
}

template <typename T> int run_typed(const megalm_dropout_forward_params &p, megalm_stream stream) {
  constexpr int VEC = vector_width<T>;
  const bool vectors = p.width % VEC == 0 && aligned<T>(p.x) && aligned<T>(p.bias) && aligned<T>(p.residual) && aligned<T>(p.out);
  return vectors ? launch<T, VEC>(p, stream) : launch<T, 1>(p, stream);
}

int run(const megalm_dropout_forward_params &p, megalm_stream stream) {
  if (!sizes_allowed(p)) return cudaErrorInvalidValue;
  if (p.rows < 1) return cudaSuccess;
  MEGALM_DISPATCH(p.dtype, return run_typed<T>(p, stream));
  return cudaSuccess;
}

}  // namespace

MEGALM_DEFINE(dropout_forward, run)

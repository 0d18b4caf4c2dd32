// swiglu, geglu and gelu with a bias, forward: one pass, each element read once. Math: activation.h.
#include "common/activations.cuh"

namespace {

// GATED: x is gate and up side by side; else `bias`, where given, is added.
template <typename T, int VEC, typename Function, bool GATED, int UNROLL>
__global__ void __launch_bounds__(FLAT_THREADS)
    activation_forward(const T *__restrict__ x, const T *__restrict__ bias, T *__restrict__ y, RowAddress address,
                       Divisor packs_a_row, uint32_t total, int width) {
  using C = compute_t<T>;
  const uint32_t first = blockIdx.x * (FLAT_THREADS * UNROLL) + threadIdx.x;
  Pack<T, VEC> values[UNROLL], others[UNROLL];
#pragma unroll
  for (int u = 0; u < UNROLL; u++) {
    const uint32_t pack = first + u * FLAT_THREADS;
    values[u] = others[u] = Pack<T, VEC>{};
    if (pack >= total) continue;
    const uint32_t row = packs_a_row(pack), column = (pack - row * packs_a_row.divisor) * VEC;
    const T *from = x + address(row) + column;
    values[u] = load<VEC>(from);
    if (GATED) others[u] = load<VEC>(from + width);
    else if (bias != nullptr) others[u] = load<VEC>(bias + column);
  }
#pragma unroll
  for (int u = 0; u < UNROLL; u++) {
    const uint32_t pack = first + u * FLAT_THREADS;
    if (pack >= total) continue;
    C out[VEC];
#pragma unroll
    for (int i = 0; i < VEC; i++) {
      out[i] = GATED ? Function::value(values[u][i]) * others[u][i] : Function::value(values[u][i] + others[u][i]);
    }
    store<VEC>(y + int64_t(pack) * VEC, out);
  }
}

template <typename T, int VEC> int launch(const megalm_activation_forward_params &p, megalm_stream stream) {
  const int64_t packs_a_row = p.width / VEC, total = p.rows * packs_a_row;
  if (total > MAX_PACKS) return cudaErrorInvalidValue;
  const RowAddress address{p.outer_stride, p.inner_stride, uint32_t(p.inner)};
  MEGALM_ACTIVATION_DISPATCH(p.activation, (sizeof(T) > 2), {
    constexpr int UNROLL = GATED ? 2 : 4;
    const auto kernel = activation_forward<T, VEC, FUNCTION, GATED, UNROLL>;
    const dim3 grid(unsigned(ceil_div(total, int64_t(FLAT_THREADS * UNROLL))));
    MEGALM_LAUNCH(kernel, grid, dim3(FLAT_THREADS), 0, stream, (const T *)p.x, (const T *)p.bias, (T *)p.y, address,
                  Divisor(uint32_t(packs_a_row)), uint32_t(total), int(p.width));
  });
  return cudaSuccess;
}

template <typename T> int run_typed(const megalm_activation_forward_params &p, megalm_stream stream) {
  constexpr int VEC = vector_width<T>;
  const bool vectors = p.width % VEC == 0 && aligned<T>(p.x, p.outer_stride) && aligned<T>(p.x, p.inner_stride) &&
                       aligned<T>(p.bias) && aligned<T>(p.y);
  return vectors ? launch<T, VEC>(p, stream) : launch<T, 1>(p, stream);
}

int run(const megalm_activation_forward_params &p, megalm_stream stream) {
  if (!allowed(p.rows, p.width, p.inner, p.activation, p.bias)) return cudaErrorInvalidValue;
  if (p.rows < 1) return cudaSuccess;
  MEGALM_DISPATCH(p.dtype, return run_typed<T>(p, stream));
  return cudaSuccess;
}

}  // namespace

MEGALM_DEFINE(activation_forward, run)

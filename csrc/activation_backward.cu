// swiglu, geglu and gelu with a bias, backward: one pass, each element read once. Math: activation.h.
//
// Without a bias, threads go over the elements in their order. With one, blocks go down tiles of columns, so that the sum over rows
// stays in registers.
#include "common/activations.cuh"
#include "common/column_tiles.cuh"
#include "common/columns.cuh"

namespace {

template <typename T, int VEC, typename Function, bool GATED, int UNROLL>
__global__ void __launch_bounds__(FLAT_THREADS)
    activation_backward(const T *__restrict__ grad_y, const T *__restrict__ x, T *__restrict__ grad_x, RowAddress address,
                        Divisor packs_a_row, uint32_t total, int width) {
  using C = compute_t<T>;
  const uint32_t first = blockIdx.x * (FLAT_THREADS * UNROLL) + threadIdx.x;
  Pack<T, VEC> grads[UNROLL], values[UNROLL], ups[UNROLL];
  int64_t places[UNROLL];
#pragma unroll
  for (int u = 0; u < UNROLL; u++) {
    const uint32_t pack = first + u * FLAT_THREADS;
    grads[u] = values[u] = ups[u] = Pack<T, VEC>{};
    places[u] = -1;
    if (pack >= total) continue;
    const uint32_t row = packs_a_row(pack), column = (pack - row * packs_a_row.divisor) * VEC;
    const T *from = x + address(row) + column;
    grads[u] = load<VEC>(grad_y + int64_t(pack) * VEC);
    values[u] = load<VEC>(from);
    if (GATED) ups[u] = load<VEC>(from + width);
    places[u] = GATED ? int64_t(row) * 2 * width + column : int64_t(pack) * VEC;
  }
#pragma unroll
  for (int u = 0; u < UNROLL; u++) {
    if (places[u] < 0) continue;
    C grad_values[VEC], grad_ups[VEC];
#pragma unroll
    for (int i = 0; i < VEC; i++) {
      C value, slope;
      Function::both(values[u][i], value, slope);
      grad_values[i] = grads[u][i] * slope;
      if (!GATED) continue;
      grad_values[i] *= ups[u][i];
      grad_ups[i] = grads[u][i] * value;
    }
    store<VEC>(grad_x + places[u], grad_values);
    if (GATED) store<VEC>(grad_x + places[u] + width, grad_ups);
  }
}

constexpr int TILE_UNROLL = 2;

template <typename T, int VEC>
__global__ void __launch_bounds__(WARP * TILE_ROWS)
    gelu_bias_backward(const T *__restrict__ grad_y, const T *__restrict__ x, const T *__restrict__ bias, T *__restrict__ grad_x,
                       compute_t<T> *__restrict__ partial, RowAddress address, uint32_t rows, int width) {
  using C = compute_t<T>;
  constexpr bool PRECISE = sizeof(T) > 2;
  const int column = (blockIdx.x * WARP + threadIdx.x) * VEC;
  const bool inside = column < width;
  Pack<T, VEC> shift{};
  if (inside) shift = load<VEC>(bias + column);
  C sums[VEC] = {};
  const uint32_t step = gridDim.y * (TILE_ROWS * TILE_UNROLL);
  for (uint32_t first = blockIdx.y * (TILE_ROWS * TILE_UNROLL) + threadIdx.y; inside && first < rows; first += step) {
    Pack<T, VEC> grads[TILE_UNROLL], values[TILE_UNROLL];
#pragma unroll
    for (int u = 0; u < TILE_UNROLL; u++) {
      const uint32_t row = first + u * TILE_ROWS;
      grads[u] = values[u] = Pack<T, VEC>{};
      if (row >= rows) continue;
      grads[u] = load<VEC>(grad_y + int64_t(row) * width + column);
      values[u] = load<VEC>(x + address(row) + column);
    }
#pragma unroll
    for (int u = 0; u < TILE_UNROLL; u++) {
      const uint32_t row = first + u * TILE_ROWS;
      if (row >= rows) continue;
      C out[VEC];
#pragma unroll
      for (int i = 0; i < VEC; i++) {
        C value, slope;
        Gelu<PRECISE>::both(values[u][i] + shift[i], value, slope);
        out[i] = grads[u][i] * slope;
        sums[i] += out[i];
      }
      store<VEC>(grad_x + int64_t(row) * width + column, out);
    }
  }
  leave_tile_sums<VEC>(sums, partial, width);
}

// Either launches or only says how many blocks of partial sums there will be: both must come from one place.
struct Launcher {
  const megalm_activation_backward_params &p;
  megalm_stream stream;
  bool count_only;
  int64_t blocks = 0;
  int error = cudaSuccess;

  RowAddress address() const { return {p.outer_stride, p.inner_stride, uint32_t(p.inner)}; }

  template <typename T, int VEC> void tiles() {
    const auto kernel = gelu_bias_backward<T, VEC>;
    const dim3 grid = tile_grid(kernel, p.rows, p.width, VEC, TILE_UNROLL);
    blocks = grid.y;
    if (count_only) return;
    MEGALM_LAUNCH(kernel, grid, dim3(WARP, TILE_ROWS), 0, stream, (const T *)p.grad_y, (const T *)p.x, (const T *)p.bias,
                  (T *)p.grad_x, (compute_t<T> *)p.partial, address(), uint32_t(p.rows), int(p.width));
  }

  template <typename T, int VEC> void flat() {
    const int64_t packs_a_row = p.width / VEC, total = p.rows * packs_a_row;
    if (total > MAX_PACKS) error = cudaErrorInvalidValue;
    if (count_only || error != cudaSuccess) return;
    MEGALM_ACTIVATION_DISPATCH(p.activation, (sizeof(T) > 2), {
      constexpr int UNROLL = 2;
      const auto kernel = activation_backward<T, VEC, FUNCTION, GATED, UNROLL>;
      const dim3 grid(unsigned(ceil_div(total, int64_t(FLAT_THREADS * UNROLL))));
      MEGALM_LAUNCH(kernel, grid, dim3(FLAT_THREADS), 0, stream, (const T *)p.grad_y, (const T *)p.x, (T *)p.grad_x, address(),
                    Divisor(uint32_t(packs_a_row)), uint32_t(total), int(p.width));
    });
  }

  template <typename T> void typed() {
    constexpr int VEC = vector_width<T>;
    const bool vectors = p.width % VEC == 0 && aligned<T>(p.x, p.outer_stride) && aligned<T>(p.x, p.inner_stride) &&
                         aligned<T>(p.grad_y) && aligned<T>(p.bias) && aligned<T>(p.grad_x);
    if (p.bias != nullptr) return vectors ? tiles<T, VEC>() : tiles<T, 1>();
    return vectors ? flat<T, VEC>() : flat<T, 1>();
  }

  int run() {
    if (!allowed(p.rows, p.width, p.inner, p.activation, p.bias) || p.rows < 1) return cudaErrorInvalidValue;
    MEGALM_DISPATCH(p.dtype, typed<T>());
    return error;
  }
};

int run(const megalm_activation_backward_params &p, megalm_stream stream) {
  Launcher launcher{p, stream, false};
  const int error = launcher.run();
  if (error != cudaSuccess) return error;
  if (launcher.blocks != p.blocks) return cudaErrorInvalidValue;
  if (p.bias == nullptr) return cudaSuccess;
  MEGALM_DISPATCH(p.dtype, launch_sum_blocks((const compute_t<T> *)p.partial, (T *)p.grad_bias, (T *)nullptr, p.blocks, p.width,
                                             stream));
  return cudaSuccess;
}

}  // namespace

MEGALM_DEFINE(activation_backward, run)

int64_t megalm_activation_backward_blocks(const megalm_activation_backward_params *params) {
  Launcher launcher{*params, nullptr, true};
  return launcher.run() == cudaSuccess ? launcher.blocks : 0;
}

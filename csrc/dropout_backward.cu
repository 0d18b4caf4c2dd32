// bias_dropout_add, backward: the mask is drawn again, each gradient read once. Math: dropout.h.
//
// Without a bias, threads go over the elements in their order. With one, blocks go down tiles of columns, so that the sum over rows
// stays in registers.
#include "common/column_tiles.cuh"
#include "common/columns.cuh"
#include "common/hidden_mask.cuh"
#include "dropout.h"

namespace {

constexpr int THREADS = 256, UNROLL = 4;

template <typename T, int VEC>
__global__ void __launch_bounds__(THREADS)
    dropout_backward(const T *__restrict__ grad, T *__restrict__ grad_x, const HiddenMask mask, Divisor packs_a_row,
                     uint32_t total, compute_t<T> scale) {
  using C = compute_t<T>;
  const uint32_t first = blockIdx.x * (THREADS * UNROLL) + threadIdx.x;
  Pack<T, VEC> grads[UNROLL];
#pragma unroll
  for (int u = 0; u < UNROLL; u++) {
    const uint32_t pack = first + u * THREADS;
    grads[u] = Pack<T, VEC>{};
    if (pack < total) grads[u] = load<VEC>(grad + int64_t(pack) * VEC);
  }
#pragma unroll
  for (int u = 0; u < UNROLL; u++) {
    const uint32_t pack = first + u * THREADS;
    if (pack >= total) continue;
    const uint32_t row = packs_a_row(pack);
    bool kept[VEC];
    mask.keep(kept, row, int(pack - row * packs_a_row.divisor) * VEC);
    C out[VEC];
#pragma unroll
    for (int i = 0; i < VEC; i++) out[i] = kept[i] ? grads[u][i] * scale : C(0);
    store<VEC>(grad_x + int64_t(pack) * VEC, out);
  }
}

constexpr int TILE_UNROLL = 4;

template <typename T, int VEC>
__global__ void __launch_bounds__(WARP * TILE_ROWS)
    dropout_bias_backward(const T *__restrict__ grad, T *__restrict__ grad_x, compute_t<T> *__restrict__ partial,
                          const HiddenMask mask, uint32_t rows, compute_t<T> scale) {
  using C = compute_t<T>;
  const int width = mask.width, column = (blockIdx.x * WARP + threadIdx.x) * VEC;
  C sums[VEC] = {};
  const uint32_t step = gridDim.y * (TILE_ROWS * TILE_UNROLL);
  for (uint32_t first = blockIdx.y * (TILE_ROWS * TILE_UNROLL) + threadIdx.y; column < width && first < rows; first += step) {
    Pack<T, VEC> grads[TILE_UNROLL];
#pragma unroll
    for (int u = 0; u < TILE_UNROLL; u++) {
      const uint32_t row = first + u * TILE_ROWS;
      grads[u] = Pack<T, VEC>{};
      if (row < rows) grads[u] = load<VEC>(grad + int64_t(row) * width + column);
    }
#pragma unroll
    for (int u = 0; u < TILE_UNROLL; u++) {
      const uint32_t row = first + u * TILE_ROWS;
      if (row >= rows) continue;
      bool kept[VEC];
      mask.keep(kept, row, column);
      C out[VEC];
#pragma unroll
      for (int i = 0; i < VEC; i++) {
        out[i] = kept[i] ? grads[u][i] * scale : C(0);
        sums[i] += out[i];
      }
      store<VEC>(grad_x + int64_t(row) * width + column, out);
    }
  }
  leave_tile_sums<VEC>(sums, partial, width);
}

// Either launches or only says how many blocks of partial sums there will be: both must come from one place.
struct Launcher {
  const megalm_dropout_backward_params &p;
  megalm_stream stream;
  bool count_only;
  int64_t blocks = 0;
  int error = cudaSuccess;

  template <typename T, int VEC> void tiles() {
    const auto kernel = dropout_bias_backward<T, VEC>;
    const dim3 grid = tile_grid(kernel, p.rows, p.width, VEC, TILE_UNROLL);
    blocks = grid.y;
    if (count_only) return;
    MEGALM_LAUNCH(kernel, grid, dim3(WARP, TILE_ROWS), 0, stream, (const T *)p.grad, (T *)p.grad_x, (compute_t<T> *)p.partial,
                  hidden_mask(p), uint32_t(p.rows), compute_t<T>(p.scale));
  }

  template <typename T, int VEC> void flat() {
    const int64_t packs_a_row = p.width / VEC, total = p.rows * packs_a_row;
    if (total > INT32_MAX) error = cudaErrorInvalidValue;
    if (count_only || error != cudaSuccess) return;
    const auto kernel = dropout_backward<T, VEC>;
    MEGALM_LAUNCH(kernel, dim3(unsigned(ceil_div(total, int64_t(THREADS * UNROLL)))), dim3(THREADS), 0, stream, (const T *)p.grad,
                  (T *)p.grad_x, hidden_mask(p), Divisor(uint32_t(packs_a_row)), uint32_t(total), compute_t<T>(p.scale));
  }

  template <typename T> void typed() {
    constexpr int VEC = vector_width<T>;
    const bool vectors = p.width % VEC == 0 && aligned<T>(p.grad) && aligned<T>(p.grad_x);
    if (p.grad_bias != nullptr) return vectors ? tiles<T, VEC>() : tiles<T, 1>();
    return vectors ? flat<T, VEC>() : flat<T, 1>();
  }

  int run() {
    if (!sizes_allowed(p) || p.rows < 1) return cudaErrorInvalidValue;
    MEGALM_DISPATCH(p.dtype, typed<T>());
    return error;
  }
};

int run(const megalm_dropout_backward_params &p, megalm_stream stream) {
  Launcher launcher{p, stream, false};
  const int error = launcher.run();
  if (error != cudaSuccess) return error;
  if (launcher.blocks != p.blocks) return cudaErrorInvalidValue;
  if (p.grad_bias == nullptr) return cudaSuccess;
  MEGALM_DISPATCH(p.dtype, launch_sum_blocks((const compute_t<T> *)p.partial, (T *)p.grad_bias, (T *)nullptr, p.blocks, p.width,
                                             stream));
  return cudaSuccess;
}

}  // namespace

MEGALM_DEFINE(dropout_backward, run)

int64_t megalm_dropout_backward_blocks(const megalm_dropout_backward_params *params) {
  Launcher launcher{*params, nullptr, true};
  return launcher.run() == cudaSuccess ? launcher.blocks : 0;
}

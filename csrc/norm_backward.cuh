// What the ways of norm_backward.cu share: arguments, and how sums over rows leave a block.
#pragma once
#include "common/reduce.cuh"
#include "common/rows.cuh"
#include "norm.h"

namespace norm_backward {

template <typename T> struct Arguments {
  const T *grad_y, *grad_sum, *sum, *weight;
  const compute_t<T> *mean, *rstd;
  T *grad_x;
  compute_t<T> *partial;
  RowAddress address;
  uint32_t rows;
  int width;
};

// Of one row: what a thread needs of it besides its elements, 0 beyond the last row.
template <typename C> struct RowStatistics {
  C mean, rstd;
  template <typename T> __device__ __forceinline__ void fetch(const Arguments<T> &a, uint32_t row) {
    mean = row < a.rows && a.mean != nullptr ? a.mean[row] : C(0);
    rstd = row < a.rows ? a.rstd[row] : C(0);
  }
};

// What a pack adds to the sums over its row (of g xhat and of g) and over its columns.
template <bool LAYER_NORM, typename T, int VEC, typename C = compute_t<T>>
__device__ __forceinline__ void add(Two<C> &sums, C (&weight_sums)[VEC], C (&bias_sums)[VEC], const Pack<T, VEC> &grads,
                                    const Pack<T, VEC> &values, const Pack<T, VEC> &gain, const RowStatistics<C> &row) {
#pragma unroll
  for (int i = 0; i < VEC; i++) {
    const C xhat = (values[i] - row.mean) * row.rstd, grad = grads[i], scaled = grad * gain[i];
    sums.first += scaled * xhat;
    if (LAYER_NORM) sums.second += scaled;
    weight_sums[i] += grad * xhat;
    if (LAYER_NORM) bias_sums[i] += grad;
  }
}

// grad_x of a pack; `means` are of g xhat and of g over the row.
template <typename T, int VEC, typename C = compute_t<T>>
__device__ __forceinline__ void write(T *to, const Pack<T, VEC> &grads, const Pack<T, VEC> &values, const Pack<T, VEC> &gain,
                                      const Pack<T, VEC> &others, const RowStatistics<C> &row, const Two<C> &means) {
  C out[VEC];
#pragma unroll
  for (int i = 0; i < VEC; i++) {
    const C xhat = (values[i] - row.mean) * row.rstd;
    out[i] = row.rstd * (grads[i] * gain[i] - means.first * xhat - means.second) + others[i];
  }
  store<VEC>(to, out);
}

// Neighbouring columns' sums, 16 bytes a store where they are as many: each store of a warp goes to as few lines as it can.
template <int VEC, typename C> __device__ __forceinline__ void leave(C *to, const C (&sums)[VEC]) {
  constexpr int EACH = VEC < vector_width<C> ? VEC : vector_width<C>;
#pragma unroll
  for (int from = 0; from < VEC; from += EACH) {
    C some[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) some[i] = sums[from + i];
    store<EACH>(to + from, some);
  }
}

}  // namespace norm_backward

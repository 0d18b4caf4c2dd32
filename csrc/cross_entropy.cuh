// What the kernels of the cross entropy share: how threads go through a row of logits, its statistics, the gradient of an element.
#pragma once
#include "common/power.cuh"
#include "common/reduce.cuh"
#include "cross_entropy.h"

constexpr int64_t MAX_WIDTH = INT32_MAX / 2, MAX_ROWS = INT32_MAX;
constexpr int MAX_THREADS = 1024;
constexpr int PACKS = 4;  // a batch: what a thread has in flight at once, while it computes with as much again

// Packs of batch `batch` of this thread, of the `count` whole packs of a row; -inf, which adds nothing to a sum, beyond them.
template <typename T, int VEC>
__device__ __forceinline__ void fetch(Pack<T, VEC> (&packs)[PACKS], const T *row, int batch, int count) {
  compute_t<T> nothing[VEC];
#pragma unroll
  for (int i = 0; i < VEC; i++) nothing[i] = compute_t<T>(-INFINITY);
#pragma unroll
  for (int p = 0; p < PACKS; p++) {
    const int at = (batch * PACKS + p) * int(blockDim.x) + int(threadIdx.x);
    packs[p].set(nothing);
    if (unsigned(at) < unsigned(count)) packs[p] = load<VEC>(row + at * VEC);  // a batch before the first has none
  }
}

// Batches that the threads of this block need for `count` packs.
__device__ __forceinline__ int batches_of(int count) { return ceil_div(count, PACKS * int(blockDim.x)); }

// Of some logits: their maximum, the sum of their powers with its base (power.cuh), and the sum of x.
template <typename T> struct Statistics {
  using C = compute_t<T>;
  C maximum = C(-INFINITY), base = C(-INFINITY), total = C(0), sum = C(0);

  __device__ __forceinline__ void raise(C value) {
    if (!(value > maximum)) return;  // which a thread passes after few packs
    const C raised = Power<T>::base(value);
    total *= Power<T>::change(base, raised);
    maximum = value;
    base = raised;
  }
  // What powers are taken with: -inf less -inf is no number.
  __device__ __forceinline__ C origin() const { return maximum == C(-INFINITY) ? C(0) : base; }

  template <int VEC> __device__ __forceinline__ void add(const Pack<T, VEC> &pack) {
    C high = maximum, part = C(0);
#pragma unroll
    for (int i = 0; i < VEC; i++) high = max(high, pack[i]);
    raise(high);
    const C from = origin();
#pragma unroll
    for (int i = 0; i < VEC; i++) part += Power<T>::of(pack[i], from);
    total += part;
  }
  __device__ __forceinline__ void add(C x) {
    raise(max(maximum, x));
    total += Power<T>::of(x, origin());
  }
  // Over the block; every thread gets the result.
  __device__ __forceinline__ Statistics reduced() const {
    Statistics whole;
    whole.maximum = reduce_row<Max>(maximum);
    whole.base = Power<T>::base(whole.maximum);
    const C scale = maximum == C(-INFINITY) ? C(1) : Power<T>::change(base, whole.base);  // 0 or a NaN stays what it is
    const Two<C> sums = sum_row(Two<C>{total * scale, sum});
    whole.total = sums.first;
    whole.sum = sums.second;
    return whole;
  }
  // sum of exp(x - maximum).
  __device__ __forceinline__ C exponentials() const {
    return maximum == C(-INFINITY) ? total : Power<T>::exact(total, maximum, base);
  }
};

// The statistics of a row, the sum only where `with_sum`: whole packs with the next batch in flight, then the few elements left.
template <typename T, int VEC>
__device__ __forceinline__ Statistics<T> row_statistics(const T *row, int columns, bool with_sum) {
  using C = compute_t<T>;
  const int count = columns / VEC, batches = batches_of(count);
  Statistics<T> found;
  Pack<T, VEC> now[PACKS], next[PACKS];
  fetch(next, row, 0, count);
  for (int batch = 0; batch < batches; batch++) {
#pragma unroll
    for (int p = 0; p < PACKS; p++) now[p] = next[p];
    fetch(next, row, batch + 1, count);
#pragma unroll
    for (int p = 0; p < PACKS; p++) found.add(now[p]);
    if (!with_sum) continue;
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
      if ((batch * PACKS + p) * int(blockDim.x) + int(threadIdx.x) >= count) continue;
#pragma unroll
      for (int i = 0; i < VEC; i++) found.sum += now[p][i];
    }
  }
  for (int column = count * VEC + threadIdx.x; column < columns; column += blockDim.x) {
    const C x = widen<C>(row[column]);
    found.add(x);
    found.sum += with_sum ? x : C(0);
  }
  return found.reduced();
}

// The target's column here, or -1.
__device__ __forceinline__ int local_target(int64_t target, int64_t vocab_start, int columns) {
  const int64_t column = target - vocab_start;
  return column >= 0 && column < columns ? int(column) : -1;
}

// The gradient of an element: its power times factor, less `level`, and less `hit` in the target's column.
template <typename T> struct Gradient {
  using C = compute_t<T>;
  C base, factor, level, hit;
  int target;

  __device__ __forceinline__ C of(C x) const { return multiply_add(Power<T>::of(x, base), factor, -level); }
  template <int VEC> __device__ __forceinline__ void write(T *row, int at, const Pack<T, VEC> &pack) const {
    C values[VEC];
#pragma unroll
    for (int i = 0; i < VEC; i++) values[i] = of(pack[i]);
    const int place = target - at * VEC;
    if (place >= 0 && place < VEC) {
#pragma unroll
      for (int i = 0; i < VEC; i++) values[i] -= i == place ? hit : C(0);
    }
    store<VEC>(row + at * VEC, values);
  }
  // The columns behind the whole packs, one at a time: the few that are left, and padding.
  __device__ __forceinline__ void write_rest(T *row, int first, int columns, int width) const {
    for (int column = first + threadIdx.x; column < width; column += blockDim.x) {
      C value = C(0);
      if (column < columns) value = of(widen<C>(row[column])) - (column == target ? hit : C(0));
      row[column] = narrow<T>(value);
    }
  }
};

// Threads for a row of `packs`, so that each has two batches of it, up to `most`.
inline int row_threads(int64_t packs, int most) {
  int threads = WARP;
  while (threads < most && int64_t(threads) * 2 * PACKS < packs) threads *= 2;
  return threads;
}

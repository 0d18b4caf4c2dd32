// How a kernel that holds whole rows in registers is laid out: how many threads a row, packs a thread and rows a block.
#pragma once
#include "common/common.cuh"

// A row of `width` elements as packs of VEC, PACKS of them a thread: thread t has packs t, t + threads, t + 2 threads ...
struct RowShape {
  int threads;  // of one row: a power of two up to 32, else a multiple of 32
  int rows;     // of one block, 1 where a row takes more than a warp
  dim3 block() const { return dim3(threads, rows); }
};

constexpr int SMALL_BLOCK = 256;

inline RowShape row_shape(int64_t width, int vec, int packs) {
  const int64_t needed = ceil_div(ceil_div(width, int64_t(vec)), int64_t(packs));
  if (needed > WARP) return {int(ceil_div(needed, int64_t(WARP)) * WARP), 1};
  int threads = 1;
  while (threads < needed) threads *= 2;
  return {threads, SMALL_BLOCK / threads};
}

// Rows of a tensor whose leading dims are two strided ones: row r is at (r / inner) * outer_stride + (r % inner) * inner_stride.
struct RowAddress {
  int64_t outer_stride, inner_stride;
  uint32_t inner;
  __device__ __forceinline__ int64_t operator()(uint32_t row) const {
    if (inner == 1) return row * outer_stride;
    return (row / inner) * outer_stride + (row % inner) * inner_stride;
  }
};

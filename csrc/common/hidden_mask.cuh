// The keyed dropout mask of hidden states [rows, width] as dropout.h lays them out: row r is position r / batch of sample r % batch.
#pragma once
#include "common/divide.cuh"
#include "common/philox.cuh"

struct HiddenMask {
  KeyedMask mask;
  const int64_t *samples;
  Divisor batch;
  int64_t start;  // the first position that is here
  int width;

  // Of N neighbours in a row, the first in `column`, a multiple of N.
  template <int N> __device__ __forceinline__ void keep(bool (&kept)[N], uint32_t row, int column) const {
    const uint32_t position = batch(row);
    mask.keep(kept, (start + position) * width + column, samples[row - position * batch.divisor]);
  }
};

template <typename Params> HiddenMask hidden_mask(const Params &p) {
  return {{p.key0, p.key1, p.threshold}, (const int64_t *)p.samples, Divisor(uint32_t(p.batch)), p.start, int(p.width)};
}

template <typename Params> bool sizes_allowed(const Params &p) {
  return p.width >= 1 && p.width <= INT32_MAX && p.rows <= INT32_MAX && p.batch >= 1 && p.batch <= INT32_MAX && p.start >= 0;
}

// Bodies of common/mma.cuh for the CPU. A copy in the background is made as late as the waiting allows in an even order of the shim,
// so that a missed wait shows, and at once in an odd one, so that a copy over what others still read shows.
#pragma once
#include "common/common.cuh"

inline void copy_async(void *to, const void *from, bool valid) {
  shim::Fiber &f = shim::self();
  f.copies.push_back({to, from, 16, valid});
  if (shim::state().order % 2 == 1) f.copies.back().make();
}
inline void copy_commit() {
  shim::Fiber &f = shim::self();
  f.groups.push_back(std::move(f.copies));
  f.copies.clear();
}
template <int N> void copy_wait() {
  shim::Fiber &f = shim::self();
  for (; f.groups.size() > N; f.groups.pop_front())
    if (shim::state().order % 2 == 0)
      for (const shim::Copy &copy : f.groups.front()) copy.make();
}

namespace shim {
inline uint16_t element(const void *row, int index) { return static_cast<const uint16_t *>(row)[index]; }

// The rows that all lanes name, in this lane's fragment: `transposed` takes columns.
inline void gather_matrices(uint32_t (&r)[4], const void *row, bool transposed) {
  if (reinterpret_cast<uintptr_t>(row) % 16) fail("ldmatrix of a row that is not 16-byte aligned");
  const auto slots = exchange(~0u, &row, sizeof row);
  const int g = self().lane / 4, t = self().lane % 4;
  const void *rows[LANES];
  for (int lane = 0; lane < LANES; lane++) rows[lane] = lane_of<const void *>(slots, lane);
  for (int i = 0; i < 4; i++) {
    const uint16_t low = transposed ? element(rows[8 * i + 2 * t], g) : element(rows[8 * i + g], 2 * t);
    const uint16_t high = transposed ? element(rows[8 * i + 2 * t + 1], g) : element(rows[8 * i + g], 2 * t + 1);
    r[i] = low | uint32_t(high) << 16;
  }
}

template <typename T> float half_of(uint32_t word, int index) {
  return index % 2 == 0 ? low_half(T(), word) : high_half(T(), word);
}

template <typename T> void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Mine { uint32_t a[4], b[2]; } mine{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  const auto slots = exchange(~0u, &mine, sizeof mine);
  const int g = self().lane / 4, t = self().lane % 4;
  for (int i = 0; i < 4; i++) {
    const int row = g, upper = i / 2, column = 2 * t + i % 2;
    for (int quad = 0; quad < 4; quad++) {
      const Mine left = lane_of<Mine>(slots, row * 4 + quad), right = lane_of<Mine>(slots, column * 4 + quad);
      for (int half = 0; half < 2; half++)
        for (int bit = 0; bit < 2; bit++) c[i] += half_of<T>(left.a[upper + 2 * half], bit) * half_of<T>(right.b[half], bit);
    }
  }
}
}  // namespace shim

inline void load_matrices(uint32_t (&r)[4], const void *row) { shim::gather_matrices(r, row, false); }
inline void load_matrices_transposed(uint32_t (&r)[4], const void *row) { shim::gather_matrices(r, row, true); }
inline void multiply(const bf16 &, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  shim::multiply<bf16>(c, a, b0, b1);
}
inline void multiply(const f16 &, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  shim::multiply<f16>(c, a, b0, b1);
}

// What attention's kernels for sm_90a share: products of tiles that the copy engine brought, places in a ring of them, rows to memory,
// and what the launches ask. Math: attention.h.
#pragma once
#include "attention_common.cuh"
#include "common/wgmma.cuh"

namespace attention {

template <typename T> __host__ __device__ constexpr int panels(int width) { return ceil_div(width, PANEL<T>); }
template <typename T> constexpr int tile_bytes(int rows, int width) { return panels<T>(width) * rows * PANEL_ROW; }

// The first address from `pointer` on where tiles may start. The launch asks for SWIZZLE_BYTES more.
__device__ __forceinline__ unsigned char *first_tile(unsigned char *pointer) {
  return pointer + (SWIZZLE_BYTES - shared_offset(pointer) % SWIZZLE_BYTES) % SWIZZLE_BYTES;
}

// All panels of a tile of ROWS rows: one thread starts it, after barrier_expect.
template <typename T, int ROWS, int WIDTH>
__device__ __forceinline__ void load_tile(unsigned char *tile, const TensorMap &map, uint64_t *barrier, int row, int head, int batch) {
  constexpr int PANELS = panels<T>(WIDTH);
#pragma unroll
  for (int panel = 0; panel < PANELS; panel++)
    tensor_load(tile + panel * ROWS * PANEL_ROW, map, barrier, panel * PANEL<T>, row, head, batch);
}

// out [64, N] = rows from own_row on of a tile of OWN rows, times all N rows of another; over their WIDTH columns.
template <typename T, int WIDTH, int OWN, int N>
__device__ __forceinline__ void start_rows_by_rows(float (&out)[N / 8][4], const unsigned char *own, int own_row, const unsigned char *other) {
#pragma unroll
  for (int step = 0; step < WIDTH / STEP<T>; step++) {
    const int panel = step * STEP<T> / PANEL<T>, within = step % (PANEL<T> / STEP<T>);
    const uint64_t a = along_step(along(own + (panel * OWN + own_row) * PANEL_ROW), within);
    const uint64_t b = along_step(along(other + panel * N * PANEL_ROW), within);
    if (step == 0) Multiply<T, N>::template shared<false, Order::along, Order::along>(out, a, b);
    else Multiply<T, N>::template shared<true, Order::along, Order::along>(out, a, b);
  }
}

// out [64, N] += weights [64, ROWS] (a left operand) times a tile [ROWS, N]. A tile of bytes lies transposed, [N, ROWS], and out is that
// product alone.
template <typename T, int ROWS, int N>
__device__ __forceinline__ void start_weights_by_rows(float (&out)[N / 8][4], const uint32_t (&weights)[ROWS / STEP<T>][4], const unsigned char *tile) {
#pragma unroll
  for (int step = 0; step < ROWS / STEP<T>; step++)
    if constexpr (sizeof(T) == 1) {
      static_assert(ROWS == PANEL<T>, "a panel");
      const uint64_t b = along_step(along(tile), step);
      if (step == 0) Multiply<T, N>::template registers<false, Order::along>(out, weights[step], b);
      else Multiply<T, N>::template registers<true, Order::along>(out, weights[step], b);
    } else {
      Multiply<T, N>::template registers<true, Order::across>(out, weights[step], across_step(across(tile, ROWS * PANEL_ROW), step));
    }
}

// Products become scores; distance(n, i) is j - i - offset. What holds for all is asked before the loops, not in them.
template <int TILES, typename Distance>
__device__ __forceinline__ void to_scores(float (&values)[TILES][4], const Score &scored, Distance distance) {
  const auto each = [&](auto change) {
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) values[n][i] = change(values[n][i], n, i);
  };
  if (scored.capped) each([&](float x, int, int) { return scored.softcap * Score::tangent(x * scored.scale); });
  else each([&](float x, int, int) { return x * scored.scale; });
  if (scored.slope != 0.0f) each([&](float x, int n, int i) { return x + scored.slope * distance(n, i); });
}

// An accumulator, rounded, as the left operand of a product over its columns. Bytes stay with the thread that has them, which changes the
// order of the columns: place 4 t + c of 16 has column 8 (c / 2) + 2 t + c % 2 (key_of_place of attention_hopper_quantize.cuh).
template <typename T, int TILES>
__device__ __forceinline__ void as_weights(uint32_t (&weights)[TILES * 8 / STEP<T>][4], const float (&values)[TILES][4]) {
#pragma unroll
  for (int step = 0; step < TILES * 8 / STEP<T>; step++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if constexpr (sizeof(T) == 1) {
        const float *const left = &values[4 * step + i / 2 * 2][i % 2 * 2], *const right = &values[4 * step + i / 2 * 2 + 1][i % 2 * 2];
        weights[step][i] = four_bits(left[0], left[1], right[0], right[1]);
      } else {
        const float *const pair = &values[2 * step + i / 2][i % 2 * 2];
        weights[step][i] = pair_bits(T(), pair[0], pair[1]);
      }
    }
}

// A place in a ring of STAGES: which, and the parity of its phase, for the n-th tile that goes through.
template <int STAGES> struct Place {
  int stage, parity;
  __device__ __forceinline__ explicit Place(int n) : stage(n % STAGES), parity(n / STAGES % 2) {}
};

// A warp's share of a warpgroup's arrival.
__device__ __forceinline__ void warp_arrive(uint64_t *barrier) {
  if (threadIdx.x % WARP == 0) barrier_arrive(barrier);
}

// Rows g and g + 8 of this warp's 16, times their factors, to memory, 16 bytes a lane: the four lanes of a row trade their pairs.
// to: this lane's two rows; null: not there.
template <int WIDTH, typename T>
__device__ __forceinline__ void write_fragment(T *const (&to)[2], const float (&values)[WIDTH / 8][4], const float (&factor)[2]) {
  constexpr int CHUNKS = WIDTH / 8;
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int half = 0; half < 2; half++)
#pragma unroll
    for (int first = 0; first < CHUNKS; first += 4) {
      Pack<T, 8> pack;
      uint32_t(&words)[4] = pack.words;  // of chunk first + i; in the end lane i's of chunk first + t
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int chunk = first + i < CHUNKS ? first + i : first;
        words[i] = pair_bits(T(), values[chunk][2 * half] * factor[half], values[chunk][2 * half + 1] * factor[half]);
      }
#pragma unroll
      for (int bit = 1; bit < 4; bit *= 2)
#pragma unroll
        for (int i = 0; i < 4; i++)
          if ((i & bit) == 0) {
            const bool upper = t & bit;
            const uint32_t got = __shfl_xor_sync(ALL_LANES, upper ? words[i] : words[i + bit], bit);
            if (upper) words[i] = got;
            else words[i + bit] = got;
          }
      if (to[half] != nullptr && first + t < CHUNKS) store<8>(to[half] + (first + t) * 8, pack);
    }
}

// Of a batch entry: which keys its queries see.
template <typename Params> __device__ __forceinline__ Visible visible_of(const Params &p, int batch) {
  const auto bound = [&](const void *of) { return of == nullptr ? nullptr : (const int32_t *)of + batch * p.queries; };
  return {int(p.queries), int(p.keys), p.left, p.right, bound(p.first), bound(p.last)};
}

// Registers a thread of the two roles, by the warpgroups that multiply: what a launch with all of the register file gives, moved.
template <int CONSUMERS> struct Registers;
template <> struct Registers<2> { static constexpr int LOADS = 40, MULTIPLIES = 232; };
template <> struct Registers<3> { static constexpr int LOADS = 32, MULTIPLIES = 160; };

}  // namespace attention

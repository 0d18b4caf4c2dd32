// What attention's kernels share: which keys a query sees, tiles in shared memory, and scores from products. Math: attention.h.
#pragma once
#include "attention.h"
#include "common/mma.cuh"
#include "common/philox.cuh"

// The interval of keys that each query sees.
struct Visible {
  int queries, keys;
  int64_t left, right;
  const int32_t *first, *last;  // of this batch entry, or null

  __device__ __forceinline__ int begin(int i) const {
    int64_t low = left < 0 ? 0 : int64_t(i) + keys - queries - left;
    if (first != nullptr) low = max(low, int64_t(first[i]));
    return int(min(max(low, int64_t(0)), int64_t(keys)));
  }
  __device__ __forceinline__ int end(int i) const {
    int64_t high = right < 0 ? keys : int64_t(i) + keys - queries + right + 1;
    if (last != nullptr) high = min(high, int64_t(last[i]));
    return int(min(max(high, int64_t(0)), int64_t(keys)));
  }
};

// From a product of q and k to a score. Exponentials are powers of two: a score times `unit` is in units of log2 e. Where a score is a
// positive multiple of the product, the product stands for it and the scale is in the unit: nothing is to be done an element.
struct Score {
  float scale, softcap, slope, unit;
  bool plain, capped;

  __device__ static Score make(double scale, double softcap, const float *slopes, int head) {
    const bool capped = softcap > 0, plain = !capped && slopes == nullptr && scale > 0;
    return {float(capped ? scale / softcap : scale), float(softcap), slopes == nullptr ? 0.0f : slopes[head],
            plain ? float(scale * LOG2_E) : LOG2E, plain, capped};
  }
  // distance: j - i - offset.
  __device__ __forceinline__ float operator()(float product, int distance) const {
    float x = product * scale;
    if (capped) x = softcap * tangent(x);
    return x + slope * distance;
  }
  // tanh by one exponential: 1 - 2 / (1 + e^2x), which neither overflows nor cancels where it matters (|x| of 1e-3 loses 1e-4 of it).
  __device__ __forceinline__ static float tangent(float x) { return 1.0f - 2.0f / (1.0f + power_of_two(2 * LOG2E * x)); }
};

// The keyed dropout of one head's probabilities.
struct Dropped {
  KeyedMask mask;
  int64_t sample, first;  // first: the place of query 0 and key 0
  int64_t keys;
  float kept;
  bool on;

  template <typename Params> __device__ static Dropped make(const Params &p, int batch, int head) {
    const bool on = p.samples != nullptr;
    return {{p.key0, p.key1, p.threshold}, on ? ((const int64_t *)p.samples)[batch] : 0, (p.head_first + head) * p.queries * p.keys,
            p.keys, on ? float(p.kept) : 1.0f, on};
  }
  __device__ __forceinline__ bool keeps(int query, int key) const {
    bool kept_one[1];
    mask.keep(kept_one, first + query * keys + key, sample);
    return kept_one[0];
  }
  // For each element of an accumulator [16, 8 TILES] whether it is kept, as bit 4 n + i: a loop, as 32 generators side by side would
  // fill the instruction cache. Neighbours in a row are keys where ROWS_ARE_QUERIES, and mostly share a block of random words.
  template <int TILES, bool ROWS_ARE_QUERIES> __device__ __forceinline__ uint32_t bits(int row, int column) const {
    static_assert(TILES <= 8, "a bit an element");
    uint32_t result = 0;
#pragma unroll 1
    for (int pair = 0; pair < 2 * TILES; pair++) {
      const int at = row + pair % 2 * 8, beside = column + pair / 2 * 8 + int(threadIdx.x) % 4 * 2;
      bool both[2];
      const int64_t place = first + at * keys + beside;
      if (ROWS_ARE_QUERIES && place % 2 == 0) {
        mask.keep(both, place, sample);
      } else {
        both[0] = ROWS_ARE_QUERIES ? keeps(at, beside) : keeps(beside, at);
        both[1] = ROWS_ARE_QUERIES ? keeps(at, beside + 1) : keeps(beside + 1, at);
      }
      result |= (uint32_t(both[0]) | uint32_t(both[1]) << 1) << (2 * pair);
    }
    return result;
  }
};

// An accumulator times the mask's bits and a factor.
template <int TILES> __device__ __forceinline__ void drop(float (&values)[TILES][4], uint32_t bits, float kept) {
#pragma unroll
  for (int n = 0; n < TILES; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) values[n][i] = bits >> (4 * n + i) & 1 ? values[n][i] * kept : 0.0f;
}

// A tile [rows, WIDTH] of 16-bit elements in shared memory. Its 16-byte chunks are permuted within groups of eight by their row, so
// that the eight rows of a matrix lie in different banks.
template <int WIDTH> struct SharedTile {
  static constexpr int CHUNKS = WIDTH / 8, STRIDE = (WIDTH + 63) / 64 * 64;
  __device__ __forceinline__ static int at(int row, int chunk) { return row * STRIDE + (chunk ^ (row & 7)) * 8; }

  // Starts to copy rows [first, first + ROWS) of a tensor; rows from `rows` on are zeros.
  template <int ROWS, int THREADS, typename T>
  __device__ __forceinline__ static void fetch(T *tile, const T *from, int64_t stride, int first, int rows) {
#pragma unroll
    for (int index = threadIdx.x; index < ROWS * CHUNKS; index += THREADS) {
      const int row = index / CHUNKS, chunk = index % CHUNKS;
      const bool valid = first + row < rows;
      copy_async(tile + at(row, chunk), from + (valid ? (first + row) * stride + chunk * 8 : 0), valid);
    }
  }

  // The A fragment [16, 16] of rows from `row` and columns from 16 step.
  template <typename T> __device__ __forceinline__ static void left(uint32_t (&a)[4], const T *tile, int row, int step) {
    const int lane = threadIdx.x % WARP;
    load_matrices(a, tile + at(row + lane % 16, 2 * step + lane / 16));
  }
  // B fragments of two tiles of eight rows each: the product is over columns 16 step ..; b[0], b[1] are the first's.
  template <typename T> __device__ __forceinline__ static void right(uint32_t (&b)[4], const T *tile, int row, int step) {
    const int lane = threadIdx.x % WARP;
    load_matrices(b, tile + at(row + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
  }
  // B fragments where the product is over rows row .. row + 16, of columns 16 pair .. 16 pair + 16.
  template <typename T> __device__ __forceinline__ static void right_transposed(uint32_t (&b)[4], const T *tile, int row, int pair) {
    const int lane = threadIdx.x % WARP;
    load_matrices_transposed(b, tile + at(row + lane % 16, 2 * pair + lane / 16));
  }
};

// A warp's products. An accumulator [SETS][N / 8][4] is [16 SETS, N]: lane 4 g + t has rows g (elements 0, 1) and g + 8 (2, 3) of each
// set and columns 8 n + 2 t, + 1.

// out = own other^T: rows own_row .. of a tile [.., WIDTH] with all ROWS rows of another.
template <int WIDTH, int ROWS, int SETS, typename T>
__device__ __forceinline__ void rows_by_rows(float (&out)[SETS][ROWS / 8][4], const T *own, int own_row, const T *other) {
#pragma unroll
  for (int s = 0; s < SETS; s++)
#pragma unroll
    for (int n = 0; n < ROWS / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) out[s][n][i] = 0.0f;
#pragma unroll
  for (int step = 0; step < WIDTH / 16; step++) {
    uint32_t a[SETS][4];
#pragma unroll
    for (int s = 0; s < SETS; s++) SharedTile<WIDTH>::left(a[s], own, own_row + s * 16, step);
#pragma unroll
    for (int n = 0; n < ROWS / 8; n += 2) {
      uint32_t b[4];
      SharedTile<WIDTH>::right(b, other, n * 8, step);
#pragma unroll
      for (int s = 0; s < SETS; s++) {
        multiply(T(), out[s][n], a[s], b[0], b[1]);
        multiply(T(), out[s][n + 1], a[s], b[2], b[3]);
      }
    }
  }
}

// out += weights other: an accumulator [.., ROWS], rounded to T, with a tile [ROWS, WIDTH]. Two neighbouring accumulators lie as a
// left operand does.
template <int WIDTH, int ROWS, int SETS, typename T>
__device__ __forceinline__ void weights_by_rows(float (&out)[SETS][WIDTH / 8][4], const float (&weights)[SETS][ROWS / 8][4],
                                                const T *other) {
#pragma unroll
  for (int step = 0; step < ROWS / 16; step++) {
    uint32_t a[SETS][4];
#pragma unroll
    for (int s = 0; s < SETS; s++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float *pair = &weights[s][2 * step + i / 2][i % 2 * 2];
        a[s][i] = pair_bits(T(), pair[0], pair[1]);
      }
#pragma unroll
    for (int pair = 0; pair < WIDTH / 16; pair++) {
      uint32_t b[4];
      SharedTile<WIDTH>::right_transposed(b, other, step * 16, pair);
#pragma unroll
      for (int s = 0; s < SETS; s++) {
        multiply(T(), out[s][2 * pair], a[s], b[0], b[1]);
        multiply(T(), out[s][2 * pair + 1], a[s], b[2], b[3]);
      }
    }
  }
}

// An accumulator times a factor into the warp's own rows of a tile, and rows of a tile to memory 16 bytes at a time.
template <int WIDTH, typename T>
__device__ __forceinline__ void keep(T *tile, const float (&values)[WIDTH / 8][4], int row, float upper_factor, float lower_factor) {
  const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int n = 0; n < WIDTH / 8; n++) {
    *reinterpret_cast<uint32_t *>(tile + SharedTile<WIDTH>::at(row + g, n) + 2 * t) =
        pair_bits(T(), values[n][0] * upper_factor, values[n][1] * upper_factor);
    *reinterpret_cast<uint32_t *>(tile + SharedTile<WIDTH>::at(row + g + 8, n) + 2 * t) =
        pair_bits(T(), values[n][2] * lower_factor, values[n][3] * lower_factor);
  }
}
template <int WIDTH, int ROWS, int THREADS, typename T>
__device__ __forceinline__ void write_rows(T *to, int64_t stride, const T *tile, int first, int rows) {
  constexpr int CHUNKS = WIDTH / 8;
  for (int index = threadIdx.x; index < ROWS * CHUNKS; index += THREADS) {
    const int row = index / CHUNKS, chunk = index % CHUNKS;
    if (first + row < rows) store<8>(to + (first + row) * stride + chunk * 8, load<8>(tile + SharedTile<WIDTH>::at(row, chunk)));
  }
}

// Over the four lanes that share a row of a product.
template <typename Op> __device__ __forceinline__ float reduce_quad(float value, Op op) {
  value = op(value, __shfl_xor_sync(ALL_LANES, value, 1));
  return op(value, __shfl_xor_sync(ALL_LANES, value, 2));
}

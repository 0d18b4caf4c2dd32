// Attention to a cache, for sm_80 and up: a block has up to 16 rows of queries (the newest tokens, all heads of a group) of one
// sequence and a part of its keys. Each warp goes through tiles of 16 keys of its own, the next two on their way while one is multiplied:
// no barrier but the last, where the warps' results are put together. Math: attention_decode.h.
#pragma once
#include "attention_decode.h"
#include "attention_forward.cuh"

namespace attention {

template <typename T, int D, int E> struct Decode {
  static constexpr int ROWS = 16, KEYS = 16, STAGES = 3;
  // Two warps where rows are long: 96 KB at most, which every GPU since sm_80 gives a block.
  static constexpr int WARPS = D + E <= 256 ? 4 : 2, THREADS = WARPS * WARP;
  using Key = SharedTile<D>;
  using Value = SharedTile<E>;
  static constexpr int KEY_SIZE = KEYS * Key::STRIDE, STAGE_SIZE = KEY_SIZE + KEYS * Value::STRIDE;
  static constexpr int SHARED_BYTES = WARPS * STAGES * STAGE_SIZE * int(sizeof(T));
  // How much of the queries stays in registers; the rest of long rows is read again for every tile, from the first cache.
  static constexpr int HELD = D <= 192 ? D / 16 : 4;
  static constexpr int OUT_STRIDE = E + 8;  // so that eight rows lie in different banks
  static_assert((OUT_STRIDE + 2) * WARPS * ROWS * int(sizeof(float)) <= SHARED_BYTES, "results go where the tiles were");
};

// The keys that a sequence's queries see, and the tiles of them that a split has.
struct Interval {
  int offset;  // the place of query 0
  int64_t left;

  __device__ __forceinline__ int begin(int query) const {
    return left < 0 ? 0 : int(max(int64_t(offset) + query - left, int64_t(0)));
  }
  __device__ __forceinline__ int end(int query) const { return max(offset + query + 1, 0); }
};

// A warp's tiles in shared memory, filled in the background.
template <typename T, int D, int E> struct Stream {
  using F = Decode<T, D, E>;
  T *buffers;
  const T *k, *v;          // of this group
  int64_t k_row, k_outer, v_row, v_outer;
  const int32_t *table;    // of this sequence, or null
  int batch, page_shift, page_mask, low, high;  // keys outside [low, high) are zeros, and nothing is read
  int first, count;        // tiles first, first + WARPS, ..
  int outer;               // the page, or the sequence, of the tile that is fetched next: its load has an iteration's time

  __device__ __forceinline__ int tile(int index) const { return first + index * F::WARPS; }
  __device__ __forceinline__ void look_up(int index) {
    outer = table == nullptr || index >= count ? batch : table[tile(index) * F::KEYS >> page_shift];
  }
  __device__ __forceinline__ T *buffer(int index) const { return buffers + index % F::STAGES * F::STAGE_SIZE; }

  template <int WIDTH> __device__ __forceinline__ void copy(T *to, const T *from, const T *base, int64_t stride, int key) const {
    constexpr int CHUNKS = WIDTH / 8;
#pragma unroll
    for (int index = int(threadIdx.x) % WARP; index < F::KEYS * CHUNKS; index += WARP) {
      const int row = index / CHUNKS, chunk = index % CHUNKS;
      const bool valid = key + row >= low && key + row < high;
      copy_async(to + SharedTile<WIDTH>::at(row, chunk), valid ? from + row * stride + chunk * 8 : base, valid);
    }
  }
  // Starts to copy a tile; a group of copies even where there is none, so that the waits count right.
  __device__ __forceinline__ void fetch(int index) {
    if (index < count) {
      const int key = tile(index) * F::KEYS, inner = key & page_mask;
      copy<D>(buffer(index), k + outer * k_outer + inner * k_row, k, k_row, key);
      copy<E>(buffer(index) + F::KEY_SIZE, v + outer * v_outer + inner * v_row, v, v_row, key);
    }
    copy_commit();
    look_up(index + 1);
  }
};

// A row's largest score, in units of log2 e, and its sum of exponentials.
struct RowSums {
  float top, total;
  // The sink is a score of one more key, whose value is 0.
  __device__ __forceinline__ void add(const void *sinks, int head) {
    if (sinks == nullptr) return;
    const float sink = ((const float *)sinks)[head] * LOG2E, larger = fmaxf(top, sink);
    total = total * factor(top, larger) + power_of_two(sink - larger);
    top = larger;
  }
  __device__ __forceinline__ static float factor(float from, float to) { return from == -INFINITY ? 0.0f : power_of_two(from - to); }
  __device__ __forceinline__ float lse() const { return total > 0.0f ? top + log2f(total) : -INFINITY; }
  __device__ __forceinline__ float inverse() const { return total > 0.0f ? 1.0f / total : 0.0f; }
};

// The results of a block's warps become the split's: the output where there is one split, else a part for the merge.
template <typename T, int D, int E>
__device__ __forceinline__ void put_together(const megalm_attention_decode_params &p, const Forward<T, D, E, 1, 16> &f, float *outs,
                                             float unit, int first_row, int own_rows, int split) {
  using F = Decode<T, D, E>;
  const int each = int(p.heads / p.groups), group = blockIdx.y, batch = blockIdx.z;
  const int warp = threadIdx.x / WARP, g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
  float *const tops = outs + F::WARPS * F::ROWS * F::OUT_STRIDE, *const totals = tops + F::WARPS * F::ROWS;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const float total = reduce_quad(f.total[0][half], [](float a, float b) { return a + b; });
    const int at = warp * F::ROWS + g + 8 * half;
    if (g + 8 * half < own_rows) {
      if (t == 0) tops[at] = f.maximum[0][half] * unit, totals[at] = total;
#pragma unroll
      for (int n = 0; n < E / 8; n++) store<2>(outs + at * F::OUT_STRIDE + 8 * n + 2 * t, {f.out[0][n][2 * half], f.out[0][n][2 * half + 1]});
    }
  }
  __syncthreads();
  constexpr int PACKS = E / 4;
  for (int index = threadIdx.x; index < own_rows * PACKS; index += F::THREADS) {
    const int own = index / PACKS, column = index % PACKS * 4, row = first_row + own;
    const int query = row / each, head = group * each + row % each;
    RowSums sums{-INFINITY, 0.0f};
#pragma unroll
    for (int w = 0; w < F::WARPS; w++) sums.top = fmaxf(sums.top, tops[w * F::ROWS + own]);
    float values[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int w = 0; w < F::WARPS; w++) {
      const int at = w * F::ROWS + own;
      const float factor = RowSums::factor(tops[at], sums.top);
      const Pack<float, 4> part = load<4>(outs + at * F::OUT_STRIDE + column);
      sums.total += totals[at] * factor;
#pragma unroll
      for (int i = 0; i < 4; i++) values[i] += part[i] * factor;
    }
    const int64_t place = (batch * p.heads + head) * p.queries + query;
    const bool whole = p.splits == 1;
    const float top = sums.top;
    if (whole) sums.add(p.sinks, head);
    const float scale = RowSums::factor(top, sums.top) * sums.inverse();
#pragma unroll
    for (int i = 0; i < 4; i++) values[i] *= scale;
    if (whole) {
      store<4>((T *)p.out + query * p.out_row + batch * p.out_batch + head * p.out_head + column, values);
      if (column == 0) ((float *)p.lse)[place] = sums.lse() * LN2;
    } else {
      const int64_t part = split * p.batch * p.heads * p.queries + place;
      if (sums.total > 0.0f) store<4>((float *)p.partial_out + part * E + column, values);  // the merge reads no empty part
      if (column == 0) ((float *)p.partial_lse)[part] = sums.lse();
    }
  }
}

template <typename T, int D, int E>
__global__ void __launch_bounds__(Decode<T, D, E>::THREADS) attention_decode(const megalm_attention_decode_params p) {
  using F = Decode<T, D, E>;
  MEGALM_DYNAMIC_SHARED(T, shared);
  const int each = int(p.heads / p.groups), rows = int(p.queries) * each, row_tiles = ceil_div(rows, F::ROWS), splits = int(p.splits);
  const int first_row = int(blockIdx.x) % row_tiles * F::ROWS, split = int(blockIdx.x) / row_tiles, group = blockIdx.y, batch = blockIdx.z;
  const int warp = threadIdx.x / WARP, g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
  const int length = p.lengths == nullptr ? int(p.keys) : min(((const int32_t *)p.lengths)[batch], int(p.keys));
  const Interval seen{length - int(p.queries), p.left};
  const int own_rows = min(F::ROWS, rows - first_row);
  const int low = seen.begin(first_row / each), high = seen.end((first_row + own_rows - 1) / each);

  // This split's tiles, an even share of what the block's rows see.
  const int first_tile = low / F::KEYS, tiles = ceil_div(high, F::KEYS) - first_tile;
  const int share = ceil_div(ceil_div(tiles, F::WARPS), splits) * F::WARPS;
  const int start = first_tile + split * share, stop = min(start + share, first_tile + tiles);
  const bool paged = p.table != nullptr;
  int page_shift = 0;
  while (paged && (int64_t(1) << page_shift) < p.page) page_shift++;
  Stream<T, D, E> stream{shared + warp * F::STAGES * F::STAGE_SIZE, (const T *)p.k + group * p.k_head, (const T *)p.v + group * p.v_head,
                         p.k_row, p.k_batch, p.v_row, p.v_batch,
                         paged ? (const int32_t *)p.table + batch * (p.keys >> page_shift) : nullptr, batch, page_shift,
                         paged ? int(p.page) - 1 : INT32_MAX, low, high, start + warp, max(0, ceil_div(stop - start - warp, F::WARPS)), 0};
  stream.look_up(0);
#pragma unroll
  for (int index = 0; index < F::STAGES - 1; index++) stream.fetch(index);

  // Of this thread: rows g and g + 8, as the forward kernel's (lane 4 g + t); its operand of the products stays in registers.
  Forward<T, D, E, 1, F::KEYS> f;
  const T *from[2];
  const auto operand = [&](uint32_t (&a)[4], int step) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const bool here = first_row + g + 8 * half < rows;
      a[half] = here ? *reinterpret_cast<const uint32_t *>(from[half] + 16 * step) : 0u;
      a[2 + half] = here ? *reinterpret_cast<const uint32_t *>(from[half] + 16 * step + 8) : 0u;
    }
  };
  uint32_t query[F::HELD][4];
  Score scored[2];
  int place[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = first_row + g + 8 * half, head = group * each + row % each;
    const bool here = row < rows;
    from[half] = (const T *)p.q + row / each * p.q_row + batch * p.q_batch + head * p.q_head + 2 * t;
    scored[half] = Score::make(p.scale, p.softcap, (const float *)p.slopes, here ? head : 0);
    place[half] = seen.offset + row / each;
    f.begin[0][half] = here ? seen.begin(row / each) : 0;
    f.end[0][half] = here ? seen.end(row / each) : 0;
    f.maximum[0][half] = -INFINITY;
    f.total[0][half] = 0.0f;
  }
#pragma unroll
  for (int step = 0; step < F::HELD; step++) operand(query[step], step);
#pragma unroll
  for (int n = 0; n < E / 8; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) f.out[0][n][i] = 0.0f;

  for (int index = 0; index < stream.count; index++) {
    copy_wait<F::STAGES - 2>();
    __syncwarp();  // all lanes' copies of this tile are there, and all have left the one before, whose place the next copies take
    stream.fetch(index + F::STAGES - 1);
    const T *const keys = stream.buffer(index), *const values = keys + F::KEY_SIZE;
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) f.scores[0][n][i] = 0.0f;
#pragma unroll
    for (int step = 0; step < D / 16; step++) {
      uint32_t a[4], b[4];
      F::Key::right(b, keys, 0, step);
      if (step >= F::HELD) operand(a, step);
      const uint32_t(&left)[4] = step < F::HELD ? query[step < F::HELD ? step : 0] : a;
      multiply(T(), f.scores[0][0], left, b[0], b[1]);
      multiply(T(), f.scores[0][1], left, b[2], b[3]);
    }
    f.for_scores(stream.tile(index) * F::KEYS, [&](float &x, int, int half, int key) {
      if (!scored[half].plain) x = scored[half](x, key - place[half]);
      if (key < f.begin[0][half] || key >= f.end[0][half]) x = -INFINITY;
    });
    f.exponentiate(scored[0].unit);
    weights_by_rows<E, F::KEYS>(f.out, f.scores, values);
  }
  copy_wait<0>();
  __syncthreads();  // every warp has left its tiles
  put_together<T, D, E>(p, f, reinterpret_cast<float *>(shared), scored[0].unit, first_row, own_rows, split);
}

}  // namespace attention

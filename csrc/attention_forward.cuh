// Attention, forward, for sm_80 and up (mma.sync): a block has ROWS queries of one head and goes through the tiles of keys that they
// see, with the next tile's keys and values on their way while the current ones are multiplied. Each of the four warps has
// 16 SETS queries, whose scores and sums never leave its registers. Math: attention.h.
#pragma once
#include "attention_common.cuh"

namespace attention {

constexpr int WARPS = 4, THREADS = WARPS * WARP;

template <typename T, int D, int E, int SETS, int KEYS> struct Forward {
  static constexpr int ROWS = WARPS * 16 * SETS, TILES = KEYS / 8, OUT_TILES = E / 8;
  using Query = SharedTile<D>;
  using Key = SharedTile<D>;
  using Value = SharedTile<E>;
  static constexpr int QUERY_SIZE = ROWS * Query::STRIDE, KEY_SIZE = KEYS * Key::STRIDE, VALUE_SIZE = KEYS * Value::STRIDE;
  static constexpr int SHARED_BYTES = (QUERY_SIZE + 2 * KEY_SIZE + 2 * VALUE_SIZE) * int(sizeof(T));
  static_assert(Value::STRIDE <= Query::STRIDE, "the output goes through the queries' place");

  // Of this thread: queries g and g + 8 of each set (lane 4 g + t), all keys 8 n + 2 t, + 1 of a tile.
  float scores[SETS][TILES][4], out[SETS][OUT_TILES][4];
  float maximum[SETS][2], total[SETS][2];
  int begin[SETS][2], end[SETS][2];

  __device__ __forceinline__ static int first_row() { return threadIdx.x / WARP * 16 * SETS; }
  __device__ __forceinline__ static int row(int set, int half) { return first_row() + set * 16 + threadIdx.x % WARP / 4 + 8 * half; }

  // Calls each(score, set, half, key) for every score of this thread.
  template <typename Each> __device__ __forceinline__ void for_scores(int first_key, Each each) {
#pragma unroll
    for (int s = 0; s < SETS; s++)
#pragma unroll
      for (int n = 0; n < TILES; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) each(scores[s][n][i], s, i / 2, first_key + n * 8 + int(threadIdx.x) % 4 * 2 + i % 2);
  }

  // Products become scores, -inf where a query doesn't see the key.
  __device__ __forceinline__ void score(const Score &scored, int first_query, int first_key, int offset, bool whole) {
    if (!scored.plain)
      for_scores(first_key, [&](float &x, int s, int half, int key) { x = scored(x, key - first_query - row(s, half) - offset); });
    if (!whole)
      for_scores(first_key, [&](float &x, int s, int half, int key) {
        if (key < begin[s][half] || key >= end[s][half]) x = -INFINITY;
      });
  }

  // Scores become exponentials of their difference from the running maximum; sums and output are scaled to it.
  __device__ __forceinline__ void exponentiate(float unit) {
#pragma unroll
    for (int s = 0; s < SETS; s++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float largest = maximum[s][half];
#pragma unroll
        for (int n = 0; n < TILES; n++) largest = fmaxf(largest, fmaxf(scores[s][n][2 * half], scores[s][n][2 * half + 1]));
        largest = reduce_quad(largest, [](float a, float b) { return fmaxf(a, b); });
        const float from = largest == -INFINITY ? 0.0f : largest * unit;  // nothing seen yet: exponentials of -inf, not of NaN
        // Exactly 1 where the maximum stays: what rounding left of it would be the same in every tile, and add up.
        const float rescale = largest == -INFINITY ? 1.0f : power_of_two((maximum[s][half] - largest) * unit);
        maximum[s][half] = largest;
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < TILES; n++)
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; i++) {
            scores[s][n][i] = power_of_two(scores[s][n][i] * unit - from);
            sum += scores[s][n][i];
          }
        total[s][half] = total[s][half] * rescale + sum;  // of this thread's keys; the quad is summed at the end
#pragma unroll
        for (int n = 0; n < OUT_TILES; n++)
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; i++) out[s][n][i] *= rescale;
      }
  }

  // Divide by the sums, write lse, and put the output where the queries were.
  __device__ __forceinline__ void finish(T *tile, float *lse, int first_query, int queries, const float *sinks, int head, float unit, float kept) {
#pragma unroll
    for (int s = 0; s < SETS; s++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float sum = reduce_quad(total[s][half], [](float a, float b) { return a + b; });
        float largest = maximum[s][half] * unit;
        float factor = 1.0f;
        if (sinks != nullptr) {
          const float sink = sinks[head] * LOG2E, top = fmaxf(largest, sink);
          factor = power_of_two(largest - top);
          sum = sum * factor + power_of_two(sink - top);
          largest = top;
        }
        const int query = first_query + row(s, half);
        if (threadIdx.x % 4 == 0 && query < queries) lse[query] = sum > 0.0f ? (largest + log2f(sum)) * LN2 : -INFINITY;
        total[s][half] = sum > 0.0f ? factor / sum * kept : 0.0f;
      }
#pragma unroll
    for (int s = 0; s < SETS; s++) keep<E>(tile, out[s], first_row() + s * 16, total[s][0], total[s][1]);
  }
};

template <typename T, int D, int E, int SETS, int KEYS>
__global__ void __launch_bounds__(THREADS) attention_forward(const megalm_attention_forward_params p) {
  using F = Forward<T, D, E, SETS, KEYS>;
  MEGALM_DYNAMIC_SHARED(T, shared);
  T *const queries = shared, *const keys = queries + F::QUERY_SIZE, *const values = keys + 2 * F::KEY_SIZE;
  // The last queries see the most keys where the mask is causal: they start first.
  const int first_query = int(gridDim.x - 1 - blockIdx.x) * F::ROWS, head = blockIdx.y, batch = blockIdx.z;
  const int group = head / int(p.heads / p.groups), last_query = min(first_query + F::ROWS, int(p.queries)) - 1;
  const T *const q = (const T *)p.q + batch * p.q_batch + head * p.q_head;
  const T *const k = (const T *)p.k + batch * p.k_batch + group * p.k_head;
  const T *const v = (const T *)p.v + batch * p.v_batch + group * p.v_head;
  const auto bound = [&](const void *of) { return of == nullptr ? nullptr : (const int32_t *)of + batch * p.queries; };
  const Visible visible{int(p.queries), int(p.keys), p.left, p.right, bound(p.first), bound(p.last)};
  const Score scored = Score::make(p.scale, p.softcap, (const float *)p.slopes, head);
  const Dropped dropped = Dropped::make(p, batch, head);

  F f;
#pragma unroll
  for (int s = 0; s < SETS; s++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int query = first_query + F::row(s, half);
      const bool here = query < p.queries;
      f.begin[s][half] = here ? visible.begin(query) : 0;
      f.end[s][half] = here ? visible.end(query) : 0;
      f.maximum[s][half] = -INFINITY;
      f.total[s][half] = 0.0f;
    }
#pragma unroll
  for (int s = 0; s < SETS; s++)
#pragma unroll
    for (int n = 0; n < F::OUT_TILES; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) f.out[s][n][i] = 0.0f;

  // Bounds grow with the query: the first begins first, the last ends last; what all of them see needs no mask.
  const int begin = visible.begin(first_query) / KEYS * KEYS, end = visible.end(last_query);
  const int all_begin = visible.begin(last_query), all_end = last_query + 1 - first_query == F::ROWS ? visible.end(first_query) : 0;
  const auto fetch = [&](int key) {
    const int buffer = key / KEYS % 2;
    F::Key::template fetch<KEYS, THREADS>(keys + buffer * F::KEY_SIZE, k, p.k_row, key, int(p.keys));
    copy_commit();
  };
  const auto fetch_values = [&](int key) {
    const int buffer = key / KEYS % 2;
    F::Value::template fetch<KEYS, THREADS>(values + buffer * F::VALUE_SIZE, v, p.v_row, key, int(p.keys));
    copy_commit();
  };
  F::Query::template fetch<F::ROWS, THREADS>(queries, q, p.q_row, first_query, int(p.queries));
  fetch(begin);
  fetch_values(begin);
  for (int key = begin; key < end; key += KEYS) {
    const int buffer = key / KEYS % 2;
    copy_wait<1>();   // this tile's keys are there, its values may not be
    __syncthreads();  // for all threads, and all have left the tile before
    if (key + KEYS < end) fetch(key + KEYS);
    else copy_commit();
    rows_by_rows<D, KEYS>(f.scores, queries, F::first_row(), keys + buffer * F::KEY_SIZE);
    f.score(scored, first_query, key, int(p.keys - p.queries), key >= all_begin && key + KEYS <= all_end);
    f.exponentiate(scored.unit);
    if (dropped.on) {  // after the sums were taken, of which what is dropped is part
#pragma unroll
      for (int s = 0; s < SETS; s++)
        drop<F::TILES>(f.scores[s], dropped.bits<F::TILES, true>(first_query + F::row(s, 0), key), 1.0f);
    }
    copy_wait<1>();
    __syncthreads();
    if (key + KEYS < end) fetch_values(key + KEYS);
    else copy_commit();
    weights_by_rows<E, KEYS>(f.out, f.scores, values + buffer * F::VALUE_SIZE);
  }
  copy_wait<0>();
  __syncthreads();
  f.finish(queries, (float *)p.lse + (batch * p.heads + head) * p.queries, first_query, int(p.queries), (const float *)p.sinks, head,
           scored.unit, dropped.kept);
  __syncthreads();
  write_rows<E, F::ROWS, THREADS>((T *)p.out + batch * p.out_batch + head * p.out_head, p.out_row, queries, first_query, int(p.queries));
}

template <typename T, int D, int E, int SETS, int KEYS> int launch_forward(const megalm_attention_forward_params &p, megalm_stream stream) {
  using F = Forward<T, D, E, SETS, KEYS>;
  const auto kernel = attention_forward<T, D, E, SETS, KEYS>;
  const int error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, F::SHARED_BYTES);
  if (error != cudaSuccess) return error;
  const dim3 grid(unsigned(ceil_div(p.queries, int64_t(F::ROWS))), unsigned(p.heads), unsigned(p.batch));
  MEGALM_LAUNCH(kernel, grid, dim3(THREADS), F::SHARED_BYTES, stream, p);
  return cudaSuccess;
}

}  // namespace attention

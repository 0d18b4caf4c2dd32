// Attention, backward, for sm_80 and up (mma.sync). Math: attention.h.
//
// Two kernels of one shape. A block owns rows of one side (64 keys with their values, or 64 queries with their output gradients) and
// goes through tiles of the other side, with the next tile on its way. A warp has 16 of the block's rows: scores and their gradients
// stay in its registers, where an accumulator is already the left operand of the next product.
#pragma once
#include "attention_gradient.cuh"

namespace attention {

constexpr int BACKWARD_WARPS = 4, BACKWARD_THREADS = BACKWARD_WARPS * WARP, OWN = BACKWARD_WARPS * 16;

struct Sides {
  Visible visible;
  Score scored;
  Dropped dropped;
  int offset;  // keys - queries
};

template <int TILE>
__device__ __forceinline__ void fetch_facts(QueryFacts<TILE> &facts, const Visible &visible, const float *lse, const float *delta, int first) {
  for (int i = threadIdx.x; i < TILE; i += BACKWARD_THREADS) {
    const int query = first + i;
    const bool here = query < visible.queries;
    facts.lse[i] = here ? lse[query] * LOG2E : INFINITY;  // a query that isn't there has probabilities of 0
    facts.delta[i] = here ? delta[query] : 0.0f;
    facts.begin[i] = here ? visible.begin(query) : 0;
    facts.end[i] = here ? visible.end(query) : 0;
  }
}

// A probability from a product, and the slope of the score there, which the softcap alone bends.
__device__ __forceinline__ float probability(const Score &scored, float product, float lse, int distance, float &slope) {
  slope = 1.0f;
  if (scored.plain) return power_of_two(product * scored.unit - lse);
  const float score = scored(product, distance);
  if (scored.capped) {
    const float share = (score - scored.slope * distance) / scored.softcap;
    slope = 1.0f - share * share;
  }
  return power_of_two(score * scored.unit - lse);
}

// Products and their gradients become probabilities and gradients of the products (but for the scale). OWN_IS_QUERY: which side the
// accumulators' rows are; the other is their columns.
template <bool OWN_IS_QUERY, int TILE>
__device__ __forceinline__ void differentiate(float (&products)[1][TILE / 8][4], float (&grads)[1][TILE / 8][4], const Sides &sides,
                                              const float (&lse)[2][2], const int (&range)[2][2], const QueryFacts<TILE> *facts,
                                              int own, int other, bool whole) {
  uint32_t bits = 0;
  if (sides.dropped.on) {
    bits = sides.dropped.bits<TILE / 8, OWN_IS_QUERY>(own, other);
    drop<TILE / 8>(grads[0], bits, sides.dropped.kept);
  }
#pragma unroll
  for (int n = 0; n < TILE / 8; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int column = n * 8 + threadIdx.x % 4 * 2 + i % 2, row = own + i / 2 * 8;
      const int query = OWN_IS_QUERY ? row : other + column, key = OWN_IS_QUERY ? other + column : row;
      const float query_lse = OWN_IS_QUERY ? lse[i / 2][0] : facts->lse[column];
      const float query_delta = OWN_IS_QUERY ? lse[i / 2][1] : facts->delta[column];
      float slope, p = probability(sides.scored, products[0][n][i], query_lse, key - query - sides.offset, slope);
      if (!whole) {
        const int begin = OWN_IS_QUERY ? range[i / 2][0] : facts->begin[column];
        const int end = OWN_IS_QUERY ? range[i / 2][1] : facts->end[column];
        if (key < begin || key >= end) p = 0.0f;
      }
      products[0][n][i] = p;
      grads[0][n][i] = p == 0.0f ? 0.0f : p * (grads[0][n][i] - query_delta) * slope;
    }
  if (sides.dropped.on) drop<TILE / 8>(products[0], bits, sides.dropped.kept);
}

template <typename T, int D, int E, int TILE> struct BackwardShared {
  static constexpr int OWN_D = OWN * SharedTile<D>::STRIDE, OWN_E = OWN * SharedTile<E>::STRIDE;
  static constexpr int OTHER_D = TILE * SharedTile<D>::STRIDE, OTHER_E = TILE * SharedTile<E>::STRIDE;
  static constexpr int BYTES = (OWN_D + OWN_E + 2 * OTHER_D + 2 * OTHER_E) * int(sizeof(T)) + 2 * int(sizeof(QueryFacts<TILE>));
};

// Gradients of 64 keys (with GRAD_K) and their values (with GRAD_V), over the queries of all heads of their group.
template <typename T, int D, int E, int TILE, bool GRAD_K, bool GRAD_V>
__global__ void __launch_bounds__(BACKWARD_THREADS) attention_backward_keys(const megalm_attention_backward_params p) {
  using S = BackwardShared<T, D, E, TILE>;
  MEGALM_DYNAMIC_SHARED(T, shared);
  T *const keys = shared, *const values = keys + S::OWN_D, *const queries = values + S::OWN_E, *const grads = queries + 2 * S::OTHER_D;
  auto *const facts = reinterpret_cast<QueryFacts<TILE> *>(grads + 2 * S::OTHER_E);
  const int first_key = blockIdx.x * OWN, group = blockIdx.y, batch = blockIdx.z, each = int(p.heads / p.groups);
  const auto bound = [&](const void *of) { return of == nullptr ? nullptr : (const int32_t *)of + batch * p.queries; };
  const Visible visible{int(p.queries), int(p.keys), p.left, p.right, bound(p.first), bound(p.last)};
  const int last_key = min(first_key + OWN, int(p.keys)) - 1;
  // Bounds grow with the query, so those that see any of these keys are neighbours.
  const int begin = first_that(visible.queries, [&](int i) { return visible.end(i) > first_key; }) / TILE * TILE;
  const int end = first_that(visible.queries, [&](int i) { return visible.begin(i) > last_key; });
  const int tiles = max(0, ceil_div(end - begin, TILE)), total = tiles * each;

  SharedTile<D>::template fetch<OWN, BACKWARD_THREADS>(keys, (const T *)p.k + batch * p.k_batch + group * p.k_head, p.k_row, first_key, int(p.keys));
  SharedTile<E>::template fetch<OWN, BACKWARD_THREADS>(values, (const T *)p.v + batch * p.v_batch + group * p.v_head, p.v_row, first_key, int(p.keys));
  copy_commit();  // in a group of their own: where no tile follows, the last wait must cover them all the same
  const auto fetch = [&](int turn) {
    const int head = group * each + turn / tiles, query = begin + turn % tiles * TILE, buffer = turn % 2;
    const int64_t row = (batch * p.heads + head) * p.queries;
    SharedTile<D>::template fetch<TILE, BACKWARD_THREADS>(queries + buffer * S::OTHER_D, (const T *)p.q + batch * p.q_batch + head * p.q_head,
                                                          p.q_row, query, visible.queries);
    SharedTile<E>::template fetch<TILE, BACKWARD_THREADS>(grads + buffer * S::OTHER_E,
                                                          (const T *)p.grad_out + batch * p.out_batch + head * p.out_head, p.out_row,
                                                          query, visible.queries);
    fetch_facts(facts[buffer], visible, (const float *)p.lse + row, (const float *)p.delta + row, query);
    copy_commit();
  };
  const int own_row = threadIdx.x / WARP * 16, own = first_key + own_row + threadIdx.x % WARP / 4;
  float grad_k[1][D / 8][4] = {}, grad_v[1][E / 8][4] = {};
  if (total > 0) fetch(0);
  for (int turn = 0; turn < total; turn++) {
    copy_wait<0>();
    __syncthreads();  // the tile is there for all, and all have left the one before
    if (turn + 1 < total) fetch(turn + 1);
    const int head = group * each + turn / tiles, query = begin + turn % tiles * TILE, buffer = turn % 2;
    const T *const tile_q = queries + buffer * S::OTHER_D, *const tile_g = grads + buffer * S::OTHER_E;
    const Sides sides{visible, Score::make(p.scale, p.softcap, (const float *)p.slopes, head), Dropped::make(p, batch, head),
                      int(p.keys - p.queries)};
    const int last = query + TILE - 1;
    const bool whole = last < visible.queries && last_key - first_key + 1 == OWN && visible.begin(last) <= first_key && visible.end(query) > last_key;
    float products[1][TILE / 8][4], slopes[1][TILE / 8][4] = {};
    rows_by_rows<D, TILE>(products, keys, own_row, tile_q);
    if (GRAD_K) rows_by_rows<E, TILE>(slopes, values, own_row, tile_g);
    const float none[2][2] = {};
    const int nowhere[2][2] = {};
    differentiate<false, TILE>(products, slopes, sides, none, nowhere, facts + buffer, own, query, whole);
    if (GRAD_V) weights_by_rows<E, TILE>(grad_v, products, tile_g);
    if (GRAD_K) weights_by_rows<D, TILE>(grad_k, slopes, tile_q);
  }
  copy_wait<0>();
  __syncthreads();
  if (GRAD_K) keep<D>(keys, grad_k[0], own_row, float(p.scale), float(p.scale));
  if (GRAD_V) keep<E>(values, grad_v[0], own_row, 1.0f, 1.0f);
  __syncthreads();
  if (GRAD_K)
    write_rows<D, OWN, BACKWARD_THREADS>((T *)p.grad_k + batch * p.grad_k_batch + group * p.grad_k_head, p.grad_k_row, keys, first_key, int(p.keys));
  if (GRAD_V)
    write_rows<E, OWN, BACKWARD_THREADS>((T *)p.grad_v + batch * p.grad_v_batch + group * p.grad_v_head, p.grad_v_row, values, first_key, int(p.keys));
}

// Gradients of 64 queries of one head, over the keys that they see.
template <typename T, int D, int E, int TILE>
__global__ void __launch_bounds__(BACKWARD_THREADS) attention_backward_queries(const megalm_attention_backward_params p) {
  using S = BackwardShared<T, D, E, TILE>;
  MEGALM_DYNAMIC_SHARED(T, shared);
  T *const queries = shared, *const grads = queries + S::OWN_D, *const keys = grads + S::OWN_E, *const values = keys + 2 * S::OTHER_D;
  const int first_query = int(gridDim.x - 1 - blockIdx.x) * OWN, head = blockIdx.y, batch = blockIdx.z, group = head / int(p.heads / p.groups);
  const int last_query = min(first_query + OWN, int(p.queries)) - 1;
  const auto bound = [&](const void *of) { return of == nullptr ? nullptr : (const int32_t *)of + batch * p.queries; };
  const Visible visible{int(p.queries), int(p.keys), p.left, p.right, bound(p.first), bound(p.last)};
  const Sides sides{visible, Score::make(p.scale, p.softcap, (const float *)p.slopes, head), Dropped::make(p, batch, head),
                      int(p.keys - p.queries)};
  SharedTile<D>::template fetch<OWN, BACKWARD_THREADS>(queries, (const T *)p.q + batch * p.q_batch + head * p.q_head, p.q_row, first_query, visible.queries);
  SharedTile<E>::template fetch<OWN, BACKWARD_THREADS>(grads, (const T *)p.grad_out + batch * p.out_batch + head * p.out_head, p.out_row, first_query, visible.queries);
  copy_commit();  // as above
  const auto fetch = [&](int key) {
    const int buffer = key / TILE % 2;
    SharedTile<D>::template fetch<TILE, BACKWARD_THREADS>(keys + buffer * S::OTHER_D, (const T *)p.k + batch * p.k_batch + group * p.k_head, p.k_row, key, visible.keys);
    SharedTile<E>::template fetch<TILE, BACKWARD_THREADS>(values + buffer * S::OTHER_E, (const T *)p.v + batch * p.v_batch + group * p.v_head, p.v_row, key, visible.keys);
    copy_commit();
  };
  const int own_row = threadIdx.x / WARP * 16, own = first_query + own_row + threadIdx.x % WARP / 4;
  const int64_t row = (batch * p.heads + head) * p.queries;
  float facts[2][2];  // lse and delta of this thread's two queries
  int range[2][2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int query = own + 8 * half;
    const bool here = query < visible.queries;
    facts[half][0] = here ? ((const float *)p.lse)[row + query] * LOG2E : INFINITY;
    facts[half][1] = here ? ((const float *)p.delta)[row + query] : 0.0f;
    range[half][0] = here ? visible.begin(query) : 0;
    range[half][1] = here ? visible.end(query) : 0;
  }
  const int begin = visible.begin(first_query) / TILE * TILE, end = visible.end(last_query);
  const int all_begin = visible.begin(last_query), all_end = last_query - first_query + 1 == OWN ? visible.end(first_query) : 0;
  float grad_q[1][D / 8][4] = {};
  if (begin < end) fetch(begin);
  for (int key = begin; key < end; key += TILE) {
    copy_wait<0>();
    __syncthreads();
    if (key + TILE < end) fetch(key + TILE);
    const int buffer = key / TILE % 2;
    float products[1][TILE / 8][4], slopes[1][TILE / 8][4];
    rows_by_rows<D, TILE>(products, queries, own_row, keys + buffer * S::OTHER_D);
    rows_by_rows<E, TILE>(slopes, grads, own_row, values + buffer * S::OTHER_E);
    differentiate<true, TILE>(products, slopes, sides, facts, range, nullptr, own, key, key >= all_begin && key + TILE <= all_end);
    weights_by_rows<D, TILE>(grad_q, slopes, keys + buffer * S::OTHER_D);
  }
  copy_wait<0>();
  __syncthreads();
  keep<D>(queries, grad_q[0], own_row, float(p.scale), float(p.scale));
  __syncthreads();
  write_rows<D, OWN, BACKWARD_THREADS>((T *)p.grad_q + batch * p.grad_q_batch + head * p.grad_q_head, p.grad_q_row, queries, first_query, visible.queries);
}

template <int BYTES, typename Kernel>
int launch_backward_kernel(Kernel kernel, dim3 grid, const megalm_attention_backward_params &p, megalm_stream stream) {
  const int error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES);
  if (error != cudaSuccess) return error;
  MEGALM_LAUNCH(kernel, grid, dim3(BACKWARD_THREADS), BYTES, stream, p);
  return cudaSuccess;
}

// SPLIT: keys and values one after the other, where registers don't hold both sums.
template <typename T, int D, int E, int TILE, bool SPLIT> int launch_backward(const megalm_attention_backward_params &p, megalm_stream stream) {
  constexpr int BYTES = BackwardShared<T, D, E, TILE>::BYTES;
  const dim3 of_keys(unsigned(ceil_div(p.keys, int64_t(OWN))), unsigned(p.groups), unsigned(p.batch));
  const dim3 of_queries(unsigned(ceil_div(p.queries, int64_t(OWN))), unsigned(p.heads), unsigned(p.batch));
  int error = launch_backward_kernel<BYTES>(attention_backward_keys<T, D, E, TILE, true, !SPLIT>, of_keys, p, stream);
  if (SPLIT && error == cudaSuccess)
    error = launch_backward_kernel<BYTES>(attention_backward_keys<T, D, E, TILE, !SPLIT, true>, of_keys, p, stream);
  if (error != cudaSuccess) return error;
  return launch_backward_kernel<BYTES>(attention_backward_queries<T, D, E, TILE>, of_queries, p, stream);
}

}  // namespace attention

// Attention, backward, for sm_90a. A block has 128 keys with their values, and one warp brings tiles of QUERIES queries and output
// gradients of all heads of their group. Each of two warpgroups has 64 of the keys: their gradients stay in its registers, as do scores
// and slopes [keys, queries] of a tile, which are the left operands of the gradients of values and keys. The slopes also go through
// shared memory, from where both warpgroups multiply them with the keys, each a half of the queries' gradient, which they add up in
// the workspace. Five products a tile. Math: attention.h.
#pragma once
#include "attention_checks.cuh"
#include "attention_gradient.cuh"
#include "attention_hopper_sums.cuh"

namespace attention {

struct BackwardMaps { TensorMap q, k, v, grad_out; };

constexpr int64_t BACKWARD_SECTION_BYTES = 32 << 20;  // of queries, their output gradients and sums that are in use at a time

// Which keys a block takes: in sections of groups that fit L2, the first keys first, which the most queries see where the mask is
// causal; or, in turns, the last ones first, whose turn is before all others' wherever they have one: so nobody waits for a block that
// begins later. Blocks draw tickets: a number that begins later is drawn later.
struct KeySchedule {
  int blocks, groups, section;  // of keys a group; groups of all batch entries; groups a section
  __device__ __forceinline__ void find(int index, bool last_first, int &block, int &group) const {
    const int whole = section * blocks, first = index / whole * section, here = min(section, groups - first), rest = index % whole;
    block = last_first ? blocks - 1 - rest / here : rest / here;
    group = first + rest % here;
  }
};

template <typename T, int D, int QUERIES> struct HopperBackward {
  static constexpr int KEYS = 128, CONSUMERS = 2, THREADS = WARPGROUP * (CONSUMERS + 1), STAGES = 2, TILES = QUERIES / 8;
  static constexpr int OWN_BYTES = tile_bytes<T>(KEYS, D), QUERY_BYTES = tile_bytes<T>(QUERIES, D), SLOPE_BYTES = tile_bytes<T>(KEYS, QUERIES);
  static constexpr bool VALUES_EARLY = QUERIES == 64;  // before the slopes, where registers hold both
  static constexpr int LOADS = QUERIES == 64 ? 24 : 40, MULTIPLIES = QUERIES == 64 ? 240 : 232;  // registers a thread of the two roles
  static_assert(QUERIES * D == 8192, "a tile's gradient is 64 rows of 64 columns a warpgroup");
  enum Barriers { OWN_HERE, QUERIES_HERE, QUERIES_LEFT = QUERIES_HERE + STAGES, GRADS_HERE = QUERIES_LEFT + STAGES,
                  GRADS_LEFT = GRADS_HERE + STAGES, BARRIERS = GRADS_LEFT + STAGES };
  enum Named { SLOPES = 1, TURN };  // TURN + a warpgroup
  static constexpr int SHARED_BYTES = SWIZZLE_BYTES + 2 * OWN_BYTES + 2 * STAGES * QUERY_BYTES + 2 * SLOPE_BYTES +
                                      STAGES * int(sizeof(QueryFacts<QUERIES>)) + BARRIERS * int(sizeof(uint64_t));

  struct Shared {
    unsigned char *keys, *values, *queries, *grads, *slopes;  // the last three: STAGES, STAGES, 2
    QueryFacts<QUERIES> *facts;
    uint64_t *barriers;
    __device__ __forceinline__ explicit Shared(unsigned char *dynamic) {
      keys = first_tile(dynamic);
      values = keys + OWN_BYTES;
      queries = values + OWN_BYTES;
      grads = queries + STAGES * QUERY_BYTES;
      slopes = grads + STAGES * QUERY_BYTES;
      facts = reinterpret_cast<QueryFacts<QUERIES> *>(slopes + 2 * SLOPE_BYTES);
      barriers = reinterpret_cast<uint64_t *>(facts + STAGES);
    }
    __device__ __forceinline__ void start() const {
      barrier_start(barriers + OWN_HERE, 1);
#pragma unroll
      for (int stage = 0; stage < STAGES; stage++) {
        barrier_start(barriers + QUERIES_HERE + stage, 1 + WARP);  // the copy engine's, and the facts of every lane
        barrier_start(barriers + QUERIES_LEFT + stage, 4 * CONSUMERS);
        barrier_start(barriers + GRADS_HERE + stage, 1);
        barrier_start(barriers + GRADS_LEFT + stage, 4 * CONSUMERS);
      }
      barriers_started();
    }
  };

  // A block's keys, and the tiles of queries that see any of them, of each head of the group.
  struct Work {
    int first_key, last_key, block, group, batch, each, begin, tiles;
    __device__ __forceinline__ Work(const megalm_attention_backward_params &p, const KeySchedule &schedule, int index) {
      int entry;
      schedule.find(index, p.deterministic, block, entry);
      group = entry % int(p.groups);
      batch = entry / int(p.groups);
      each = int(p.heads / p.groups);
      first_key = block * KEYS;
      last_key = min(first_key + KEYS, int(p.keys)) - 1;
      const Visible visible = visible_of(p, batch);
      // Bounds grow with the query, so those that see any of these keys are neighbours.
      begin = first_that(visible.queries, [&](int i) { return visible.end(i) > first_key; }) / QUERIES * QUERIES;
      const int end = first_that(visible.queries, [&](int i) { return visible.begin(i) > last_key; });
      tiles = max(0, ceil_div(end - begin, QUERIES));
    }
    __device__ __forceinline__ int turns() const { return tiles * each; }
    __device__ __forceinline__ int head(int turn) const { return group * each + turn / tiles; }
    __device__ __forceinline__ int query(int turn) const { return begin + turn % tiles * QUERIES; }
  };

  // One warp: brings what the others multiply, as far ahead as the rings allow.
  __device__ __forceinline__ static void load(const megalm_attention_backward_params &p, const BackwardMaps &maps, const Work &work,
                                              const Shared &shared) {
    const int lane = threadIdx.x % WARP;
    const Visible visible = visible_of(p, work.batch);
    if (lane == 0) {
      uint64_t *const here = shared.barriers + OWN_HERE;
      barrier_expect(here, 2 * OWN_BYTES);
      load_tile<T, KEYS, D>(shared.keys, maps.k, here, work.first_key, work.group, work.batch);
      load_tile<T, KEYS, D>(shared.values, maps.v, here, work.first_key, work.group, work.batch);
    }
    for (int turn = 0; turn < work.turns(); turn++) {
      const Place<STAGES> place(turn);
      const int head = work.head(turn), query = work.query(turn);
      uint64_t *const here = shared.barriers + QUERIES_HERE + place.stage, *const grads_here = shared.barriers + GRADS_HERE + place.stage;
      barrier_wait(shared.barriers + QUERIES_LEFT + place.stage, place.parity ^ 1);
      if (lane == 0) {
        barrier_expect(here, QUERY_BYTES);
        load_tile<T, QUERIES, D>(shared.queries + place.stage * QUERY_BYTES, maps.q, here, query, head, work.batch);
      }
      const int64_t row = (work.batch * p.heads + head) * p.queries;
      QueryFacts<QUERIES> &facts = shared.facts[place.stage];
      for (int i = lane; i < QUERIES; i += WARP) {
        const bool there = query + i < visible.queries;
        facts.lse[i] = there ? ((const float *)p.lse)[row + query + i] * LOG2E : INFINITY;  // none: probabilities of 0
        facts.delta[i] = there ? ((const float *)p.delta)[row + query + i] : 0.0f;
        facts.begin[i] = there ? visible.begin(query + i) : 0;
        facts.end[i] = there ? visible.end(query + i) : 0;
      }
      barrier_arrive(here);
      barrier_wait(shared.barriers + GRADS_LEFT + place.stage, place.parity ^ 1);
      if (lane == 0) {
        barrier_expect(grads_here, QUERY_BYTES);
        load_tile<T, QUERIES, D>(shared.grads + place.stage * QUERY_BYTES, maps.grad_out, grads_here, query, head, work.batch);
      }
    }
  }

  // Of this thread: keys g and g + 8 of its warp's 16 (lane 4 g + t), queries 8 n + 2 t, + 1 of a tile.
  float probabilities[TILES][4], slopes[TILES][4];
  float grad_k[D / 8][4], grad_v[D / 8][4];

  __device__ __forceinline__ static int consumer() { return threadIdx.x / WARPGROUP - 1; }
  __device__ __forceinline__ static int row() { return consumer() * 64 + threadIdx.x % WARPGROUP / WARP * 16 + threadIdx.x % WARP / 4; }
  __device__ __forceinline__ static int column(int n, int i) { return n * 8 + threadIdx.x % 4 * 2 + i % 2; }

  // Products of keys and queries become probabilities.
  __device__ __forceinline__ void exponentiate(const Score &scored, const QueryFacts<QUERIES> &facts, int first_key, int first_query, int offset,
                                               bool whole) {
    const auto key = [&](int i) { return first_key + row() + i / 2 * 8; };
    if (!scored.plain) to_scores(probabilities, scored, [&](int n, int i) { return key(i) - first_query - column(n, i) - offset; });
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) probabilities[n][i] = power_of_two(probabilities[n][i] * scored.unit - facts.lse[column(n, i)]);
    if (whole) return;
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (key(i) < facts.begin[column(n, i)] || key(i) >= facts.end[column(n, i)]) probabilities[n][i] = 0.0f;
  }

  // Where a softcap bends the scores of these products, its slope, on what delta is subtracted from.
  __device__ __forceinline__ void bend(const Score &scored, const QueryFacts<QUERIES> &facts) {
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float share = Score::tangent(probabilities[n][i] * scored.scale), delta = facts.delta[column(n, i)];
        slopes[n][i] = (slopes[n][i] - delta) * (1.0f - share * share) + delta;
      }
  }

  // The gradient of the products, but for the scale. What a query doesn't see has none, whatever its value is.
  __device__ __forceinline__ void differentiate(const QueryFacts<QUERIES> &facts, bool whole) {
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) slopes[n][i] = probabilities[n][i] * (slopes[n][i] - facts.delta[column(n, i)]);
    if (whole) return;
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (probabilities[n][i] == 0.0f) slopes[n][i] = 0.0f;
  }

  // A left operand of 64 keys into this warpgroup's rows of a tile [keys, queries], its lanes' words in different banks.
  __device__ __forceinline__ static void keep(unsigned char *tile, const uint32_t (&weights)[TILES / 2][4]) {
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int key = row() + 8 * half, chunk = (n % 8) ^ (key & 7);
        store_operand(tile + (n / 8 * KEYS + key) * PANEL_ROW + chunk * 16 + threadIdx.x % 4 * 4, weights[n / 2][n % 2 * 2 + half]);
      }
  }

  // This warpgroup's 64 x 64 of the gradient of a tile of queries: all keys' slopes, which are read across, times the keys.
  __device__ __forceinline__ static void start_grad_q(float (&grad_q)[8][4], const unsigned char *slopes, const unsigned char *keys) {
    const uint64_t a = across(slopes + (QUERIES == 64 ? 0 : consumer()) * KEYS * PANEL_ROW, KEYS * PANEL_ROW);
    const uint64_t b = across(keys + (QUERIES == 64 ? consumer() : 0) * KEYS * PANEL_ROW, KEYS * PANEL_ROW);
#pragma unroll
    for (int step = 0; step < KEYS / STEP<T>; step++) {
      if (step == 0) Multiply<T, 64>::template shared<false, Order::across, Order::across>(grad_q, a, b);
      else Multiply<T, 64>::template shared<true, Order::across, Order::across>(grad_q, across_step(a, step), across_step(b, step));
    }
  }

  // Adds it to the workspace: in turns, from the last block of keys that any query of the tile sees to the first, or at once.
  __device__ __forceinline__ static void add(const megalm_attention_backward_params &p, const Sums &sums, const Visible &visible, const Work &work,
                                             int turn, const float (&grad_q)[8][4]) {
    const int query = work.query(turn), thread = threadIdx.x % WARPGROUP;
    const int64_t share = 2 * ((work.batch * p.heads + work.head(turn)) * sums.tiles + query / QUERIES) + consumer();
    int *const now = (int *)p.workspace + 1 + share;
    if (p.deterministic) {
      if (thread == 0) turn_wait(now, (visible.end(min(query + QUERIES, visible.queries) - 1) - 1) / KEYS - work.block);
      named_wait(TURN + consumer(), WARPGROUP);
    }
    float *const to = (float *)((char *)p.workspace + sums.offset()) + share * Sums::SHARE;
#pragma unroll
    for (int n = 0; n < 8; n++) add_to(to + Sums::place(n, thread), grad_q[n]);
    if (p.deterministic) {
      named_wait(TURN + consumer(), WARPGROUP);
      if (thread == 0) turn_pass(now);
    }
  }

  // A warpgroup: its 64 keys.
  __device__ __forceinline__ static void multiply(const megalm_attention_backward_params &p, const Sums &sums, const Work &work, const Shared &shared) {
    const Visible visible = visible_of(p, work.batch);
    const int offset = int(p.keys - p.queries);
    HopperBackward f;
#pragma unroll
    for (int n = 0; n < D / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) f.grad_k[n][i] = f.grad_v[n][i] = 0.0f;
    barrier_wait(shared.barriers + OWN_HERE, 0);
    for (int turn = 0; turn < work.turns(); turn++) {
      const Place<STAGES> place(turn);
      const int query = work.query(turn);
      const unsigned char *const queries = shared.queries + place.stage * QUERY_BYTES, *const grads = shared.grads + place.stage * QUERY_BYTES;
      const QueryFacts<QUERIES> &facts = shared.facts[place.stage];
      unsigned char *const slopes = shared.slopes + turn % 2 * SLOPE_BYTES;
      const Score scored = Score::make(p.scale, p.softcap, (const float *)p.slopes, work.head(turn));
      barrier_wait(shared.barriers + QUERIES_HERE + place.stage, place.parity);
      matrix_fence();
      start_rows_by_rows<T, D, KEYS, QUERIES>(f.probabilities, shared.keys, consumer() * 64, queries);
      matrix_commit();
      barrier_wait(shared.barriers + GRADS_HERE + place.stage, place.parity);
      matrix_fence();
      start_rows_by_rows<T, D, KEYS, QUERIES>(f.slopes, shared.values, consumer() * 64, grads);
      matrix_commit();
      // What all of these queries see of all of these keys needs no mask.
      const bool whole = work.last_key - work.first_key + 1 == KEYS && query + QUERIES <= visible.queries &&
                         facts.begin[QUERIES - 1] <= work.first_key && facts.end[0] > work.last_key;
      matrix_wait<1>();
      matrix_settle(f.probabilities);
      if (scored.capped) {
        matrix_wait<0>();
        matrix_settle(f.slopes);
        f.bend(scored, facts);
      }
      f.exponentiate(scored, facts, work.first_key, query, offset, whole);
      uint32_t weights[TILES / 2][4], weighted_slopes[TILES / 2][4];
      const auto start_grad_v = [&] {
        as_weights<T>(weights, f.probabilities);
        matrix_fence();
        start_weights_by_rows<T, QUERIES, D>(f.grad_v, weights, grads);
        matrix_commit();
      };
      matrix_wait<0>();
      matrix_settle(f.slopes);
      if (VALUES_EARLY) start_grad_v();
      f.differentiate(facts, whole);
      as_weights<T>(weighted_slopes, f.slopes);
      keep(slopes, weighted_slopes);
      if (!VALUES_EARLY) start_grad_v();
      fence_async();
      // Both have put theirs there; and have left the products of the turn before, whose slopes the next turn overwrites.
      named_wait(SLOPES, CONSUMERS * WARPGROUP);
      float grad_q[8][4];
      matrix_fence();
      start_weights_by_rows<T, QUERIES, D>(f.grad_k, weighted_slopes, queries);
      matrix_commit();
      start_grad_q(grad_q, slopes, shared.keys);
      matrix_commit();
      matrix_wait<1>();
      matrix_settle(f.grad_v);
      matrix_settle(f.grad_k);
      warp_arrive(shared.barriers + GRADS_LEFT + place.stage);
      warp_arrive(shared.barriers + QUERIES_LEFT + place.stage);
      matrix_wait<0>();
      matrix_settle(grad_q);
      add(p, sums, visible, work, turn, grad_q);
    }
    const auto write = [&](void *to, int64_t row_stride, int64_t batch, int64_t head, const float (&values)[D / 8][4], float factor) {
      T *rows[2];
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int key = work.first_key + row() + 8 * half;
        rows[half] = key < p.keys ? (T *)to + work.batch * batch + work.group * head + key * row_stride : nullptr;
      }
      write_fragment<D>(rows, values, {factor, factor});
    };
    write(p.grad_k, p.grad_k_row, p.grad_k_batch, p.grad_k_head, f.grad_k, float(p.scale));
    write(p.grad_v, p.grad_v_row, p.grad_v_batch, p.grad_v_head, f.grad_v, 1.0f);
  }
};

template <typename T, int D, int QUERIES>
__global__ void __launch_bounds__(3 * WARPGROUP, 1)
    attention_hopper_backward(const megalm_attention_backward_params p, MEGALM_CONSTANT BackwardMaps maps, const KeySchedule schedule, const Sums sums) {
#ifdef MEGALM_HOPPER
  using B = HopperBackward<T, D, QUERIES>;
  MEGALM_DYNAMIC_SHARED(unsigned char, dynamic);
  MEGALM_SHARED(int, ticket, 1);
  const typename B::Shared shared(dynamic);
  if (threadIdx.x == 0) {
    shared.start();
    *ticket = take_ticket((int *)p.workspace);
  }
  __syncthreads();
  const typename B::Work work(p, schedule, *ticket);
  if (threadIdx.x / WARPGROUP == 0) {
    fewer_registers<B::LOADS>();
    if (threadIdx.x < WARP) B::load(p, maps, work, shared);
  } else {
    more_registers<B::MULTIPLIES>();
    B::multiply(p, sums, work, shared);
  }
#endif
}

template <typename T, int D, int QUERIES> int launch_hopper_backward(const megalm_attention_backward_params &p, megalm_stream stream) {
  using B = HopperBackward<T, D, QUERIES>;
  const auto kernel = attention_hopper_backward<T, D, QUERIES>;
  BackwardMaps maps;
  int error = make_tensor_map<T>(maps.q, p.q, {D, p.queries, p.heads, p.batch, p.q_row, p.q_head, p.q_batch}, QUERIES);
  if (error == cudaSuccess) error = make_tensor_map<T>(maps.k, p.k, {D, p.keys, p.groups, p.batch, p.k_row, p.k_head, p.k_batch}, B::KEYS);
  if (error == cudaSuccess) error = make_tensor_map<T>(maps.v, p.v, {D, p.keys, p.groups, p.batch, p.v_row, p.v_head, p.v_batch}, B::KEYS);
  if (error == cudaSuccess)
    error = make_tensor_map<T>(maps.grad_out, p.grad_out, {D, p.queries, p.heads, p.batch, p.out_row, p.out_head, p.out_batch}, QUERIES);
  if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, B::SHARED_BYTES);
  if (error != cudaSuccess) return error;
  const Sums sums = Sums::make(p, QUERIES);
  error = cudaMemsetAsync(p.workspace, 0, sums.bytes(), stream);
  if (error != cudaSuccess) return error;
  const int64_t blocks = ceil_div(p.keys, int64_t(B::KEYS)), groups = p.batch * p.groups;
  const int64_t each = p.heads / p.groups * p.queries * D * int64_t(2 * sizeof(T) + sizeof(float));
  const KeySchedule schedule{int(blocks), int(groups), int(min(max(BACKWARD_SECTION_BYTES / each, int64_t(1)), groups))};
  MEGALM_LAUNCH(kernel, dim3(unsigned(blocks * groups)), dim3(B::THREADS), B::SHARED_BYTES, stream, p, maps, schedule, sums);
  return attention_hopper_finish_queries(p, sums, stream);
}

}  // namespace attention

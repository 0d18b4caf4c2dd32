// Attention, forward, for sm_90a. A block stays on its multiprocessor and takes tiles of 64 CONSUMERS queries of one head, one after
// the other. One warp has the copy engine bring queries and a ring of tiles of keys and values; each warpgroup that multiplies has 64
// queries, whose scores and sums never leave its registers. While one computes exponentials, the tensor cores have another's products
// (turns), and within one the products with the values of a tile run beside the exponentials of the next. Math: attention.h; the
// schedule is that of Shah et al., "FlashAttention-3", 2024, section 3.
//
// The products are of T, or of bytes (In is e4m3), which attention_hopper_quantize.cuh has made of q, k and v. The tensor cores keep only
// about 14 bits of a sum of products of bytes (DeepSeek-V3, 2024, section 3.3.2), so those with a tile of values start from zero and are
// added in fp32. Where there are no registers for them beside the next scores, they come first (BESIDE), a slice after the other.
#pragma once
#include "attention_hopper.cuh"

namespace attention {

struct ForwardMaps { TensorMap q, k, v; };

// What a 1 of each head is worth, where it was rounded to bytes.
struct Units {
  const float *all;  // [batch, heads + 2 groups]: of q, of k, of v
  int heads, groups;
  __device__ __forceinline__ float query(int batch, int head) const { return all[batch * (heads + 2 * groups) + head]; }
  __device__ __forceinline__ float key(int batch, int group) const { return query(batch, heads + group); }
  __device__ __forceinline__ float value(int batch, int group) const { return query(batch, heads + groups + group); }
};

constexpr int64_t SECTION_BYTES = 32 << 20;  // of keys and values that are in use at a time: of Hopper's 50 MB of L2

// Which tile comes when. Heads go in sections whose keys and values fit L2; in a section the last queries come first, as they see the
// most keys where the mask is causal. Rounds go back and forth over the blocks, so that none always has the longer ones.
struct Schedule {
  int rows, heads, section, tiles;  // tiles of queries a head; heads of all entries; heads a section
  __device__ __forceinline__ int index(int round) const {
    const int blocks = gridDim.x, block = blockIdx.x;
    return round * blocks + (round % 2 ? blocks - 1 - block : block);
  }
  __device__ __forceinline__ void find(int index, int &row, int &head) const {
    const int whole = section * rows, first = index / whole * section, here = min(section, heads - first), rest = index % whole;
    row = rows - 1 - rest / here;
    head = first + rest % here;
  }
};

template <typename T, typename In, int D, int E, int CONSUMERS, int KEYS> struct HopperForward {
  static constexpr int ROWS = 64 * CONSUMERS, THREADS = WARPGROUP * (CONSUMERS + 1), STAGES = 2, TILES = KEYS / 8, OUT_TILES = E / 8;
  static constexpr bool BYTES = sizeof(In) == 1;
  static constexpr int QUERY_BYTES = tile_bytes<In>(ROWS, D), KEY_BYTES = tile_bytes<In>(KEYS, D);
  static constexpr int VALUE_BYTES = BYTES ? tile_bytes<In>(E, KEYS) : tile_bytes<In>(KEYS, E);
  static constexpr int SLICE = E > 128 ? 64 : E, SLICES = E / SLICE;
  static constexpr bool BESIDE = !BYTES || SLICES == 1;
  // Weights are at most two to this: bytes are finest, beside 0, from 2^-6 on, and go to 448.
  static constexpr float LIFT = BYTES ? 8.0f : 0.0f;
  enum Barriers { QUERIES_HERE, QUERIES_LEFT, KEYS_HERE, KEYS_LEFT = KEYS_HERE + STAGES, VALUES_HERE = KEYS_LEFT + STAGES,
                  VALUES_LEFT = VALUES_HERE + STAGES, BARRIERS = VALUES_LEFT + STAGES };
  static constexpr int SHARED_BYTES = SWIZZLE_BYTES + QUERY_BYTES + STAGES * (KEY_BYTES + VALUE_BYTES) + BARRIERS * int(sizeof(uint64_t));

  // A tile of queries and the keys that any of them sees.
  struct Work {
    int first_query, last_query, head, batch, begin, end;
    __device__ __forceinline__ Work(const megalm_attention_forward_params &p, const Schedule &schedule, int index) {
      int row, entry;
      schedule.find(index, row, entry);
      first_query = row * ROWS;
      last_query = min(first_query + ROWS, int(p.queries)) - 1;
      head = entry % int(p.heads);
      batch = entry / int(p.heads);
      const Visible visible = visible_of(p, batch);
      begin = visible.begin(first_query) / KEYS * KEYS;
      end = visible.end(last_query);
    }
  };

  // Of this thread: queries g and g + 8 of its warp's 16 (lane 4 g + t), all keys 8 n + 2 t, + 1 of a tile.
  float scores[TILES][4], out[OUT_TILES][4];
  float products[BYTES ? SLICE / 8 : 1][4];
  float maximum[2], total[2], rescale[2];
  uint32_t weights[KEYS / STEP<In>][4];
  int begin[2], end[2];

  __device__ __forceinline__ static int consumer() { return threadIdx.x / WARPGROUP - 1; }
  __device__ __forceinline__ static int row(int half) {
    return consumer() * 64 + threadIdx.x % WARPGROUP / WARP * 16 + threadIdx.x % WARP / 4 + 8 * half;
  }
  __device__ __forceinline__ static int column(int n, int i) { return n * 8 + threadIdx.x % 4 * 2 + i % 2; }

  // The warpgroups' turns to start products, in a ring of named barriers: each waits for the one before.
  __device__ __forceinline__ static void take_turn() { named_wait(1 + consumer(), 2 * WARPGROUP); }
  __device__ __forceinline__ static void pass_turn() { named_arrive(1 + (consumer() + 1) % CONSUMERS, 2 * WARPGROUP); }

  __device__ __forceinline__ void start(const Visible &visible, int first_query) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int query = first_query + row(half);
      const bool here = query < visible.queries;
      begin[half] = here ? visible.begin(query) : 0;
      end[half] = here ? visible.end(query) : 0;
      maximum[half] = -INFINITY;
      total[half] = 0.0f;
    }
#pragma unroll
    for (int n = 0; n < OUT_TILES; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) out[n][i] = 0.0f;
  }

  // Products become scores, -inf where a query doesn't see the key.
  __device__ __forceinline__ void score(const Score &scored, int first_query, int first_key, int offset, bool whole) {
    if (!scored.plain) to_scores(scores, scored, [&](int n, int i) { return first_key + column(n, i) - first_query - row(i / 2) - offset; });
    if (!whole) {
#pragma unroll
      for (int n = 0; n < TILES; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int key = first_key + column(n, i);
          if (key < begin[i / 2] || key >= end[i / 2]) scores[n][i] = -INFINITY;
        }
    }
  }

  // Scores become exponentials of their difference from the running maximum, to which the sums are scaled; the output is later.
  __device__ __forceinline__ void exponentiate(float unit) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float largest = maximum[half];
#pragma unroll
      for (int n = 0; n < TILES; n++) largest = fmaxf(largest, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
      largest = reduce_quad(largest, [](float a, float b) { return fmaxf(a, b); });
      const float from = largest == -INFINITY ? 0.0f : largest * unit - LIFT;  // nothing seen yet: exponentials of -inf, not of NaN
      rescale[half] = largest == -INFINITY ? 1.0f : power_of_two((maximum[half] - largest) * unit);
      maximum[half] = largest;
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < TILES; n++)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; i++) {
          scores[n][i] = power_of_two(scores[n][i] * unit - from);
          sum += scores[n][i];
        }
      total[half] = total[half] * rescale[half] + sum;  // of this thread's keys; the quad is summed at the end
    }
  }

  __device__ __forceinline__ void scale_output() {
#pragma unroll
    for (int n = 0; n < OUT_TILES; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) out[n][i] *= rescale[i / 2];
  }

  // Divides by the sums, which have been lifted as the output was, and writes lse and the output. value_unit: what a 1 of the values is.
  __device__ __forceinline__ void finish(const megalm_attention_forward_params &p, const Work &work, float unit, float value_unit) {
    const float *const sinks = (const float *)p.sinks;
    float *const lse = (float *)p.lse + (work.batch * p.heads + work.head) * p.queries;
    T *const rows = (T *)p.out + work.batch * p.out_batch + work.head * p.out_head;
    T *to[2];
    float share[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float sum = reduce_quad(total[half], [](float a, float b) { return a + b; });
      float largest = maximum[half] * unit - LIFT, factor = 1.0f;
      if (sinks != nullptr) {
        const float sink = sinks[work.head] * LOG2E, top = fmaxf(largest, sink);
        factor = power_of_two(largest - top);
        sum = sum * factor + power_of_two(sink - top);
        largest = top;
      }
      const int query = work.first_query + row(half);
      const bool here = query < p.queries;
      if (threadIdx.x % 4 == 0 && here) lse[query] = sum > 0.0f ? (largest + log2f(sum)) * LN2 : -INFINITY;
      share[half] = sum > 0.0f ? factor / sum * value_unit : 0.0f;
      to[half] = here ? rows + query * p.out_row : nullptr;
    }
    write_fragment<E>(to, out, share);
  }

  // Where things are in shared memory.
  struct Shared {
    unsigned char *queries, *keys, *values;
    uint64_t *barriers;
    __device__ __forceinline__ explicit Shared(unsigned char *dynamic) {
      queries = first_tile(dynamic);
      keys = queries + QUERY_BYTES;
      values = keys + STAGES * KEY_BYTES;
      barriers = reinterpret_cast<uint64_t *>(values + STAGES * VALUE_BYTES);
    }
    __device__ __forceinline__ uint64_t *keys_here(int stage) const { return barriers + KEYS_HERE + stage; }
    __device__ __forceinline__ uint64_t *keys_left(int stage) const { return barriers + KEYS_LEFT + stage; }
    __device__ __forceinline__ uint64_t *values_here(int stage) const { return barriers + VALUES_HERE + stage; }
    __device__ __forceinline__ uint64_t *values_left(int stage) const { return barriers + VALUES_LEFT + stage; }
    __device__ __forceinline__ void start() const {
      barrier_start(barriers + QUERIES_HERE, 1);
      barrier_start(barriers + QUERIES_LEFT, 4 * CONSUMERS);  // a thread of each warp
#pragma unroll
      for (int stage = 0; stage < STAGES; stage++) {
        barrier_start(keys_here(stage), 1);
        barrier_start(keys_left(stage), 4 * CONSUMERS);
        barrier_start(values_here(stage), 1);
        barrier_start(values_left(stage), 4 * CONSUMERS);
      }
      barriers_started();
    }
  };

  // One thread: brings what the others multiply, as far ahead as the rings allow.
  __device__ __forceinline__ static void load(const megalm_attention_forward_params &p, const ForwardMaps &maps, const Schedule &schedule,
                                              const Shared &shared) {
    int turn = 0, done = 0;
    for (int round = 0; round * int(gridDim.x) < schedule.tiles; round++) {
      const int index = schedule.index(round);
      if (index >= schedule.tiles) continue;
      const Work work(p, schedule, index);
      const int group = work.head / int(p.heads / p.groups);
      const auto load_keys = [&](int n, int key) {
        const Place<STAGES> place(n);
        barrier_wait(shared.keys_left(place.stage), place.parity ^ 1);
        barrier_expect(shared.keys_here(place.stage), KEY_BYTES);
        load_tile<In, KEYS, D>(shared.keys + place.stage * KEY_BYTES, maps.k, shared.keys_here(place.stage), key, group, work.batch);
      };
      barrier_wait(shared.barriers + QUERIES_LEFT, done++ % 2 ^ 1);
      barrier_expect(shared.barriers + QUERIES_HERE, QUERY_BYTES);
      load_tile<In, ROWS, D>(shared.queries, maps.q, shared.barriers + QUERIES_HERE, work.first_query, work.head, work.batch);
      if (work.begin < work.end) load_keys(turn, work.begin);
      for (int key = work.begin; key < work.end; key += KEYS, turn++) {
        if (key + KEYS < work.end) load_keys(turn + 1, key + KEYS);  // which are wanted before these values
        const Place<STAGES> place(turn);
        barrier_wait(shared.values_left(place.stage), place.parity ^ 1);
        barrier_expect(shared.values_here(place.stage), VALUE_BYTES);
        unsigned char *const to = shared.values + place.stage * VALUE_BYTES;
        if constexpr (BYTES) tensor_load(to, maps.v, shared.values_here(place.stage), key, 0, group, work.batch);  // [E, KEYS]
        else load_tile<In, KEYS, E>(to, maps.v, shared.values_here(place.stage), key, group, work.batch);
      }
    }
  }

  __device__ __forceinline__ void start_scores(const Shared &shared, const Place<STAGES> &place) {
    barrier_wait(shared.keys_here(place.stage), place.parity);
    take_turn();
    matrix_fence();
    start_rows_by_rows<In, D, ROWS, KEYS>(scores, shared.queries, consumer() * 64, shared.keys + place.stage * KEY_BYTES);
    matrix_commit();
  }
  __device__ __forceinline__ void start_output(const unsigned char *values) {
    matrix_fence();
    if constexpr (BYTES) start_weights_by_rows<In, KEYS, SLICE>(products, weights, values);
    else start_weights_by_rows<In, KEYS, E>(out, weights, values);
    matrix_commit();
  }
  __device__ __forceinline__ void finish_output(int slice) {
    matrix_wait<0>();
    if constexpr (BYTES) {
      matrix_settle(products);
#pragma unroll
      for (int n = 0; n < SLICE / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) out[slice * SLICE / 8 + n][i] += products[n][i];
    } else {
      matrix_settle(out);
    }
  }
  __device__ __forceinline__ const unsigned char *values_of(const Shared &shared, const Place<STAGES> &place) {
    barrier_wait(shared.values_here(place.stage), place.parity);
    return shared.values + place.stage * VALUE_BYTES;
  }
  // All of a tile's products with values, beside nothing.
  __device__ __forceinline__ void add_output(const Shared &shared, const Place<STAGES> &place) {
    const unsigned char *const values = values_of(shared, place);
#pragma unroll
    for (int slice = 0; slice < (BYTES ? SLICES : 1); slice++) {
      start_output(values + slice * SLICE * PANEL_ROW);
      finish_output(slice);
    }
    warp_arrive(shared.values_left(place.stage));
  }

  // A warpgroup: its 64 queries of every tile.
  __device__ __forceinline__ static void multiply(const megalm_attention_forward_params &p, const Units &units, const Schedule &schedule,
                                                  const Shared &shared) {
    const int offset = int(p.keys - p.queries);
    int turn = 0, done = 0;
    if (consumer() == CONSUMERS - 1) pass_turn();  // the first one's turn
    for (int round = 0; round * int(gridDim.x) < schedule.tiles; round++) {
      const int index = schedule.index(round);
      if (index >= schedule.tiles) continue;
      const Work work(p, schedule, index);
      const Visible visible = visible_of(p, work.batch);
      const int group = work.head / int(p.heads / p.groups);
      const double scale = BYTES ? p.scale * units.query(work.batch, work.head) * units.key(work.batch, group) : p.scale;
      const Score scored = Score::make(scale, p.softcap, (const float *)p.slopes, work.head);
      // What all of them see needs no mask.
      const int all_begin = visible.begin(work.last_query);
      const int all_end = work.last_query + 1 - work.first_query == ROWS ? visible.end(work.first_query) : 0;
      const auto whole = [&](int key) { return key >= all_begin && key + KEYS <= all_end; };
      HopperForward f;
      f.start(visible, work.first_query);
      barrier_wait(shared.barriers + QUERIES_HERE, done++ % 2);
      if (work.begin < work.end) {
        const Place<STAGES> place(turn);
        f.start_scores(shared, place);
        pass_turn();
        matrix_wait<0>();
        matrix_settle(f.scores);
        warp_arrive(shared.keys_left(place.stage));
        f.score(scored, work.first_query, work.begin, offset, whole(work.begin));
        f.exponentiate(scored.unit);
        as_weights<In>(f.weights, f.scores);
      }
      for (int key = work.begin + KEYS; key < work.end; key += KEYS, turn++) {
        const Place<STAGES> before(turn), place(turn + 1);
        if constexpr (!BESIDE) f.add_output(shared, before);
        f.start_scores(shared, place);
        if constexpr (BESIDE) f.start_output(f.values_of(shared, before));  // runs while the scores become exponentials
        pass_turn();
        matrix_wait<BESIDE ? 1 : 0>();
        matrix_settle(f.scores);
        warp_arrive(shared.keys_left(place.stage));
        f.score(scored, work.first_query, key, offset, whole(key));
        f.exponentiate(scored.unit);
        if constexpr (BESIDE) {
          f.finish_output(0);
          warp_arrive(shared.values_left(before.stage));
        }
        f.scale_output();
        as_weights<In>(f.weights, f.scores);
      }
      warp_arrive(shared.barriers + QUERIES_LEFT);
      if (work.begin < work.end) {
        f.add_output(shared, Place<STAGES>(turn++));
      }
      f.finish(p, work, scored.unit, BYTES ? units.value(work.batch, group) : 1.0f);
    }
    if (consumer() == 0) take_turn();  // that the last one passed
  }
};

template <typename T, typename In, int D, int E, int CONSUMERS, int KEYS>
__global__ void __launch_bounds__(WARPGROUP *(CONSUMERS + 1), 1)
    attention_hopper_forward(const megalm_attention_forward_params p, MEGALM_CONSTANT ForwardMaps maps, const Units units, const Schedule schedule) {
#ifdef MEGALM_HOPPER
  using F = HopperForward<T, In, D, E, CONSUMERS, KEYS>;
  MEGALM_DYNAMIC_SHARED(unsigned char, dynamic);
  const typename F::Shared shared(dynamic);
  if (threadIdx.x == 0) shared.start();
  __syncthreads();
  if (threadIdx.x / WARPGROUP == 0) {
    fewer_registers<Registers<CONSUMERS>::LOADS>();
    if (threadIdx.x == 0) F::load(p, maps, schedule, shared);
  } else {
    more_registers<Registers<CONSUMERS>::MULTIPLIES>();
    F::multiply(p, units, schedule, shared);
  }
#endif
}

// The kernel, once its maps are made.
template <typename T, typename In, int D, int E, int CONSUMERS, int KEYS>
int start_hopper_forward(const megalm_attention_forward_params &p, const ForwardMaps &maps, const Units &units, megalm_stream stream) {
  using F = HopperForward<T, In, D, E, CONSUMERS, KEYS>;
  const auto kernel = attention_hopper_forward<T, In, D, E, CONSUMERS, KEYS>;
  const int error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, F::SHARED_BYTES);
  if (error != cudaSuccess) return error;
  const int64_t heads = p.batch * p.heads, rows = ceil_div(p.queries, int64_t(F::ROWS)), each = p.heads / p.groups;
  const int64_t fit = max(SECTION_BYTES / (p.keys * (D + E) * int64_t(sizeof(In))), int64_t(1)) * each;
  const Schedule schedule{int(rows), int(heads), int(min(fit, heads)), int(rows * heads)};
  MEGALM_LAUNCH(kernel, dim3(unsigned(min(rows * heads, int64_t(processors())))), dim3(F::THREADS), F::SHARED_BYTES, stream, p, maps, units, schedule);
  return cudaSuccess;
}

template <typename T, int D, int E, int CONSUMERS, int KEYS>
int launch_hopper_forward(const megalm_attention_forward_params &p, megalm_stream stream) {
  constexpr int ROWS = HopperForward<T, T, D, E, CONSUMERS, KEYS>::ROWS;
  ForwardMaps maps;
  int error = make_tensor_map<T>(maps.q, p.q, {p.head_dim, p.queries, p.heads, p.batch, p.q_row, p.q_head, p.q_batch}, ROWS);
  if (error == cudaSuccess) error = make_tensor_map<T>(maps.k, p.k, {p.head_dim, p.keys, p.groups, p.batch, p.k_row, p.k_head, p.k_batch}, KEYS);
  if (error == cudaSuccess) error = make_tensor_map<T>(maps.v, p.v, {p.value_dim, p.keys, p.groups, p.batch, p.v_row, p.v_head, p.v_batch}, KEYS);
  return error != cudaSuccess ? error : start_hopper_forward<T, T, D, E, CONSUMERS, KEYS>(p, maps, {}, stream);
}

}  // namespace attention

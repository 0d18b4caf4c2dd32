// Rotary position embedding, forward and backward, in one pass over memory. Math: rotary.h.
//
// A thread has the same two packs in up to HEADS heads of one token: VEC pairs, whose angles it reads once, with the loads of all
// its heads in flight together. Adjacent threads have adjacent packs, then adjacent heads.
#include "common/common.cuh"
#include "rotary.h"

namespace {

constexpr int BLOCK = 256, HEADS = 4;

template <typename T> struct Place {  // of [s, b, heads, d]
  T *start;
  int64_t s, b, head;
};

template <typename T> struct Part {
  Place<const T> from;
  Place<T> to;
  int heads, shares;  // shares: threads that divide the heads of a token among them, up to HEADS each
  int rotary;         // leading dims that are turned
};

template <typename T> struct Arguments {
  Part<T> query, key, value;
  const float *cos, *sin;
  const int64_t *positions;
  int64_t positions_s, positions_b, offset, places;
  uint32_t units, shares, batch;  // a unit: one token's share of heads; shares: of all three parts
  int lanes, d;
  bool interleaved, inverse;
};

// N floats, which stand at a multiple of 16 bytes or of their own size.
template <int N, typename C> __device__ __forceinline__ void read_table(const float *from, C (&to)[N]) {
  constexpr int PIECE = N < 4 ? N : 4;
#pragma unroll
  for (int start = 0; start < N; start += PIECE) {
    const Pack<float, PIECE> pack = load<PIECE>(from + start);
#pragma unroll
    for (int i = 0; i < PIECE; i++) to[start + i] = pack[i];
  }
}

template <typename C> __device__ __forceinline__ void turn(C &first, C &second, C cos, C sin) {
  const C x = first, y = second;
  first = x * cos - y * sin;
  second = y * cos + x * sin;
}

// ADJACENT: pairs are neighbours inside a pack; else each pack holds one half of VEC pairs. VEC 1 takes both, by `interleaved`.
template <typename T, int VEC, bool ADJACENT> __global__ void __launch_bounds__(BLOCK) rotary(const Arguments<T> a) {
  using C = compute_t<T>;
  const uint32_t unit = blockIdx.x * blockDim.y + threadIdx.y;
  const int lane = blockIdx.y * blockDim.x + threadIdx.x;
  if (unit >= a.units || lane >= a.lanes) return;
  const uint32_t token = unit / a.shares, s = token / a.batch, b = token % a.batch;
  int share = unit % a.shares;
  Part<T> part = a.query;
  if (share >= a.query.shares + a.key.shares) {
    share -= a.query.shares + a.key.shares;
    part = a.value;
  } else if (share >= a.query.shares) {
    share -= a.query.shares;
    part = a.key;
  }

  const int turned = part.rotary / (2 * VEC), half = part.rotary / 2;
  const bool turns = lane < turned;
  int first = lane * VEC, second = first + half;
  if (VEC == 1 && a.interleaved) first = 2 * lane, second = first + 1;
  if (!turns) {
    first = part.rotary + (lane - turned) * VEC;
    second = first + ceil_div(a.d - part.rotary, 2);
  }
  if (first >= a.d) return;
  const bool both = second < a.d;
  const T *from = part.from.start + s * part.from.s + b * part.from.b;
  T *to = part.to.start + s * part.to.s + b * part.to.b;
  if (!turns && from == to) return;

  Pack<T, VEC> firsts[HEADS], seconds[HEADS];
#pragma unroll
  for (int h = 0; h < HEADS; h++) {
    const int head = share + h * part.shares;
    firsts[h] = seconds[h] = Pack<T, VEC>{};
    if (head >= part.heads) continue;
    firsts[h] = load<VEC>(from + head * part.from.head + first);
    if (both) seconds[h] = load<VEC>(from + head * part.from.head + second);
  }
  C cos[VEC], sin[VEC];
  if (turns) {
    const int64_t given = a.positions == nullptr ? int64_t(s) : a.positions[s * a.positions_s + b * a.positions_b];
    const int64_t position = a.offset + given;
    const bool known = position >= 0 && position < a.places;
    const int64_t row = (known ? position : 0) * half;
    if constexpr (ADJACENT) {  // the entries of the first pack's pairs, then of the second's
      constexpr int PAIRS = VEC / 2;
      C quarter_cos[PAIRS], quarter_sin[PAIRS];
#pragma unroll
      for (int which = 0; which < 2; which++) {
        const int64_t entry = row + which * (half / 2) + lane * PAIRS;
        read_table(a.cos + entry, quarter_cos);
        read_table(a.sin + entry, quarter_sin);
#pragma unroll
        for (int i = 0; i < PAIRS; i++) cos[which * PAIRS + i] = quarter_cos[i], sin[which * PAIRS + i] = quarter_sin[i];
      }
    } else {
      read_table(a.cos + row + lane * VEC, cos);
      read_table(a.sin + row + lane * VEC, sin);
    }
#pragma unroll
    for (int i = 0; i < VEC; i++) {
      if (a.inverse) sin[i] = -sin[i];
      if (!known) cos[i] = sin[i] = C(NAN);
    }
  }
#pragma unroll
  for (int h = 0; h < HEADS; h++) {
    const int head = share + h * part.shares;
    if (head >= part.heads) continue;
    if (turns) {
      C x[VEC], y[VEC];
#pragma unroll
      for (int i = 0; i < VEC; i++) x[i] = firsts[h][i], y[i] = seconds[h][i];
      if constexpr (ADJACENT) {
#pragma unroll
        for (int i = 0; i < VEC; i += 2) {
          turn(x[i], x[i + 1], cos[i / 2], sin[i / 2]);
          turn(y[i], y[i + 1], cos[(VEC + i) / 2], sin[(VEC + i) / 2]);
        }
      } else {
#pragma unroll
        for (int i = 0; i < VEC; i++) turn(x[i], y[i], cos[i], sin[i]);
      }
      firsts[h].set(x);
      seconds[h].set(y);
    }
    store<VEC>(to + head * part.to.head + first, firsts[h]);
    if (both) store<VEC>(to + head * part.to.head + second, seconds[h]);
  }
}

template <typename T> Part<T> part(const void *from, int64_t s, int64_t b, int64_t head, void *to, int64_t to_s, int64_t to_b,
                                   int64_t to_head, int64_t heads, int64_t rotary) {
  const int count = from == nullptr ? 0 : int(heads);
  return {{(const T *)from, s, b, head}, {(T *)to, to_s, to_b, to_head}, count, ceil_div(count, HEADS), int(rotary)};
}

template <typename T> bool vectors(const Part<T> &part) {
  const Place<const T> &from = part.from;
  const Place<T> &to = part.to;
  return part.heads == 0 || (aligned<T>(from.start, from.s) && aligned<T>(nullptr, from.b) && aligned<T>(nullptr, from.head) &&
                             aligned<T>(to.start, to.s) && aligned<T>(nullptr, to.b) && aligned<T>(nullptr, to.head));
}

template <typename T, int VEC, bool ADJACENT> int launch(Arguments<T> a, int rotary_lanes, bool in_place, megalm_stream stream) {
  a.lanes = in_place ? rotary_lanes / VEC : ceil_div(a.d, 2 * VEC);
  if (a.lanes == 0) return cudaSuccess;
  const int across = min(a.lanes, BLOCK), units = BLOCK / across;
  const auto kernel = rotary<T, VEC, ADJACENT>;
  const dim3 grid(ceil_div(a.units, uint32_t(units)), ceil_div(a.lanes, across));
  MEGALM_LAUNCH(kernel, grid, dim3(across, units), 0, stream, a);
  return cudaSuccess;
}

template <typename T> int run_typed(const megalm_rotary_params &p, megalm_stream stream) {
  constexpr int VEC = vector_width<T>;
  Arguments<T> a{
      part<T>(p.query, p.query_s, p.query_b, p.query_h, p.query_out, p.query_out_s, p.query_out_b, p.query_out_h, p.query_heads,
              p.rotary),
      part<T>(p.key, p.key_s, p.key_b, p.key_h, p.key_out, p.key_out_s, p.key_out_b, p.key_out_h, p.key_heads, p.rotary),
      part<T>(p.value, p.value_s, p.value_b, p.value_h, p.value_out, p.value_out_s, p.value_out_b, p.value_out_h, p.value_heads,
              0),
      (const float *)p.cos, (const float *)p.sin, (const int64_t *)p.positions, p.positions_s, p.positions_b, p.offset, p.places,
      0, 0, uint32_t(p.b), 0, int(p.d), p.interleaved != 0, p.inverse != 0};
  a.shares = a.query.shares + a.key.shares + a.value.shares;
  const int64_t units = p.s * p.b * a.shares;
  if (units > INT32_MAX) return cudaErrorInvalidValue;
  if (units < 1) return cudaSuccess;
  a.units = uint32_t(units);
  const auto stays = [](const void *from, const void *to) { return from == nullptr || from == to; };
  const bool in_place = stays(p.query, p.query_out) && stays(p.key, p.key_out) && stays(p.value, p.value_out);
  const int rotary_lanes = int(p.rotary / 2);
  const bool whole = p.rotary % (2 * VEC) == 0 && p.d % (2 * VEC) == 0 && aligned<float>(p.cos) && aligned<float>(p.sin) &&
                     vectors(a.query) && vectors(a.key) && vectors(a.value);
  if (!whole) return launch<T, 1, false>(a, rotary_lanes, in_place, stream);
  return p.interleaved ? launch<T, VEC, true>(a, rotary_lanes, in_place, stream)
                       : launch<T, VEC, false>(a, rotary_lanes, in_place, stream);
}

int run(const megalm_rotary_params &p, megalm_stream stream) {
  const int64_t most = INT32_MAX / 2;
  if (p.d < 1 || p.d > most || p.rotary < 0 || p.rotary > p.d || p.rotary % 2 != 0 || p.places < 1 || p.query_heads > most ||
      p.key_heads > most || p.value_heads > most || p.s > most || p.b > most)
    return cudaErrorInvalidValue;
  MEGALM_DISPATCH(p.dtype, return run_typed<T>(p, stream));
  return cudaSuccess;
}

}  // namespace

MEGALM_DEFINE(rotary, run)

// Scaled masked softmax, forward: each visible score is read once and kept in the registers of the threads that share its row,
// as a power of two from a thread's own maximum, so that maximum and sum are reduced together. Math: softmax.h. Rows too long for
// that are read a second time.
#include "common/reduce.cuh"
#include "common/rows.cuh"
#include "softmax.h"

namespace {

constexpr int64_t MAX_ROWS = INT32_MAX, MAX_KEYS = INT32_MAX / 2;
constexpr int MAX_THREADS = 512, LONG_THREADS = 512;

template <typename T> struct Arguments {
  const T *x;
  const uint8_t *mask;
  T *y;
  int64_t mask_b, mask_h, mask_q;
  uint32_t rows, heads;
  int queries, keys;
  compute_t<T> scale;  // in powers of two: times log2(e)
  bool causal;
};

// Where a row stands, and how many of its keys causality lets it see.
template <typename T> struct Row {
  const T *x;
  const uint8_t *mask;
  T *y;
  int seen, width;  // 0 beyond the last row, whose threads go through the reductions all the same

  __device__ __forceinline__ Row(const Arguments<T> &a, uint32_t row) {
    const uint32_t query = row % a.queries, head = row / a.queries;
    width = row < a.rows ? a.keys : 0;
    x = a.x + int64_t(row) * a.keys;
    y = a.y + int64_t(row) * a.keys;
    mask = a.mask == nullptr ? nullptr : a.mask + head / a.heads * a.mask_b + head % a.heads * a.mask_h + query * a.mask_q;
    seen = a.causal ? max(0, min(width, int(query) + 1 + a.keys - a.queries)) : width;
  }
};

// Which of N keys a mask shows. Kept as it was loaded: a register a byte would stop the loads after it.
template <int N, bool WORDS = N % 4 == 0> struct alignas(N) Visible {
  uint8_t bytes[N];
  __device__ __forceinline__ bool operator[](int i) const { return bytes[i] != 0; }
};
template <int N> struct alignas(N) Visible<N, true> {
  uint32_t words[N / 4];
  __device__ __forceinline__ bool operator[](int i) const { return (words[i / 4] >> (8 * (i % 4)) & 0xffu) != 0; }
};
template <int N> __device__ __forceinline__ Visible<N> load_mask(const uint8_t *from) {
  return *reinterpret_cast<const Visible<N> *>(from);
}

// The scores of one pack, -inf where a key isn't visible; returns the largest of them and `top`.
template <bool MASKED, typename T, int VEC>
__device__ __forceinline__ compute_t<T> scores(const Row<T> &row, int column, const Pack<T, VEC> &pack,
                                               const Visible<VEC> &shown, compute_t<T> (&to)[VEC], compute_t<T> top) {
#pragma unroll
  for (int i = 0; i < VEC; i++) to[i] = pack[i];
  if (MASKED || column + VEC > row.seen) {
#pragma unroll
    for (int i = 0; i < VEC; i++) {
      const bool visible = column + i < row.seen && (!MASKED || shown[i]);
      to[i] = visible ? to[i] : compute_t<T>(-INFINITY);
    }
  }
#pragma unroll
  for (int i = 0; i < VEC; i++) top = max(top, to[i]);
  return top;
}

// What some scores have to say of their row: the exponent of the largest, and the sum of 2^(exponent - top) over them.
template <typename C> struct Partial { C top, total; };

// From what exponents are taken where this is the largest: if nothing is visible, 2^(-inf - 0) is 0 and not NaN.
template <typename C> __device__ __forceinline__ C base(C top) { return top == C(-INFINITY) ? C(0) : top; }

template <typename C> __device__ __forceinline__ Partial<C> merge_lanes(Partial<C> mine, int width) {
  const C top = reduce_lanes<Max>(mine.top, width);
  return {top, reduce_lanes<Sum>(mine.total * power_of_two(mine.top - base(top)), width)};
}

// Over the threads that share a row. A block whose rows take more than a warp has one row, so this runs once in it.
template <typename C> __device__ __forceinline__ Partial<C> merge_row(Partial<C> mine) {
  if (blockDim.x <= WARP) return merge_lanes(mine, blockDim.x);
  MEGALM_SHARED(Partial<C>, partial, WARP);
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
  mine = merge_lanes(mine, WARP);
  if (lane == 0) partial[warp] = mine;
  __syncthreads();
  return merge_lanes(lane < warps ? partial[lane] : Partial<C>{C(-INFINITY), C(0)}, WARP);
}

// What makes a probability of a power of two that was taken from `top`.
template <typename C> __device__ __forceinline__ C factor(C top, const Partial<C> &row) {
  return row.total == C(0) ? C(0) : power_of_two(top - base(row.top)) / row.total;
}

template <typename T, int VEC, int PACKS, bool MASKED>
__global__ void __launch_bounds__(PACKS == 8 ? MAX_THREADS : SMALL_BLOCK) softmax_forward(const Arguments<T> a) {
  using C = compute_t<T>;
  for (uint32_t first = blockIdx.x * blockDim.y; first < a.rows; first += gridDim.x * blockDim.y) {
    const Row<T> row(a, first + threadIdx.y);
    Pack<T, VEC> packs[PACKS];
    Visible<VEC> shown[PACKS];
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
      const int column = (p * blockDim.x + threadIdx.x) * VEC;
      packs[p] = Pack<T, VEC>{};
      shown[p] = Visible<VEC>{};
      if (column >= row.seen) continue;
      packs[p] = load<VEC>(row.x + column);
      if (MASKED) shown[p] = load_mask<VEC>(row.mask + column);
    }
    C values[PACKS][VEC] = {};
    C largest = C(-INFINITY);
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
      const int column = (p * blockDim.x + threadIdx.x) * VEC;
      if (column < row.seen) largest = scores<MASKED>(row, column, packs[p], shown[p], values[p], largest);
    }
    Partial<C> mine{largest * a.scale, C(0)};
    const C from = base(mine.top);
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
      if ((p * blockDim.x + threadIdx.x) * VEC >= row.seen) continue;
#pragma unroll
      for (int i = 0; i < VEC; i++) mine.total += values[p][i] = power_of_two(fma(values[p][i], a.scale, -from));
    }
    const C scale = factor(mine.top, merge_row(mine));
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
      const int column = (p * blockDim.x + threadIdx.x) * VEC;
      if (column >= row.width) continue;
#pragma unroll
      for (int i = 0; i < VEC; i++) values[p][i] *= scale;
      store<VEC>(row.y + column, values[p]);
    }
  }
}

// A block a row of any length: what the second loop reads again is in L1 or L2.
template <typename T, int VEC, bool MASKED>
__global__ void __launch_bounds__(LONG_THREADS) softmax_forward_long(const Arguments<T> a) {
  using C = compute_t<T>;
  const Row<T> row(a, blockIdx.x);
  const int first = threadIdx.x * VEC, step = LONG_THREADS * VEC;
  C values[VEC], largest = C(-INFINITY);
  const auto read = [&](int column) {
    Visible<VEC> shown{};
    if (MASKED) shown = load_mask<VEC>(row.mask + column);
    return scores<MASKED>(row, column, load<VEC>(row.x + column), shown, values, largest);
  };
  Partial<C> mine{C(-INFINITY), C(0)};
  for (int column = first; column < row.seen; column += step) {
    largest = read(column);
    const C top = largest * a.scale;
    mine = {top, mine.total * power_of_two(mine.top - base(top))};
#pragma unroll
    for (int i = 0; i < VEC; i++) mine.total += power_of_two(fma(values[i], a.scale, -base(top)));
  }
  const Partial<C> whole = merge_row(mine);
  const C scale = factor(whole.top, whole), from = base(whole.top);
  for (int column = first; column < a.keys; column += step) {
    if (column < row.seen) {
      read(column);
#pragma unroll
      for (int i = 0; i < VEC; i++) values[i] = power_of_two(fma(values[i], a.scale, -from)) * scale;
    } else {
#pragma unroll
      for (int i = 0; i < VEC; i++) values[i] = C(0);
    }
    store<VEC>(row.y + column, values);
  }
}

template <typename T, int VEC, int PACKS, bool MASKED> int launch(const Arguments<T> &a, megalm_stream stream) {
  const RowShape shape = row_shape(a.keys, VEC, PACKS);
  const auto kernel = softmax_forward<T, VEC, PACKS, MASKED>;
  const int64_t needed = ceil_div(int64_t(a.rows), int64_t(shape.rows));
  // Many small rows loop, so that a block's start is paid once; a row of more than a warp is a block of its own.
  const int64_t grid = shape.rows > 1 ? min(needed, 4 * resident_blocks(kernel, shape.threads * shape.rows, 0)) : needed;
  MEGALM_LAUNCH(kernel, dim3(unsigned(grid)), shape.block(), 0, stream, a);
  return cudaSuccess;
}

template <typename T, int VEC, bool MASKED> int launch_any(const Arguments<T> &a, megalm_stream stream) {
  if constexpr (VEC > 1) {
    if (a.keys <= 16 * VEC) return launch<T, VEC, 1, MASKED>(a, stream);
    if (a.keys <= WARP * 4 * VEC) return launch<T, VEC, 4, MASKED>(a, stream);
  }
  if (a.keys <= MAX_THREADS * 8 * VEC) return launch<T, VEC, 8, MASKED>(a, stream);
  const auto kernel = softmax_forward_long<T, VEC, MASKED>;
  MEGALM_LAUNCH(kernel, dim3(a.rows), dim3(LONG_THREADS), 0, stream, a);
  return cudaSuccess;
}

template <typename T> int run_typed(const megalm_softmax_forward_params &p, megalm_stream stream) {
  constexpr int VEC = vector_width<T>;
  const Arguments<T> a{(const T *)p.x, (const uint8_t *)p.mask, (T *)p.y, p.mask_b, p.mask_h, p.mask_q,
                       uint32_t(p.batch * p.heads * p.queries), uint32_t(p.heads), int(p.queries), int(p.keys),
                       compute_t<T>(p.scale * LOG2_E), p.causal != 0};
  const auto masked = [&](int64_t place) { return place % VEC == 0; };  // a pack of the mask is VEC bytes
  const bool vectors = p.keys % VEC == 0 && aligned<T>(p.x) && aligned<T>(p.y) &&
                       (p.mask == nullptr || (masked(int64_t(reinterpret_cast<uintptr_t>(p.mask))) && masked(p.mask_b) &&
                                              masked(p.mask_h) && masked(p.mask_q)));
  if (p.mask == nullptr) return vectors ? launch_any<T, VEC, false>(a, stream) : launch_any<T, 1, false>(a, stream);
  return vectors ? launch_any<T, VEC, true>(a, stream) : launch_any<T, 1, true>(a, stream);
}

int run(const megalm_softmax_forward_params &p, megalm_stream stream) {
  if (!(p.scale > 0)) return cudaErrorInvalidValue;
  if (p.batch < 1 || p.heads < 1 || p.queries < 1 || p.keys < 1) return cudaSuccess;
  if (p.keys > MAX_KEYS || p.batch > MAX_ROWS || p.heads > MAX_ROWS / p.batch || p.queries > MAX_ROWS / (p.batch * p.heads))
    return cudaErrorInvalidValue;
  MEGALM_DISPATCH(p.dtype, return run_typed<T>(p, stream));
  return cudaSuccess;
}

}  // namespace

MEGALM_DEFINE(softmax_forward, run)

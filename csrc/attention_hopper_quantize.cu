// q, k and v of attention as e4m3. Two kernels, so that a head's unit is known before its first element is rounded: the largest of each
// chunk of rows, then the rounding. A block has a chunk of one head of one of the three. Moved: 2 x 2 bytes an element read, the second
// time from L2 where it holds them, and 1 written. Layout: attention_hopper_quantize.cuh.
#include "attention_hopper_quantize.cuh"

#include "common/hopper.cuh"
#include "common/reduce.cuh"

namespace {

using attention::Bytes;

constexpr int THREADS = 128;
constexpr float MOST = 448.0f, LEAST = 0x1p-48f;  // of e4m3; below it a head has the unit of it: fp32 holds the product of two

// What a block has: rows first .. first + rows of a head.
template <typename T> struct Part {
  const T *from;
  int64_t stride, place;  // place: of the head's entry, or row, in [batch, heads + 2 groups, ..]
  int first, rows, width, tensor, index;  // index: of the head among those of its tensor, all batch entries together

  __device__ __forceinline__ explicit Part(const megalm_attention_forward_params &p) {
    const int heads = int(p.heads), groups = int(p.groups), batch = blockIdx.z, number = blockIdx.y;
    tensor = number < heads ? 0 : number < heads + groups ? 1 : 2;
    const int head = number - (tensor == 0 ? 0 : tensor == 1 ? heads : heads + groups);
    index = batch * (tensor == 0 ? heads : groups) + head;
    place = int64_t(batch) * (heads + 2 * groups) + number;
    stride = tensor == 0 ? p.q_row : tensor == 1 ? p.k_row : p.v_row;
    from = tensor == 0   ? (const T *)p.q + batch * p.q_batch + head * p.q_head
           : tensor == 1 ? (const T *)p.k + batch * p.k_batch + head * p.k_head
                         : (const T *)p.v + batch * p.v_batch + head * p.v_head;
    width = int(tensor == 2 ? p.value_dim : p.head_dim);
    first = blockIdx.x * Bytes::CHUNK;
    rows = min(int(tensor == 0 ? p.queries : p.keys) - first, Bytes::CHUNK);
    from += first * stride;
  }
  __device__ __forceinline__ Pack<T, 8> pack(int row, int chunk) const { return load<8>(from + row * stride + chunk * 8); }
};

// The unit is a power of two, so that dividing by it is exact: e4m3 has the same precision at any scale.
struct Unit {
  float up, down;
  __device__ __forceinline__ explicit Unit(float largest) {
    int exponent;
    const float fraction = frexpf(fmaxf(largest, LEAST), &exponent);  // in [1/2, 1)
    const int shift = (fraction <= MOST / 512.0f ? 9 : 8) - exponent;
    const bool finite = largest < INFINITY;
    up = finite ? ldexpf(1.0f, shift) : bits_as_float(0x7fc00000);
    down = ldexpf(1.0f, finite ? -shift : 0);
  }
};

template <typename T> __global__ void __launch_bounds__(THREADS) attention_quantize_largest(const megalm_attention_forward_params p, const Bytes bytes) {
#ifdef MEGALM_HOPPER
  const Part<T> part(p);
  const int packs = part.width / 8;
  float largest = 0.0f;
#pragma unroll 8
  for (int i = threadIdx.x; i < part.rows * packs; i += THREADS) {
    const Pack<T, 8> pack = part.pack(i / packs, i % packs);
#pragma unroll
    for (int j = 0; j < 8; j++) largest = fmaxf(largest, fabsf(pack[j]));  // of numbers: a NaN stays what it is
  }
  largest = reduce_block<Max>(largest);
  if (threadIdx.x == 0) ((float *)((char *)p.workspace + bytes.largest))[part.place * bytes.chunks + blockIdx.x] = largest;
#endif
}

// A thread: 16 neighbours of a row.
template <typename T> __device__ __forceinline__ void write_rows(const Part<T> &part, unsigned char *to, int64_t all_rows, float up) {
  const int packs = part.width / 16;
  to += (part.index * all_rows + part.first) * part.width;
#pragma unroll 4
  for (int i = threadIdx.x; i < part.rows * packs; i += THREADS) {
    const int row = i / packs, chunk = i % packs;
    uint32_t words[4];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const Pack<T, 8> pack = part.pack(row, 2 * chunk + half);
#pragma unroll
      for (int j = 0; j < 2; j++)
        words[2 * half + j] = four_bits(pack[4 * j] * up, pack[4 * j + 1] * up, pack[4 * j + 2] * up, pack[4 * j + 3] * up);
    }
    *reinterpret_cast<uint4 *>(to + int64_t(row) * part.width + chunk * 16) = {words[0], words[1], words[2], words[3]};
  }
}

// A thread: 16 keys of eight columns, turned in its registers. A warp reads 64 neighbouring bytes of a key and writes 128 of a column.
template <typename T> __device__ __forceinline__ void write_transposed(const Part<T> &part, unsigned char *to, int64_t all_keys, float up) {
  constexpr int SIXTEENS = Bytes::CHUNK / 16;
  for (int i = threadIdx.x; i < SIXTEENS * part.width / 8; i += THREADS) {
    const int sixteen = i % SIXTEENS, chunk = i / SIXTEENS;
    Pack<T, 8> packs[16];  // by place
#pragma unroll
    for (int place = 0; place < 16; place++) {
      const int key = sixteen * 16 + attention::key_of_place(place);
      packs[place] = key < part.rows ? part.pack(key, chunk) : Pack<T, 8>{};
    }
    unsigned char *const column = to + (int64_t(part.index) * part.width + chunk * 8) * all_keys + part.first + sixteen * 16;
#pragma unroll
    for (int j = 0; j < 8; j++) {
      uint32_t words[4];
#pragma unroll
      for (int t = 0; t < 4; t++)
        words[t] = four_bits(packs[4 * t][j] * up, packs[4 * t + 1][j] * up, packs[4 * t + 2][j] * up, packs[4 * t + 3][j] * up);
      *reinterpret_cast<uint4 *>(column + j * all_keys) = {words[0], words[1], words[2], words[3]};
    }
  }
}

template <typename T> __global__ void __launch_bounds__(THREADS) attention_quantize(const megalm_attention_forward_params p, const Bytes bytes) {
#ifdef MEGALM_HOPPER
  const Part<T> part(p);
  unsigned char *const workspace = (unsigned char *)p.workspace;
  const float *const chunks = (const float *)(workspace + bytes.largest) + part.place * bytes.chunks;
  float largest = 0.0f;
  for (int i = threadIdx.x; i < bytes.chunks; i += THREADS) largest = fmaxf(largest, chunks[i]);
  const Unit unit(reduce_block<Max>(largest));
  if (blockIdx.x == 0 && threadIdx.x == 0) ((float *)(workspace + bytes.units))[part.place] = unit.down;
  if (part.rows <= 0) return;
  if (part.tensor == 0) write_rows(part, workspace, p.queries, unit.up);
  else if (part.tensor == 1) write_rows(part, workspace + bytes.k, p.keys, unit.up);
  else write_transposed(part, workspace + bytes.v, bytes.keys, unit.up);
#endif
}

template <typename T> int launch(const megalm_attention_forward_params &p, const Bytes &bytes, megalm_stream stream) {
  const auto measure = attention_quantize_largest<T>, round = attention_quantize<T>;
  const dim3 grid(unsigned(bytes.chunks), unsigned(p.heads + 2 * p.groups), unsigned(p.batch));
  MEGALM_LAUNCH(measure, grid, dim3(THREADS), 0, stream, p, bytes);
  MEGALM_LAUNCH(round, grid, dim3(THREADS), 0, stream, p, bytes);
  return cudaSuccess;
}

}  // namespace

int attention_hopper_quantize(const megalm_attention_forward_params &p, const attention::Bytes &bytes, megalm_stream stream) {
  return p.dtype == MEGALM_BF16 ? launch<bf16>(p, bytes, stream) : launch<f16>(p, bytes, stream);
}

// Where attention in fp8 has its bytes: q, k and v as e4m3, and what a 1 of each head is worth. Math: attention.h.
#pragma once
#include "attention.h"
#include "common/common.cuh"

namespace attention {

// The workspace: q [batch, heads, queries, head_dim] and k [batch, groups, keys, head_dim] as they are; v transposed, [batch, groups,
// value_dim, keys up to a multiple of CHUNK], as the products of bytes want it, with the keys of each 16 in the order of key_of_place and
// zeros beyond the last; then fp32 [batch, heads + 2 groups, chunks] the largest of each chunk, and [batch, heads + 2 groups] the units.
struct Bytes {
  int64_t keys, chunks;                 // of a row of v; the most of any tensor
  int64_t k, v, largest, units, size;  // offsets in bytes

  static constexpr int CHUNK = 128;  // rows that a block of threads rounds
  static int64_t chunks_of(int64_t rows) { return ceil_div(rows, int64_t(CHUNK)); }
  static Bytes make(const megalm_attention_forward_params &p) {
    const auto aligned = [](int64_t bytes) { return ceil_div(bytes, int64_t(128)) * 128; };
    Bytes made;
    const int64_t entries = p.batch * (p.heads + 2 * p.groups);
    made.keys = chunks_of(p.keys) * CHUNK;
    made.chunks = chunks_of(max(p.queries, p.keys));
    made.k = aligned(p.batch * p.heads * p.queries * p.head_dim);
    made.v = made.k + aligned(p.batch * p.groups * p.keys * p.head_dim);
    made.largest = made.v + p.batch * p.groups * p.value_dim * made.keys;
    made.units = made.largest + aligned(entries * made.chunks * int64_t(sizeof(float)));
    made.size = made.units + entries * int64_t(sizeof(float));
    return made;
  }
};

// Which of 16 keys stands where: so that the accumulator of the scores is the left operand of the product with v, as it lies in registers.
__host__ __device__ constexpr int key_of_place(int place) { return place % 4 / 2 * 8 + place / 4 * 2 + place % 2; }

}  // namespace attention

int attention_hopper_quantize(const megalm_attention_forward_params &p, const attention::Bytes &bytes, megalm_stream stream);

/* Rotary position embedding (Su et al., "RoFormer", 2021) of queries and keys; values are copied beside them where they move.
 *
 * Pair j < rotary / 2 of a head is (x[j], x[j + rotary / 2]), or (x[2j], x[2j + 1]) where interleaved; at position p
 *
 *   (first, second) -> (first cos - second sin, second cos + first sin)      cos, sin = tables[p][j]; sin negated where inverse
 *
 * and the dims from `rotary` on stay as they are. The backward pass is the inverse rotation of the gradients. Each of query, key
 * and value is [s, b, heads, d], its last dim contiguous, with strides <part>_s, <part>_b and <part>_h where it is read and
 * <part>_out_s ... where it is written. A destination is its own source (in place) or does not overlap any source.
 */
#pragma once
#include "common/api.h"

typedef struct {
  const void *query;      /* [s, b, query_heads, d] */
  const void *key;        /* [s, b, key_heads, d] or null */
  const void *value;      /* [s, b, value_heads, d] or null; copied, not turned */
  void *query_out, *key_out, *value_out;
  const void *cos;        /* [places, rotary / 2], fp32 */
  const void *sin;        /* [places, rotary / 2], fp32 */
  const void *positions;  /* int64 [s, b] with strides positions_s and positions_b, or null: 0, 1, 2 ... s - 1 */
  int64_t s, b, d, query_heads, key_heads, value_heads;
  int64_t query_s, query_b, query_h, key_s, key_b, key_h, value_s, value_b, value_h;
  int64_t query_out_s, query_out_b, query_out_h, key_out_s, key_out_b, key_out_h, value_out_s, value_out_b, value_out_h;
  int64_t positions_s, positions_b;
  int64_t offset;         /* added to every position; one outside the tables turns its token to NaN */
  int64_t places, rotary; /* of the tables; rotary is even and at most d */
  int32_t interleaved, inverse;
  int32_t dtype;
} megalm_rotary_params;
MEGALM_OPERATION(rotary);

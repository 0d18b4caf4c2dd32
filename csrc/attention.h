/* Attention without an s x s buffer: out = softmax(scale q k^T + mask) v (Vaswani et al., 2017; the tiling and the running maximum are
 * those of Dao, FlashAttention-2, 2023).
 *
 * A query sees an interval of keys. With offset = keys - queries (so that the last query is aligned with the last key), query i sees
 * key j where
 *   i + offset - left <= j <= i + offset + right          left or right < 0: no bound; causal is right = 0
 *   first[i] <= j < last[i]                               where given: the bounds of its document
 * Neither bound may decrease with i. A query that sees no key has out 0 and lse -inf.
 *
 * Score of a seen pair: x = scale q k; with softcap > 0, softcap tanh(x / softcap) (Gemma 2, 2024); plus slopes[h] (j - i - offset)
 * (ALiBi, Press et al., 2022). A sink is a score of one more key whose value is 0. Dropout zeroes probabilities by the keyed mask of
 * megalm/ops/random.py, an element's place being ((head_first + h) queries + i) keys + j, and divides the others by 1 - p; it is on
 * where samples are given. Query head h reads key and value group
 * h / (heads / groups). Strides are in elements and multiples of 8; the last dim is contiguous and rows 16-byte aligned.
 *
 * In fp8 (Hopper's path only, without dropout), each head of q, k and v is divided by the least power of two that leaves it within 448 and
 * rounded to e4m3, and so are the exponentials, of which 2^8 stands for the largest score so far in the order of tiles of 128 keys. Sums of
 * exponentials, and so lse, are of the unrounded ones. A head with an infinity becomes NaN; one below 2^-48 has the unit of 2^-48.
 */
#pragma once
#include "common/api.h"

typedef struct {
  const void *q;        /* [queries, batch, heads, head_dim] by strides */
  const void *k;        /* [keys, batch, groups, head_dim] by strides */
  const void *v;        /* [keys, batch, groups, value_dim] by strides */
  const void *first;    /* [batch, queries] int32 or null */
  const void *last;     /* [batch, queries] int32 or null */
  const void *slopes;   /* [heads] fp32 or null */
  const void *sinks;    /* [heads] fp32 or null */
  const void *samples;  /* [batch] int64, global sample indices: dropout is on; or null */
  void *out;            /* [queries, batch, heads, value_dim] by strides */
  void *lse;            /* [batch, heads, queries] fp32: natural log of the sum of exponentials, sink included */
  void *workspace;      /* of as many bytes as megalm_attention_forward_workspace says, 128-byte aligned; null where it says 0 */
  int64_t batch, heads, groups, queries, keys, head_dim, value_dim;
  int64_t q_row, q_batch, q_head, k_row, k_batch, k_head, v_row, v_batch, v_head, out_row, out_batch, out_head;
  int64_t left, right, head_first;
  double scale, softcap, kept;  /* kept: what a kept probability is multiplied with, 1 / (1 - p) */
  uint32_t key0, key1, threshold;
  int32_t dtype;
  int32_t portable;  /* not 0: the kernels for sm_80 and up even where Hopper's own serve */
  int32_t fp8;       /* not 0: the products are of q, k, v and probabilities rounded to e4m3 */
} megalm_attention_forward_params;
MEGALM_OPERATION(attention_forward);
MEGALM_C int64_t megalm_attention_forward_workspace(const megalm_attention_forward_params *params);

/* delta[b][h][i] = sum over the value dim of grad_out out, which is what the gradient of a softmax subtracts. */
typedef struct {
  const void *out;       /* [queries, batch, heads, value_dim] by strides */
  const void *grad_out;  /* [queries, batch, heads, value_dim] by strides */
  void *delta;           /* [batch, heads, queries] fp32 */
  int64_t batch, heads, queries, value_dim;
  int64_t out_row, out_batch, out_head, grad_row, grad_batch, grad_head;
  int32_t dtype;
} megalm_attention_delta_params;
MEGALM_OPERATION(attention_delta);

/* With p = exp(score - lse) and g = p (grad_out v^T - delta) dscore/dproduct:
 *
 *   grad_v = p^T grad_out        grad_k = g^T q        grad_q = g k
 *
 * By the portable path each gradient element is summed by one block in a fixed order: no atomics, the same bits every time, no
 * workspace. The price is that scores are computed twice, once for the gradients of keys and values and once for that of the queries.
 * Hopper's path computes them once: the blocks of keys add their shares of grad_q up in the workspace, in fp32, as they come, or, where
 * the same bits are asked for, in turns. Nowhere is anything of s x s.
 */
typedef struct {
  const void *q, *k, *v;  /* as in the forward pass */
  const void *grad_out;   /* [queries, batch, heads, value_dim] by strides */
  const void *lse;        /* [batch, heads, queries] fp32 */
  const void *delta;      /* [batch, heads, queries] fp32 */
  const void *first, *last, *slopes, *samples;
  void *workspace;        /* of as many bytes as megalm_attention_backward_workspace says, 16-byte aligned; null where it says 0 */
  void *grad_q;           /* [queries, batch, heads, head_dim] by strides */
  void *grad_k;           /* [keys, batch, groups, head_dim] by strides */
  void *grad_v;           /* [keys, batch, groups, value_dim] by strides */
  int64_t batch, heads, groups, queries, keys, head_dim, value_dim;
  int64_t q_row, q_batch, q_head, k_row, k_batch, k_head, v_row, v_batch, v_head, out_row, out_batch, out_head;
  int64_t grad_q_row, grad_q_batch, grad_q_head, grad_k_row, grad_k_batch, grad_k_head, grad_v_row, grad_v_batch, grad_v_head;
  int64_t left, right, head_first;
  double scale, softcap, kept;
  uint32_t key0, key1, threshold;
  int32_t dtype;
  int32_t portable;
  int32_t deterministic;  /* not 0: the same bits every time */
} megalm_attention_backward_params;
MEGALM_OPERATION(attention_backward);
MEGALM_C int64_t megalm_attention_backward_workspace(const megalm_attention_backward_params *params);

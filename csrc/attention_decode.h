/* Attention of the newest few tokens of each sequence to a cache of keys and values: the step of generation.
 *
 *   out = softmax(scale q k^T) v over the keys that a query sees
 *
 * Query j of n is the token at place lengths[b] - n + j of its sequence and sees keys from place - left (left < 0: from the first) to
 * place. A query before the first token sees nothing: out 0, lse -inf. Softcap, slopes (of the distance key - place) and sinks are those
 * of attention.h. Nothing outside what the queries see is read, nor the table's entries for it.
 *
 * The cache is [keys, batch, groups, dim] by strides; or paged, [page, pages, groups, dim], where *_row is the stride between tokens of a
 * page and *_batch that between pages: token t of sequence b is token t % page of page table[b][t / page]. page is a power of two from
 * 16 up. Query head h reads group h / (heads / groups). Strides are in elements and multiples of 8; the last dim is contiguous
 * and rows 16-byte aligned.
 *
 * The keys of a sequence are divided into `splits` parts, a block each, whose results are merged by their sums of exponentials in
 * a second launch, in a fixed order (Dao et al., "Flash-Decoding for long-context inference", 2023).
 */
#pragma once
#include "common/api.h"

typedef struct {
  const void *q;        /* [queries, batch, heads, head_dim] by strides */
  const void *k;        /* the cache, as above, of head_dim */
  const void *v;        /* the cache, as above, of value_dim */
  const void *lengths;  /* [batch] int32, or null: all keys */
  const void *table;    /* [batch, keys / page] int32, or null: not paged */
  const void *slopes;   /* [heads] fp32 or null */
  const void *sinks;    /* [heads] fp32 or null */
  void *out;            /* [queries, batch, heads, value_dim] by strides */
  void *lse;            /* [batch, heads, queries] fp32: natural log of the sum of exponentials, sink included */
  void *partial_out;    /* [splits, batch, heads, queries, value_dim] fp32, or null where there is one split */
  void *partial_lse;    /* [splits, batch, heads, queries] fp32, or null likewise */
  int64_t batch, heads, groups, queries, head_dim, value_dim;
  int64_t keys;         /* the most that a sequence has: a greater length counts as this */
  int64_t page;         /* 0 where not paged */
  int64_t splits;       /* megalm_attention_decode_splits of these params */
  int64_t q_row, q_batch, q_head, k_row, k_batch, k_head, v_row, v_batch, v_head, out_row, out_batch, out_head;
  int64_t left;
  double scale, softcap;
  int32_t dtype;
} megalm_attention_decode_params;
MEGALM_OPERATION(attention_decode);

/* Into how many parts the keys are divided on the current device; reads sizes, left and dtype only. 0: no kernel serves. */
MEGALM_C int64_t megalm_attention_decode_splits(const megalm_attention_decode_params *params);

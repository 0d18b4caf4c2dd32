/* out = residual + dropout(x + bias) for hidden states, whose mask is drawn anew wherever it is needed and never stored.
 *
 *   dropout(v) = keep v scale,  scale = 1 / (1 - probability)
 *   keep       = the element's Philox word is at least `threshold`: megalm/ops/random.py, common/philox.cuh
 *
 * Row r of [rows, width] is position r / batch of sample samples[r % batch]; an element's place in its sample is
 * (start + r / batch) width + its column, `start` being the first position that this rank holds. All tensors but the samples and
 * the partial sums have the dtype of x. Work is counted in packs of 16 bytes, or in elements where width or an address doesn't
 * allow those: at most 2^31 - 1.
 */
#pragma once
#include "common/api.h"

typedef struct {
  const void *x;          /* [rows, width] */
  const void *bias;       /* [width] or null */
  const void *residual;   /* [rows, width] or null */
  const void *samples;    /* [batch], int64 */
  void *out;              /* [rows, width] */
  int64_t rows, width, batch, start;
  double scale;
  uint32_t key0, key1;    /* the mask's key words */
  uint32_t threshold;     /* 0 keeps all */
  int32_t dtype;
} megalm_dropout_forward_params;
MEGALM_OPERATION(dropout_forward);

/* grad_x = keep grad scale,  grad_bias = its sum over rows, made in two stages without atomics: blocks sum their rows into
 * `partial`, then the blocks are summed. The residual's gradient is grad itself.
 */
typedef struct {
  const void *grad;       /* [rows, width] */
  const void *samples;    /* [batch], int64 */
  void *grad_x;           /* [rows, width] */
  void *partial;          /* [blocks, width], fp32; null without a bias */
  void *grad_bias;        /* [width], or null where there is no bias */
  int64_t rows, width, batch, start;
  int64_t blocks;         /* megalm_dropout_backward_blocks of these params; 0 without a bias */
  double scale;
  uint32_t key0, key1, threshold;
  int32_t dtype;
} megalm_dropout_backward_params;
MEGALM_OPERATION(dropout_backward);

/* How many rows of partial sums a backward pass needs; reads whether grad_bias is null, the pointers' alignment, sizes and dtype. */
MEGALM_C int64_t megalm_dropout_backward_blocks(const megalm_dropout_backward_params *params);

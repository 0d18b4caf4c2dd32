/* Softmax of scaled, masked scores over the last dim; the scale is positive.
 *
 *   y = exp(scale x) / sum over the visible keys of exp(scale x)        0 for a key that isn't visible
 *
 * causal: query i sees keys up to i + keys - queries (the last query sees all). mask: a key is visible where its byte isn't 0. A
 * row that sees no key, or none above -inf, is 0. What stands in x where a key isn't visible does not matter: NaN and infinity
 * don't get through.
 */
#pragma once
#include "common/api.h"

typedef struct {
  const void *x;          /* [batch, heads, queries, keys] */
  const void *mask;       /* bytes [batch, heads, queries, keys], strides mask_b, mask_h, mask_q (0: the same for all), or null */
  void *y;                /* [batch, heads, queries, keys]; may be x */
  int64_t batch, heads, queries, keys;
  int64_t mask_b, mask_h, mask_q;
  double scale;
  int32_t causal;
  int32_t dtype;
} megalm_softmax_forward_params;
MEGALM_OPERATION(softmax_forward);

/* grad_x = scale y (grad_y - sum(grad_y y) / sum(y)), the sums over keys. The sum of a row of probabilities is 1 but for their
 * rounding; divided by it, what all of grad_y have in common is cancelled as exactly as it should be. Where a key was masked y is
 * 0, which is all that the backward pass needs of the mask.
 */
typedef struct {
  const void *grad_y;     /* [batch, heads, queries, keys] */
  const void *y;          /* [batch, heads, queries, keys] */
  void *grad_x;           /* [batch, heads, queries, keys]; may be grad_y */
  int64_t batch, heads, queries, keys;
  double scale;
  int32_t causal;
  int32_t dtype;
} megalm_softmax_backward_params;
MEGALM_OPERATION(softmax_backward);

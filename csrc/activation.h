/* The activations of the feed-forward block.
 *
 *   swiglu   y = silu(gate) up                    silu(v) = v / (1 + exp(-v))
 *   geglu    y = gelu(gate) up                    gelu(v) = v / (1 + exp(-2 u)),  u = sqrt(2 / pi) (v + 0.044715 v^3)
 *   gelu     y = gelu(x + bias)                   which is 0.5 v (1 + tanh(u))
 *
 * Row r of x is at (r / inner) * outer_stride + (r % inner) * inner_stride. All tensors but the partial sums have the dtype of x.
 * Work is counted in packs of 16 bytes of y, or in elements where width or an address doesn't allow those: at most 2^31 - 1.
 */
#pragma once
#include "common/api.h"

enum megalm_activation { MEGALM_SWIGLU = 0, MEGALM_GEGLU = 1, MEGALM_GELU = 2 };

typedef struct {
  const void *x;          /* [rows, 2 width], the gate in the first half; gelu: [rows, width]; rows placed as above */
  const void *bias;       /* [width] or null; gelu only */
  void *y;                /* [rows, width] */
  int64_t rows, width, inner, outer_stride, inner_stride;
  int32_t activation;     /* megalm_activation */
  int32_t dtype;
} megalm_activation_forward_params;
MEGALM_OPERATION(activation_forward);

/* With f either function and g = grad_y:
 *
 *   grad_gate = g up f'(gate)     grad_up = g f(gate)     or, gelu:  grad_x = g f'(x + bias),  grad_bias = its sum over rows
 *
 * The sum is made in two stages, without atomics: blocks sum their rows into `partial`, then the blocks are summed.
 */
typedef struct {
  const void *grad_y;     /* [rows, width] */
  const void *x;          /* [rows, 2 width] or [rows, width], rows placed as above */
  const void *bias;       /* [width] or null; gelu only */
  void *grad_x;           /* [rows, 2 width], or [rows, width] */
  void *partial;          /* [blocks, width], fp32; null without a bias */
  void *grad_bias;        /* [width], null without a bias */
  int64_t rows, width, inner, outer_stride, inner_stride;
  int64_t blocks;         /* megalm_activation_backward_blocks of these params; 0 without a bias */
  int32_t activation;
  int32_t dtype;
} megalm_activation_backward_params;
MEGALM_OPERATION(activation_backward);

/* How many rows of partial sums a backward pass needs; reads bias, the pointers' alignment, strides, sizes and dtype only. */
MEGALM_C int64_t megalm_activation_backward_blocks(const megalm_activation_backward_params *params);

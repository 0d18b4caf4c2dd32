/* LayerNorm and RMSNorm over the last dim, with the addition of a residual before it.
 *
 *   sum = x + residual                                   (sum = x without a residual)
 *   layer_norm   y = (sum - mean) rstd weight + bias     rstd = 1 / sqrt(mean((sum - mean)^2) + eps)
 *   rms_norm     y = sum rstd weight                     rstd = 1 / sqrt(mean(sum^2) + eps)
 *
 * Row r of x is at (r / inner) * outer_stride + (r % inner) * inner_stride, so that heads inside a fused projection are rows too.
 * All tensors but the statistics and the partial sums have the dtype of x.
 */
#pragma once
#include "common/api.h"

typedef struct {
  const void *x;          /* [rows, width], rows placed as above */
  const void *residual;   /* [rows, width] or null */
  const void *weight;     /* [width] */
  const void *bias;       /* [width] or null; layer_norm only */
  void *y;                /* [rows, width] */
  void *sum;              /* [rows, width], null without a residual; may be the residual itself */
  void *mean;             /* [rows], fp32; layer_norm only */
  void *rstd;             /* [rows], fp32 */
  int64_t rows, width, inner, outer_stride, inner_stride;
  double eps;
  int32_t layer_norm;     /* 0: rms_norm */
  int32_t dtype;
} megalm_norm_forward_params;
MEGALM_OPERATION(norm_forward);

/* With xhat = (sum - mean) rstd and g = grad_y weight, each over a row:
 *
 *   grad_x = rstd (g - mean(g xhat) xhat - [layer_norm] mean(g)) + grad_sum
 *   grad_weight = sum over rows of grad_y xhat             grad_bias = sum over rows of grad_y
 *
 * The two sums over rows are made in two stages, without atomics: blocks sum their rows into `partial`, norm_backward_columns the blocks.
 */
typedef struct {
  const void *grad_y;     /* [rows, width] */
  const void *grad_sum;   /* [rows, width] or null: what reaches the sum on its other way */
  const void *sum;        /* [rows, width], rows placed as above */
  const void *weight;     /* [width] */
  const void *mean;       /* [rows], fp32; layer_norm only */
  const void *rstd;       /* [rows], fp32 */
  void *grad_x;           /* [rows, width] */
  void *partial;          /* [2 or 1, blocks, width], fp32: of the weight, then of the bias (layer_norm only) */
  void *grad_weight;      /* [width] */
  void *grad_bias;        /* [width], layer_norm only */
  int64_t rows, width, inner, outer_stride, inner_stride;
  int64_t blocks;         /* megalm_norm_backward_blocks of these params */
  int32_t layer_norm;
  int32_t dtype;
} megalm_norm_backward_params;
MEGALM_OPERATION(norm_backward);

/* How many rows of partial sums a backward pass needs; reads the pointers' alignment, strides, sizes and dtype only. */
MEGALM_C int64_t megalm_norm_backward_blocks(const megalm_norm_backward_params *params);

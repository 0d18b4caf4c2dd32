/* Cross entropy of one rank's share of the vocabulary. The softmax is that of the whole vocabulary; a token's target is spread:
 *
 *   q = hit onehot(target) + level                         hit = 1 - eps, level = eps / vocabulary: label smoothing
 *                                                          (Szegedy et al. 2016, section 7), eps = 0: none
 *   lse = log(sum(exp(logits)))
 *   loss = weight (lse - sum(q logits) + z lse^2)          z: z-loss (Chowdhery et al. 2022, section 5), 0: none
 *   gradient = weight (softmax (1 + 2 z lse) - q)
 *
 * Row r of the logits is at r * row_stride. Its first `columns` are columns vocab_start .. of the vocabulary; those from there to
 * `width` are padding, which has no probability and a gradient of 0, whatever it holds. A target elsewhere (an ignored one is -100)
 * has no column here. Sums are fp32 without a fp32 copy of the logits. A logit that is NaN or +inf spreads to its whole row, a
 * weight of 0 notwithstanding.
 */
#pragma once
#include "common/api.h"

/* One pass over the logits. Without columns: (-inf, 0, 0). */
typedef struct {
  const void *logits;     /* [rows, columns], rows placed as above */
  const int64_t *targets; /* [rows], places in the whole vocabulary */
  void *maximum;          /* [rows], fp32 */
  void *total;            /* [rows], fp32: sum of exp(logit - maximum) */
  void *expected;         /* [rows], fp32: this rank's part of sum(q logits) */
  int64_t rows, columns, row_stride, vocab_start;
  double hit, level;
  int32_t dtype;
} megalm_cross_entropy_statistics_params;
MEGALM_OPERATION(cross_entropy_statistics);

/* The gradient in the place of the logits. */
typedef struct {
  void *logits;            /* [rows, width], rows placed as above */
  const int64_t *targets;  /* [rows] */
  const double *logsumexp; /* [rows]: fp32 would lose of it what a maximum plus a logarithm has behind the point */
  const double *weight;    /* [rows] */
  int64_t rows, width, columns, row_stride, vocab_start;
  double hit, level, z_loss;
  int32_t dtype;
} megalm_cross_entropy_gradient_params;
MEGALM_OPERATION(cross_entropy_gradient);

/* Loss and, in the place of the logits, gradient where the columns are the whole vocabulary. */
typedef struct {
  void *logits;            /* [rows, width], rows placed as above */
  const int64_t *targets;  /* [rows] */
  const double *weight;    /* [rows] */
  double *loss;            /* [rows] */
  int64_t rows, width, columns, row_stride;
  double hit, level, z_loss;
  int32_t dtype;
} megalm_cross_entropy_loss_params;
MEGALM_OPERATION(cross_entropy_loss);

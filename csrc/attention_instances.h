/* Which head dims (of queries and keys, of values) have kernels. Their files are made by tools/generate_attention.py. */
#pragma once
#include "attention.h"

#define MEGALM_ATTENTION_INSTANCES    \
  MEGALM_ATTENTION_INSTANCE(64, 64)   \
  MEGALM_ATTENTION_INSTANCE(80, 80)   \
  MEGALM_ATTENTION_INSTANCE(96, 96)   \
  MEGALM_ATTENTION_INSTANCE(128, 128) \
  MEGALM_ATTENTION_INSTANCE(192, 128) \
  MEGALM_ATTENTION_INSTANCE(256, 256)

#define MEGALM_ATTENTION_INSTANCE(d, e)                                                                      \
  int attention_forward_##d##_##e(const megalm_attention_forward_params &params, megalm_stream stream);      \
  int attention_backward_##d##_##e(const megalm_attention_backward_params &params, megalm_stream stream);
MEGALM_ATTENTION_INSTANCES
#undef MEGALM_ATTENTION_INSTANCE

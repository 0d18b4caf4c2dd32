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

/* Of those, the ones that have kernels of Hopper's own instructions: forward, forward in fp8, backward. */
#define MEGALM_ATTENTION_HOPPER_FORWARD MEGALM_ATTENTION_INSTANCES
#define MEGALM_ATTENTION_HOPPER_FP8 \
  MEGALM_ATTENTION_INSTANCE(64, 64)   \
  MEGALM_ATTENTION_INSTANCE(128, 128) \
  MEGALM_ATTENTION_INSTANCE(256, 256)
#define MEGALM_ATTENTION_HOPPER_BACKWARD \
  MEGALM_ATTENTION_INSTANCE(64, 64)      \
  MEGALM_ATTENTION_INSTANCE(128, 128)

#define MEGALM_ATTENTION_INSTANCE(d, e) \
  int attention_hopper_forward_##d##_##e(const megalm_attention_forward_params &params, megalm_stream stream);
MEGALM_ATTENTION_HOPPER_FORWARD
#undef MEGALM_ATTENTION_INSTANCE
#define MEGALM_ATTENTION_INSTANCE(d, e) int attention_hopper_fp8_##d##_##e(const megalm_attention_forward_params &params, megalm_stream stream);
MEGALM_ATTENTION_HOPPER_FP8
#undef MEGALM_ATTENTION_INSTANCE
#define MEGALM_ATTENTION_INSTANCE(d, e)                                                                          \
  int attention_hopper_backward_##d##_##e(const megalm_attention_backward_params &params, megalm_stream stream); \
  int64_t attention_hopper_workspace_##d##_##e(const megalm_attention_backward_params &params);
MEGALM_ATTENTION_HOPPER_BACKWARD
#undef MEGALM_ATTENTION_INSTANCE

/* Whether the current device has Hopper's instructions and the library code for them. */
bool attention_hopper_here();

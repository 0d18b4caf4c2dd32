// Made by tools/generate_attention.py.
#include "attention_backward.cuh"
#include "attention_instances.h"

int attention_backward_96_96(const megalm_attention_backward_params &params, megalm_stream stream) {
  return params.dtype == MEGALM_BF16 ? attention::launch_backward<bf16, 96, 96, 64, false>(params, stream)
                                     : attention::launch_backward<f16, 96, 96, 64, false>(params, stream);
}

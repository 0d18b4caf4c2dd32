// Made by tools/generate_attention.py.
#include "attention_hopper_backward.cuh"
#include "attention_instances.h"

int attention_hopper_backward_128_128(const megalm_attention_backward_params &params, megalm_stream stream) {
  return params.dtype == MEGALM_BF16 ? attention::launch_hopper_backward<bf16, 128, 64>(params, stream)
                                     : attention::launch_hopper_backward<f16, 128, 64>(params, stream);
}

int64_t attention_hopper_workspace_128_128(const megalm_attention_backward_params &params) {
  return attention::Sums::make(params, 64).bytes();
}

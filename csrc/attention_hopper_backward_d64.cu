// Made by tools/generate_attention.py.
#include "attention_hopper_backward.cuh"
#include "attention_instances.h"

int attention_hopper_backward_64_64(const megalm_attention_backward_params &params, megalm_stream stream) {
  return params.dtype == MEGALM_BF16 ? attention::launch_hopper_backward<bf16, 64, 128>(params, stream)
                                     : attention::launch_hopper_backward<f16, 64, 128>(params, stream);
}

int64_t attention_hopper_workspace_64_64(const megalm_attention_backward_params &params) {
  return attention::Sums::make(params, 128).bytes();
}

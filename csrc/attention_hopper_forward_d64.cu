// Made by tools/generate_attention.py.
#include "attention_hopper_forward.cuh"
#include "attention_instances.h"

int attention_hopper_forward_64_64(const megalm_attention_forward_params &params, megalm_stream stream) {
  return params.dtype == MEGALM_BF16 ? attention::launch_hopper_forward<bf16, 64, 64, 3, 128>(params, stream)
                                     : attention::launch_hopper_forward<f16, 64, 64, 3, 128>(params, stream);
}

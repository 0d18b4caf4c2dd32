// Made by tools/generate_attention.py.
#include "attention_hopper_fp8.cuh"
#include "attention_instances.h"

int attention_hopper_fp8_64_64(const megalm_attention_forward_params &params, megalm_stream stream) {
  return params.dtype == MEGALM_BF16 ? attention::launch_hopper_fp8<bf16, 64, 64, 2, 128>(params, stream)
                                     : attention::launch_hopper_fp8<f16, 64, 64, 2, 128>(params, stream);
}

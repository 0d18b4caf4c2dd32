// Made by tools/generate_attention.py.
#include "attention_hopper_fp8.cuh"
#include "attention_instances.h"

int attention_hopper_fp8_128_128(const megalm_attention_forward_params &params, megalm_stream stream) {
  return params.dtype == MEGALM_BF16 ? attention::launch_hopper_fp8<bf16, 128, 128, 2, 128>(params, stream)
                                     : attention::launch_hopper_fp8<f16, 128, 128, 2, 128>(params, stream);
}

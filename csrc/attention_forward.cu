// Attention, forward: which instance serves a call.
#include "attention_checks.cuh"
#include "attention_hopper_quantize.cuh"

namespace {

int run_fp8(const megalm_attention_forward_params &p, megalm_stream stream) {
  if (!attention::takes_fp8(p)) return cudaErrorInvalidValue;
#define MEGALM_ATTENTION_INSTANCE(d, e) \
  if (p.head_dim == d && p.value_dim == e) return attention_hopper_fp8_##d##_##e(p, stream);
  MEGALM_ATTENTION_HOPPER_FP8
#undef MEGALM_ATTENTION_INSTANCE
  return cudaErrorInvalidValue;
}

int run(const megalm_attention_forward_params &p, megalm_stream stream) {
  if (!attention::inputs_fit(p) || !attention::pointers_fit({p.out})) return cudaErrorInvalidValue;
  if (p.fp8) return run_fp8(p, stream);
  if (attention::takes_hopper(p)) {
#define MEGALM_ATTENTION_INSTANCE(d, e) \
  if (p.head_dim == d && p.value_dim == e) return attention_hopper_forward_##d##_##e(p, stream);
    MEGALM_ATTENTION_HOPPER_FORWARD
#undef MEGALM_ATTENTION_INSTANCE
  }
#define MEGALM_ATTENTION_INSTANCE(d, e) \
  if (p.head_dim == d && p.value_dim == e) return attention_forward_##d##_##e(p, stream);
  MEGALM_ATTENTION_INSTANCES
#undef MEGALM_ATTENTION_INSTANCE
  return cudaErrorInvalidValue;
}

}  // namespace

MEGALM_DEFINE(attention_forward, run)

int64_t megalm_attention_forward_workspace(const megalm_attention_forward_params *params) {
  return params->fp8 ? attention::Bytes::make(*params).size : 0;
}

// Attention, forward: which instance serves a call.
#include "attention_checks.cuh"

namespace {

int run(const megalm_attention_forward_params &p, megalm_stream stream) {
  if (!attention::inputs_fit(p) || !attention::pointers_fit({p.out})) return cudaErrorInvalidValue;
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

// Attention, backward: which instance serves a call.
#include "attention_checks.cuh"
#include "attention_instances.h"

namespace {

int run(const megalm_attention_backward_params &p, megalm_stream stream) {
  const bool fits = attention::inputs_fit(p) && attention::pointers_fit({p.grad_out, p.grad_q, p.grad_k, p.grad_v}) &&
                    attention::strides_fit({p.grad_q_row, p.grad_q_batch, p.grad_q_head, p.grad_k_row, p.grad_k_batch, p.grad_k_head,
                                            p.grad_v_row, p.grad_v_batch, p.grad_v_head});
  if (!fits) return cudaErrorInvalidValue;
#define MEGALM_ATTENTION_INSTANCE(d, e) \
  if (p.head_dim == d && p.value_dim == e) return attention_backward_##d##_##e(p, stream);
  MEGALM_ATTENTION_INSTANCES
#undef MEGALM_ATTENTION_INSTANCE
  return cudaErrorInvalidValue;
}

}  // namespace

MEGALM_DEFINE(attention_backward, run)

// Attention, backward: which instance serves a call.
#include "attention_checks.cuh"

namespace {

bool by_hopper(const megalm_attention_backward_params &p) {
  return attention::takes_hopper(p) && attention::copies(p.queries, p.out_row) && attention::copies(p.batch, p.out_batch) &&
         attention::copies(p.heads, p.out_head);
}

// Of Hopper's path; 0 where it doesn't serve.
int64_t workspace_bytes(const megalm_attention_backward_params &p) {
  if (!by_hopper(p)) return 0;
#define MEGALM_ATTENTION_INSTANCE(d, e) \
  if (p.head_dim == d && p.value_dim == e) return attention_hopper_workspace_##d##_##e(p);
  MEGALM_ATTENTION_HOPPER_BACKWARD
#undef MEGALM_ATTENTION_INSTANCE
  return 0;
}

int run_hopper(const megalm_attention_backward_params &p, megalm_stream stream) {
  if (!attention::pointers_fit({p.workspace})) return cudaErrorInvalidValue;
#define MEGALM_ATTENTION_INSTANCE(d, e) \
  if (p.head_dim == d && p.value_dim == e) return attention_hopper_backward_##d##_##e(p, stream);
  MEGALM_ATTENTION_HOPPER_BACKWARD
#undef MEGALM_ATTENTION_INSTANCE
  return cudaErrorInvalidValue;
}

int run(const megalm_attention_backward_params &p, megalm_stream stream) {
  const bool fits = attention::inputs_fit(p) && attention::pointers_fit({p.grad_out, p.grad_q, p.grad_k, p.grad_v}) &&
                    attention::strides_fit({p.grad_q_row, p.grad_q_batch, p.grad_q_head, p.grad_k_row, p.grad_k_batch, p.grad_k_head,
                                            p.grad_v_row, p.grad_v_batch, p.grad_v_head});
  if (!fits) return cudaErrorInvalidValue;
  if (workspace_bytes(p) > 0) return run_hopper(p, stream);
#define MEGALM_ATTENTION_INSTANCE(d, e) \
  if (p.head_dim == d && p.value_dim == e) return attention_backward_##d##_##e(p, stream);
  MEGALM_ATTENTION_INSTANCES
#undef MEGALM_ATTENTION_INSTANCE
  return cudaErrorInvalidValue;
}

}  // namespace

MEGALM_DEFINE(attention_backward, run)

int64_t megalm_attention_backward_workspace(const megalm_attention_backward_params *params) {
  return attention::sizes_fit(*params) ? workspace_bytes(*params) : 0;
}

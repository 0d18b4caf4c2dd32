// What every attention kernel asks of its params before it is launched.
#pragma once
#include <initializer_list>

#include "attention_instances.h"
#include "common/common.cuh"

namespace attention {

inline bool strides_fit(std::initializer_list<int64_t> strides) {
  for (int64_t stride : strides)
    if (stride % 8) return false;
  return true;
}

inline bool pointers_fit(std::initializer_list<const void *> pointers) {
  for (const void *pointer : pointers)
    if (pointer == nullptr || !aligned<bf16>(pointer)) return false;
  return true;
}

template <typename Params> bool sizes_fit(const Params &p) {
  return p.batch > 0 && p.queries > 0 && p.keys > 0 && p.groups > 0 && p.heads % p.groups == 0 && p.batch <= 65535 &&
         p.heads <= 65535 && p.queries <= INT32_MAX / 2 && p.keys <= INT32_MAX / 2 && (p.dtype == MEGALM_BF16 || p.dtype == MEGALM_F16);
}

template <typename Params> bool inputs_fit(const Params &p) {
  return sizes_fit(p) && pointers_fit({p.q, p.k, p.v}) &&
         strides_fit({p.q_row, p.q_batch, p.q_head, p.k_row, p.k_batch, p.k_head, p.v_row, p.v_batch, p.v_head, p.out_row, p.out_batch,
                      p.out_head});
}

inline bool copies(int64_t size, int64_t stride) { return size == 1 || (stride > 0 && stride < int64_t(1) << 39); }

// Whether Hopper's own instructions serve a call, and not the portable path: the device has them and the library has code for it,
// nobody asks for the other, no probability is dropped, and the copy engine can address what is read.
template <typename Params> bool takes_hopper(const Params &p) {
  return !p.portable && p.samples == nullptr && copies(p.queries, p.q_row) && copies(p.batch, p.q_batch) && copies(p.heads, p.q_head) &&
         copies(p.keys, p.k_row) && copies(p.batch, p.k_batch) && copies(p.groups, p.k_head) && copies(p.keys, p.v_row) &&
         copies(p.batch, p.v_batch) && copies(p.groups, p.v_head) && attention_hopper_here();
}

// Whether a call can be served in fp8; its q, k and v are read by ordinary loads.
inline bool takes_fp8(const megalm_attention_forward_params &p) {
  return !p.portable && p.samples == nullptr && p.heads + 2 * p.groups <= 65535 && p.workspace != nullptr &&
         reinterpret_cast<uintptr_t>(p.workspace) % 128 == 0 && attention_hopper_here();
}

}  // namespace attention

// What every attention kernel asks of its params before it is launched.
#pragma once
#include <initializer_list>

#include "attention.h"
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

}  // namespace attention

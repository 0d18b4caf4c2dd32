// Half precisions as bits of a 32-bit register, in CUDA's own instructions. The shim has the same names (shim/half.h).
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

using bf16 = __nv_bfloat16;
using f16 = __half;

__device__ __forceinline__ float bits_as_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ float f16_bits_as_float(uint32_t bits) { return __half2float(__ushort_as_half(uint16_t(bits))); }

// Two floats, rounded to nearest even, as one register: the first in the low half.
__device__ __forceinline__ uint32_t pair_bits(const bf16 &, float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t *>(&pair);
}
__device__ __forceinline__ uint32_t pair_bits(const f16 &, float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t *>(&pair);
}

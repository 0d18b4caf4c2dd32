// Half precisions and bytes as bits of a 32-bit register, in CUDA's own instructions. The shim has the same names (shim/half.h).
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

using bf16 = __nv_bfloat16;
using f16 = __half;

// Eight bits: a sign, four of the exponent, three of the fraction; 448 at most, no infinity (Micikevicius et al., "FP8 formats for deep
// learning", 2022).
struct e4m3 { uint8_t bits; };

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
// Four floats, rounded to nearest even, as e4m3 in one register: the first in the low byte. What is beyond 448 becomes 448, also an
// infinity; NaN stays. From sm_89 on.
__device__ __forceinline__ uint32_t four_bits(float a, float b, float c, float d) {
  uint32_t word;
  asm("{\n.reg .b16 low, high;\ncvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\ncvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      "mov.b32 %0, {low, high};\n}\n"
      : "=r"(word)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return word;
}

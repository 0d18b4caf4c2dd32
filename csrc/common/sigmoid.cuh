// The logistic function, from which silu and the tanh form of gelu are made.
#pragma once
#include "common/common.cuh"

#ifdef MEGALM_SHIM
inline float reciprocal(float x) { return 1.0f / x; }
#else
// One instruction, at most 2 units in the last place off; what would be subnormal is 0.
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#endif

// share = 1 / (1 + 2^x), the logistic function of -x ln 2, and rest = 1 - share. PRECISE: both to about a unit in the last place of
// fp32, for results that are stored as fp32; else share to three, which no half precision shows. No x makes a NaN, but rest is 0
// where share is 0 if PRECISE: what it is multiplied with has share as a factor.
template <typename C> struct Logistic { C share, rest; };

template <bool PRECISE> __device__ __forceinline__ Logistic<float> logistic_base_two(float x) {
  const float power = power_of_two(x), sum = 1.0f + power, guess = reciprocal(sum);
  if (!PRECISE) return {guess, 1.0f - guess};
  // A step of Newton's, and the rest as a product: a difference from 1 would keep few of its digits. Where 2^x is beyond fp32 the
  // guess is 0 and stays it; infinity times 0 would not.
  const float share = fmaf(guess, fmaf(-fminf(sum, 0x1p126f), guess, 1.0f), guess);
  return {share, share * fminf(power, 0x1p126f)};
}
#ifdef MEGALM_SHIM
template <bool PRECISE> inline Logistic<double> logistic_base_two(double x) {
  const double power = std::exp2(x), share = 1.0 / (1.0 + power);
  return {share, 1.0 - share};
}
#endif

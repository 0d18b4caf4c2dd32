// e^(x - m) over many x, where m is their maximum or log-sum-exp and every result is at most about 1.
//
// Half precisions: 2^(x LOG2E - base) with base = m LOG2E as it rounds takes one multiply-add and one instruction of the special
// function unit. fp32 has half as many elements in a byte and is held to more digits: e^(x - base) with base = m.
// In both, results of one base are off by the same factor, next to 1, which cancels in their ratios and is known besides.
#pragma once
#include "common/common.cuh"

#ifdef MEGALM_SHIM
template <typename C> inline C multiply_add(C a, C b, C c) { return std::fma(a, b, c); }
template <typename C> inline C rounded_product(C a, C b) { return a * b; }
template <typename C> inline C logarithm(C x) { return std::log(x); }
template <typename C> inline C power_of_e(C x) { return std::exp(x); }
#else
// Rounded once.
__device__ __forceinline__ float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
// Rounded by itself, however it is used: the compiler makes no multiply-add of it.
__device__ __forceinline__ float rounded_product(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float logarithm(float x) { return logf(x); }
__device__ __forceinline__ float power_of_e(float x) { return expf(x); }
#endif

template <typename T> struct Power {
  using C = compute_t<T>;
  // The base of m; and of an m that C can't hold, `rest` by which the powers have to be multiplied then.
  __device__ __forceinline__ static C base(C m) { return m; }
  __device__ __forceinline__ static C base(double m, C &rest) {
    const C base = C(m);
    rest = C(1) + C(double(base) - m);
    return base;
  }
  __device__ __forceinline__ static C of(C x, C base) { return power_of_e(x - base); }
  // What turns powers of one base into those of another, and a sum of powers into that of e^(x - m).
  __device__ __forceinline__ static C change(C from, C to) { return power_of_e(from - to); }
  __device__ __forceinline__ static C exact(C total, C m, C base) { return total; }
};

struct HalfPower {
  __device__ __forceinline__ static float base(float m) { return rounded_product(m, LOG2E); }
  __device__ __forceinline__ static float base(double m, float &rest) {
    const double whole = m * double(LOG2E);
    const float base = float(whole);
    rest = 1.0f + LN2 * float(double(base) - whole);
    return base;
  }
  __device__ __forceinline__ static float of(float x, float base) { return power_of_two(multiply_add(x, LOG2E, -base)); }
  __device__ __forceinline__ static float change(float from, float to) { return power_of_two(from - to); }
  __device__ __forceinline__ static float exact(float total, float m, float base) {
    return total * power_of_two(-multiply_add(m, LOG2E, -base));
  }
};
template <> struct Power<bf16> : HalfPower {};
template <> struct Power<f16> : HalfPower {};

// silu and gelu with their slopes, and how the kernels of both directions walk over [rows, width].
#pragma once
#include "activation.h"
#include "common/divide.cuh"
#include "common/rows.cuh"
#include "common/sigmoid.cuh"

// PRECISE: for results that are stored as fp32. A large argument gives no NaN: no factor of a slope overflows against a zero.
template <bool PRECISE> struct Silu {
  template <typename C> __device__ __forceinline__ static Logistic<C> logistic(C x) {
    return logistic_base_two<PRECISE>(x * C(-LOG2_E));
  }
  template <typename C> __device__ __forceinline__ static C value(C x) { return x * logistic(x).share; }
  template <typename C> __device__ __forceinline__ static void both(C x, C &value, C &slope) {
    const Logistic<C> part = logistic(x);
    value = x * part.share;
    slope = part.share + value * part.rest;
  }
};

template <bool PRECISE> struct Gelu {
  static constexpr double ROOT = 0.79788456080286535588, CUBE = 0.044715;  // sqrt(2 / pi)

  template <typename C> __device__ __forceinline__ static Logistic<C> logistic(C x) {
    return logistic_base_two<PRECISE>(x * (C(-2 * LOG2_E * ROOT) + C(-2 * LOG2_E * ROOT * CUBE) * (x * x)));
  }
  template <typename C> __device__ __forceinline__ static C value(C x) { return x * logistic(x).share; }
  template <typename C> __device__ __forceinline__ static void both(C x, C &value, C &slope) {
    const Logistic<C> part = logistic(x);
    const C square = min(x * x, C(1e4));  // beyond it the factor before it is 0
    value = x * part.share;
    slope = part.share + value * part.rest * (C(2 * ROOT) + C(6 * ROOT * CUBE) * square);
  }
};

// Which packs a thread has: [rows, width] in their order, a block FLAT_THREADS * UNROLL of them, its threads in turns.
constexpr int FLAT_THREADS = 256;
constexpr int64_t MAX_PACKS = INT32_MAX;

inline bool allowed(int64_t rows, int64_t width, int64_t inner, int activation, const void *bias) {
  return width >= 1 && rows <= MAX_PACKS && width <= MAX_PACKS / 2 && inner >= 1 && activation >= MEGALM_SWIGLU &&
         activation <= MEGALM_GELU && (bias == nullptr || activation == MEGALM_GELU);
}

// Statements with FUNCTION and GATED as `activation` names them.
#define MEGALM_ACTIVATION_DISPATCH(activation, precise, ...)                                          \
  if (activation == MEGALM_SWIGLU) { using FUNCTION = Silu<precise>; constexpr bool GATED = true; __VA_ARGS__; }   \
  else if (activation == MEGALM_GEGLU) { using FUNCTION = Gelu<precise>; constexpr bool GATED = true; __VA_ARGS__; } \
  else { using FUNCTION = Gelu<precise>; constexpr bool GATED = false; __VA_ARGS__; }

// Division by a number that the launch knows, by a multiplication and a shift in place of some twenty instructions
// (Granlund, Montgomery: "Division by invariant integers using multiplication", PLDI 1994, figure 4.1).
#pragma once
#include "common/common.cuh"

// n / divisor for n below 2^31; divisor from 1 to 2^31.
struct Divisor {
  uint32_t divisor, multiplier, shift;
  explicit Divisor(uint32_t divisor) : divisor(divisor), shift(0) {
    while ((uint64_t(1) << shift) < divisor) shift++;
    multiplier = uint32_t(((uint64_t(1) << shift) - divisor) * (uint64_t(1) << 32) / divisor + 1);
  }
  __device__ __forceinline__ uint32_t operator()(uint32_t n) const { return (__umulhi(n, multiplier) + n) >> shift; }
};

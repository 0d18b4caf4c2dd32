// CUDA's two 16-bit types and one of 8 bits on a CPU: storage, and conversion by rounding to nearest even, as the device does it.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace shim {
inline uint32_t bits_of(float x) { uint32_t u; std::memcpy(&u, &x, 4); return u; }
inline float float_of(uint32_t u) { float x; std::memcpy(&x, &u, 4); return x; }

inline uint16_t to_bf16(float x) {
  const uint32_t u = bits_of(x);
  if (x != x) return 0x7fff;
  return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

inline uint16_t to_f16(float x) {
  const uint32_t u = bits_of(x), sign = u >> 16 & 0x8000;
  const float magnitude = float_of(u & 0x7fffffff);
  if (x != x) return 0x7fff;
  if (magnitude >= 65520.0f) return uint16_t(sign | 0x7c00);  // rounds to infinity
  if (magnitude < 6.103515625e-05f) return uint16_t(sign | uint32_t(std::nearbyint(magnitude * 16777216.0f)));  // subnormal
  const uint32_t m = u & 0x7fffffff;
  return uint16_t(sign | ((m + 0xfff + (m >> 13 & 1) - (112u << 23)) >> 13));
}

inline float from_f16(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
  if (exponent == 0) return float_of(sign | bits_of(float(fraction) / 16777216.0f));
  if (exponent == 31) return float_of(sign | 0x7f800000 | fraction << 13);
  return float_of(sign | (exponent + 112) << 23 | fraction << 13);
}

inline uint8_t to_e4m3(float x) {
  const uint32_t u = bits_of(x), sign = u >> 24 & 0x80, m = u & 0x7fffffff;
  const float magnitude = float_of(m);
  if (x != x) return 0x7f;
  if (magnitude >= 448.0f) return uint8_t(sign | 0x7e);
  if (magnitude < 0.015625f) return uint8_t(sign | uint32_t(std::nearbyint(magnitude * 512.0f)));  // subnormal
  return uint8_t(sign | ((m + 0x7ffff + (m >> 20 & 1) - (120u << 23)) >> 20));
}

inline float from_e4m3(uint8_t h) {
  const uint32_t sign = uint32_t(h & 0x80) << 24, exponent = h >> 3 & 15, fraction = h & 7;
  if ((h & 0x7f) == 0x7f) return float_of(0x7fc00000);
  if (exponent == 0) return float_of(sign | bits_of(float(fraction) / 512.0f));
  return float_of(sign | (exponent + 120) << 23 | fraction << 20);
}
}  // namespace shim

struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float x) : bits(shim::to_bf16(x)) {}
  explicit __nv_bfloat16(double x) : __nv_bfloat16(float(x)) {}
  explicit operator float() const { return shim::float_of(uint32_t(bits) << 16); }
};

struct __half {
  uint16_t bits;
  __half() = default;
  explicit __half(float x) : bits(shim::to_f16(x)) {}
  explicit __half(double x) : __half(float(x)) {}
  explicit operator float() const { return shim::from_f16(bits); }
};

using bf16 = __nv_bfloat16;
using f16 = __half;
struct e4m3 { uint8_t bits; };

inline float bits_as_float(uint32_t bits) { return shim::float_of(bits); }
inline float f16_bits_as_float(uint32_t bits) { return shim::from_f16(uint16_t(bits)); }
inline uint32_t pair_bits(const bf16 &, float low, float high) { return shim::to_bf16(low) | uint32_t(shim::to_bf16(high)) << 16; }
inline uint32_t pair_bits(const f16 &, float low, float high) { return shim::to_f16(low) | uint32_t(shim::to_f16(high)) << 16; }
inline uint32_t four_bits(float a, float b, float c, float d) {
  return shim::to_e4m3(a) | uint32_t(shim::to_e4m3(b)) << 8 | uint32_t(shim::to_e4m3(c)) << 16 | uint32_t(shim::to_e4m3(d)) << 24;
}

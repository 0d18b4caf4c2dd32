// The matrix instructions of sm_90a: 128 threads together multiply [64, 16] by [16, N] of 16-bit elements, or [64, 32] by [32, N] of bytes,
// into fp32 registers, in the background. Each PTX instruction sits in a wrapper that shim/wgmma.h has too. Facts: PTX ISA 8.x, section
// "Asynchronous Warpgroup Level Matrix Instructions" (fragments, descriptors, the canonical layouts of the 128-byte swizzle).
//
// An accumulator [N / 8][4] is [64, N]: warp w of the warpgroup and lane 4 g + t have rows 16 w + g (elements 0, 1) and 16 w + g + 8
// (2, 3), columns 8 n + 2 t, + 1. A left operand in registers is two neighbouring accumulators, rounded; of bytes it is four, but its
// columns come in another order: register i of a lane has row g (i = 0, 2) or g + 8 and columns 16 (i / 2) + 4 t .. + 3.
//
// Tiles lie in shared memory as panels of 128 bytes a row, [columns / PANEL][rows][PANEL], as tensor_load puts them. An operand whose
// product is over its columns is read `along` them; one whose product is over its rows, `across`, which bytes can't be.
#pragma once
#include "common/hopper.cuh"

template <typename T> constexpr int STEP = 32 / int(sizeof(T));  // of the product, an instruction

// A descriptor of an operand: bits 0 to 13 the address, 16 to 29 and 32 to 45 two distances, all in 16 bytes, 62 and 63 the swizzle.
__device__ __forceinline__ uint64_t operand(const void *start, int leading, int stride) {
  return uint64_t((shared_offset(start) & 0x3ffff) >> 4) | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 | uint64_t(1) << 62;
}
// Rows of a panel from `start` on, a multiple of eight: eight rows are 1024 bytes; the other distance has no meaning.
__device__ __forceinline__ uint64_t along(const void *start) { return operand(start, 16, SWIZZLE_BYTES); }
// All columns of panels that are `panel_bytes` apart.
__device__ __forceinline__ uint64_t across(const void *start, int panel_bytes) { return operand(start, panel_bytes, SWIZZLE_BYTES); }
// The operand's next 32 bytes of columns (along, within a panel) or 16 rows (across).
__device__ __forceinline__ uint64_t along_step(uint64_t operand, int steps) { return operand + (steps * 32 >> 4); }
__device__ __forceinline__ uint64_t across_step(uint64_t operand, int steps) { return operand + (steps * 16 * PANEL_ROW >> 4); }

enum class Order { along, across };

#ifdef MEGALM_SHIM
#include "shim/wgmma.h"
#else

// Before the first instruction that uses registers which were written otherwise.
__device__ __forceinline__ void matrix_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
// Closes a group of instructions; matrix_wait<N> waits until at most N groups are under way.
__device__ __forceinline__ void matrix_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
template <int N> __device__ __forceinline__ void matrix_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(N) : "memory"); }
// Keeps the compiler from moving uses of registers over a wait.
template <int TILES> __device__ __forceinline__ void matrix_settle(float (&d)[TILES][4]) {
#pragma unroll
  for (int n = 0; n < TILES; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) asm volatile("" : "+f"(d[n][i])::"memory");
}

template <typename T, int N> struct Multiply;

#define MEGALM_R8(a, b, c, d, e, f, g, h) "%" #a ", %" #b ", %" #c ", %" #d ", %" #e ", %" #f ", %" #g ", %" #h
#define MEGALM_E0 MEGALM_R8(0, 1, 2, 3, 4, 5, 6, 7)
#define MEGALM_E1 ", " MEGALM_R8(8, 9, 10, 11, 12, 13, 14, 15)
#define MEGALM_E2 ", " MEGALM_R8(16, 17, 18, 19, 20, 21, 22, 23)
#define MEGALM_E3 ", " MEGALM_R8(24, 25, 26, 27, 28, 29, 30, 31)
#define MEGALM_E4 ", " MEGALM_R8(32, 33, 34, 35, 36, 37, 38, 39)
#define MEGALM_E5 ", " MEGALM_R8(40, 41, 42, 43, 44, 45, 46, 47)
#define MEGALM_E6 ", " MEGALM_R8(48, 49, 50, 51, 52, 53, 54, 55)
#define MEGALM_E7 ", " MEGALM_R8(56, 57, 58, 59, 60, 61, 62, 63)
#define MEGALM_E8 ", " MEGALM_R8(64, 65, 66, 67, 68, 69, 70, 71)
#define MEGALM_E9 ", " MEGALM_R8(72, 73, 74, 75, 76, 77, 78, 79)
#define MEGALM_E10 ", " MEGALM_R8(80, 81, 82, 83, 84, 85, 86, 87)
#define MEGALM_E11 ", " MEGALM_R8(88, 89, 90, 91, 92, 93, 94, 95)
#define MEGALM_E12 ", " MEGALM_R8(96, 97, 98, 99, 100, 101, 102, 103)
#define MEGALM_E13 ", " MEGALM_R8(104, 105, 106, 107, 108, 109, 110, 111)
#define MEGALM_E14 ", " MEGALM_R8(112, 113, 114, 115, 116, 117, 118, 119)
#define MEGALM_E15 ", " MEGALM_R8(120, 121, 122, 123, 124, 125, 126, 127)
#define MEGALM_D4(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define MEGALM_D16(n) MEGALM_D4(n), MEGALM_D4(n + 1), MEGALM_D4(n + 2), MEGALM_D4(n + 3)

// shared: d [64, N] = a b, or += where ADD; a and b in shared memory, each read along or across. registers: a in registers.
// i0 .. i6: the numbers of the operands after the N / 2 registers of the accumulator.
#define MEGALM_MULTIPLY(T, NAME, N, i0, i1, i2, i3, i4, i5, i6)                                                   \
  template <> struct Multiply<T, N> {                                                                                         \
    template <bool ADD, Order A, Order B> __device__ __forceinline__ static void shared(float (&d)[N / 8][4], uint64_t a, uint64_t b) { \
      asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #i2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME  \
                   " {" MEGALM_LIST##N "}, %" #i0 ", %" #i1 ", add, 1, 1, %" #i3 ", %" #i4 ";\n}\n"                                     \
                   : MEGALM_OUTS##N                                                                                                     \
                   : "l"(a), "l"(b), "n"(int(ADD)), "n"(int(A)), "n"(int(B)));                                                \
    }                                                                                                                         \
    template <bool ADD, Order B>                                                                                              \
    __device__ __forceinline__ static void registers(float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b) {              \
      asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #i5 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME  \
                   " {" MEGALM_LIST##N "}, {%" #i0 ", %" #i1 ", %" #i2 ", %" #i3 "}, %" #i4 ", add, 1, 1, %" #i6 ";\n}\n"               \
                   : MEGALM_OUTS##N                                                                                                     \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(int(ADD)), "n"(int(B)));                         \
    }                                                                                                                         \
  };
// Of bytes: the same without the choice of how operands are read.
#define MEGALM_MULTIPLY_BYTES(N, i0, i1, i2, i3, i4, i5)                                                          \
  template <> struct Multiply<e4m3, N> {                                                                                      \
    template <bool ADD, Order A, Order B> __device__ __forceinline__ static void shared(float (&d)[N / 8][4], uint64_t a, uint64_t b) { \
      static_assert(A == Order::along && B == Order::along, "bytes are read along their columns");                          \
      asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #i2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3"      \
                   " {" MEGALM_LIST##N "}, %" #i0 ", %" #i1 ", add, 1, 1;\n}\n"                                                       \
                   : MEGALM_OUTS##N                                                                                                     \
                   : "l"(a), "l"(b), "n"(int(ADD)));                                                                          \
    }                                                                                                                         \
    template <bool ADD, Order B>                                                                                              \
    __device__ __forceinline__ static void registers(float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b) {              \
      static_assert(B == Order::along, "bytes are read along their columns");                                                \
      asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #i5 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3"      \
                   " {" MEGALM_LIST##N "}, {%" #i0 ", %" #i1 ", %" #i2 ", %" #i3 "}, %" #i4 ", add, 1, 1;\n}\n"                       \
                   : MEGALM_OUTS##N                                                                                                     \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(int(ADD)));                                      \
    }                                                                                                                         \
  };
#define MEGALM_MULTIPLY_BOTH(N, ...)             \
  MEGALM_MULTIPLY(bf16, "bf16", N, __VA_ARGS__) \
  MEGALM_MULTIPLY(f16, "f16", N, __VA_ARGS__)

#define MEGALM_LIST64 MEGALM_E0 MEGALM_E1 MEGALM_E2 MEGALM_E3
#define MEGALM_OUTS64 MEGALM_D16(0), MEGALM_D16(4)
#define MEGALM_LIST80 MEGALM_LIST64 MEGALM_E4
#define MEGALM_OUTS80 MEGALM_OUTS64, MEGALM_D4(8), MEGALM_D4(9)
#define MEGALM_LIST96 MEGALM_LIST80 MEGALM_E5
#define MEGALM_OUTS96 MEGALM_OUTS64, MEGALM_D16(8)
#define MEGALM_LIST128 MEGALM_LIST96 MEGALM_E6 MEGALM_E7
#define MEGALM_OUTS128 MEGALM_OUTS96, MEGALM_D16(12)
#define MEGALM_LIST256 MEGALM_LIST128 MEGALM_E8 MEGALM_E9 MEGALM_E10 MEGALM_E11 MEGALM_E12 MEGALM_E13 MEGALM_E14 MEGALM_E15
#define MEGALM_OUTS256 MEGALM_OUTS128, MEGALM_D16(16), MEGALM_D16(20), MEGALM_D16(24), MEGALM_D16(28)
MEGALM_MULTIPLY_BOTH(64, 32, 33, 34, 35, 36, 37, 38)
MEGALM_MULTIPLY_BOTH(80, 40, 41, 42, 43, 44, 45, 46)
MEGALM_MULTIPLY_BOTH(96, 48, 49, 50, 51, 52, 53, 54)
MEGALM_MULTIPLY_BOTH(128, 64, 65, 66, 67, 68, 69, 70)
MEGALM_MULTIPLY_BOTH(256, 128, 129, 130, 131, 132, 133, 134)
MEGALM_MULTIPLY_BYTES(64, 32, 33, 34, 35, 36, 37)
MEGALM_MULTIPLY_BYTES(128, 64, 65, 66, 67, 68, 69)
#endif

// What every kernel starts from: CUDA, or the shim that runs the same source on a CPU (csrc/shim, csrc/README.md).
//
// A kernel keeps to this so that the shim can run it: launch through MEGALM_LAUNCH, shared memory through MEGALM_SHARED and
// MEGALM_DYNAMIC_SHARED, and each PTX instruction in a named wrapper that has a body in the shim.
#pragma once
#ifdef MEGALM_SHIM
#include "shim/cuda_on_cpu.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include "common/bits.cuh"
#define MEGALM_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)
#define MEGALM_SHARED(type, name, count) __shared__ __align__(16) type name[count]
#define MEGALM_DYNAMIC_SHARED(type, name)                        \
  extern __shared__ __align__(16) unsigned char dynamic_shared[]; \
  type *name = reinterpret_cast<type *>(dynamic_shared)
#endif
#include "common/api.h"

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int VECTOR_BYTES = 16;  // the widest load and store
constexpr double LOG2_E = 1.4426950408889634074, LN_2 = 0.69314718055994530942;
constexpr float LOG2E = float(LOG2_E), LN2 = float(LN_2);

// In what precision a type is computed with: half precisions only store.
template <typename T> struct compute { using type = float; };
template <> struct compute<double> { using type = double; };
template <typename T> using compute_t = typename compute<T>::type;

template <typename C, typename T> __device__ __forceinline__ C widen(T value) { return static_cast<C>(value); }
template <typename T, typename C> __device__ __forceinline__ T narrow(C value) { return static_cast<T>(value); }

__device__ __forceinline__ float inverse_root(float x) { return rsqrtf(x); }
// 2^x in one instruction, within 2^-22 of it, without the five that make results below 2^-126 other than 0.
#ifdef MEGALM_SHIM
inline float power_of_two(float x) { return std::exp2(x); }
inline double power_of_two(double x) { return std::exp2(x); }
inline double inverse_root(double x) { return 1.0 / std::sqrt(x); }
#else
__device__ __forceinline__ float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#endif

// N neighbours in memory, read and written at once where they are 16 bytes and so aligned. Half precisions stay packed two to a
// register: an array of them would take a register each.
template <typename T, int N, bool PAIRS = sizeof(T) == 2 && N % 2 == 0> struct alignas(sizeof(T) * N) Pack {
  T elements[N];
  __device__ __forceinline__ compute_t<T> operator[](int i) const { return widen<compute_t<T>>(elements[i]); }
  __device__ __forceinline__ void set(const compute_t<T> (&values)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) elements[i] = narrow<T>(values[i]);
  }
};

__device__ __forceinline__ float low_half(const bf16 &, uint32_t word) { return bits_as_float(word << 16); }
__device__ __forceinline__ float high_half(const bf16 &, uint32_t word) { return bits_as_float(word & 0xffff0000u); }
__device__ __forceinline__ float low_half(const f16 &, uint32_t word) { return f16_bits_as_float(word & 0xffffu); }
__device__ __forceinline__ float high_half(const f16 &, uint32_t word) { return f16_bits_as_float(word >> 16); }

template <typename T, int N> struct alignas(sizeof(T) * N) Pack<T, N, true> {
  uint32_t words[N / 2];
  __device__ __forceinline__ float operator[](int i) const {
    return i % 2 == 0 ? low_half(T(), words[i / 2]) : high_half(T(), words[i / 2]);
  }
  __device__ __forceinline__ void set(const float (&values)[N]) {
#pragma unroll
    for (int i = 0; i < N / 2; i++) words[i] = pair_bits(T(), values[2 * i], values[2 * i + 1]);
  }
};

template <int N, typename T> __device__ __forceinline__ Pack<T, N> load(const T *from) {
  return *reinterpret_cast<const Pack<T, N> *>(from);
}
template <int N, typename T> __device__ __forceinline__ void store(T *to, const compute_t<T> (&values)[N]) {
  Pack<T, N> pack;
  pack.set(values);
  *reinterpret_cast<Pack<T, N> *>(to) = pack;
}
template <int N, typename T> __device__ __forceinline__ void store(T *to, const Pack<T, N> &pack) {
  *reinterpret_cast<Pack<T, N> *>(to) = pack;
}

// Whether rows that start at `pointer` and are `stride` elements apart can be accessed `VECTOR_BYTES` at a time.
template <typename T> inline bool aligned(const void *pointer, int64_t stride = 0) {
  return reinterpret_cast<uintptr_t>(pointer) % VECTOR_BYTES == 0 && stride * int64_t(sizeof(T)) % VECTOR_BYTES == 0;
}
template <typename T> constexpr int vector_width = VECTOR_BYTES / sizeof(T);

template <typename N> __host__ __device__ constexpr N ceil_div(N a, N b) { return (a + b - 1) / b; }

// Statements with T as the type that `dtype` names; an unknown one is the caller's error.
#define MEGALM_CASE(code, type, ...) \
  case code: {                       \
    using T = type;                  \
    __VA_ARGS__;                     \
    break;                           \
  }
#ifdef MEGALM_SHIM
#define MEGALM_F64_CASE(...) MEGALM_CASE(MEGALM_F64, double, __VA_ARGS__)
#else
#define MEGALM_F64_CASE(...)
#endif
#define MEGALM_DISPATCH(dtype, ...)             \
  switch (dtype) {                              \
    MEGALM_CASE(MEGALM_F32, float, __VA_ARGS__) \
    MEGALM_CASE(MEGALM_F16, f16, __VA_ARGS__)   \
    MEGALM_CASE(MEGALM_BF16, bf16, __VA_ARGS__) \
    MEGALM_F64_CASE(__VA_ARGS__)                \
    default: return cudaErrorInvalidValue;      \
  }

// Defines megalm_<name> as `run(*params, stream)` and then whatever error the launch left, and megalm_<name>_size.
#define MEGALM_DEFINE(name, run)                                                     \
  int megalm_##name(const megalm_##name##_params *params, megalm_stream stream) {   \
    const int error = run(*params, stream);                                         \
    return error != cudaSuccess ? error : static_cast<int>(cudaGetLastError());     \
  }                                                                                 \
  int64_t megalm_##name##_size(void) { return sizeof(megalm_##name##_params); }

// Multiprocessors of the current device.
inline int processors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 1;
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count > 0 ? count : 1;
}

// Whether the current device is of compute capability `major`.0.
inline bool is_capability(int major) {
  int device = 0, found = 0, minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  cudaDeviceGetAttribute(&found, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return found == major && minor == 0;
}

// Blocks of `kernel` that fill the device once: what a grid of blocks that loop over the rows should have at most.
template <typename Kernel> inline int64_t resident_blocks(Kernel kernel, int threads, size_t shared_bytes) {
  int each = 0;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, shared_bytes);
  return int64_t(each > 0 ? each : 1) * processors();
}

// Of a question whose answer may be no: the error is not left for the launch.
inline bool succeeded(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return error == cudaSuccess;
}

// Whether blocks of `kernel` can have so much dynamic shared memory.
template <typename Kernel> inline bool allow_shared(Kernel kernel, size_t bytes) {
  return succeeded(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
}

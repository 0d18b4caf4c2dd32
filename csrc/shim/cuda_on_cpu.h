// CUDA C++ as far as the kernels of csrc/ use it, on a CPU: to prove what they compute where there is no GPU.
//
// It shows wrong results, missing barriers, divergent collectives, uninitialised shared memory, bad launches and, with
// AddressSanitizer, accesses out of bounds. It can't show speed, registers, bank conflicts, weak memory order or PTX.
#pragma once
#include <cmath>
#include <type_traits>

#include "common/api.h"
#include "shim/fibers.h"
#include "shim/half.h"

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define threadIdx (shim::self().thread)
#define blockIdx (shim::self().block->index)
#define blockDim (shim::self().block->size)
#define gridDim (shim::self().block->grid)

using std::max;
using std::min;
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrComputeCapabilityMajor = 75, cudaDevAttrComputeCapabilityMinor = 76 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
using cudaStream_t = megalm_stream;
struct cudaFuncAttributes { int ptxVersion; };

namespace shim {
constexpr size_t MAX_SHARED = 227 * 1024;
constexpr int PROCESSORS = 3, BLOCKS_EACH = 2;  // small and odd, so that grids of a few rows already loop
inline cudaError_t &pending() { static cudaError_t it = cudaSuccess; return it; }

template <class Body> void launch(dim3 grid, dim3 size, size_t shared_bytes, const Body &body, int cluster = 1) {
  const int64_t threads = int64_t(size.x) * size.y * size.z;
  const bool fits = threads >= 1 && threads <= 1024 && grid.x >= 1 && grid.y >= 1 && grid.z >= 1 && grid.x <= 0x7fffffffu &&
                    grid.y <= 65535 && grid.z <= 65535 && shared_bytes <= MAX_SHARED && grid.x % cluster == 0;
  if (!fits) {
    pending() = cudaErrorInvalidConfiguration;
    state().error = "invalid launch configuration";
    return;
  }
  const auto run = [](const void *it) { (*static_cast<const Body *>(it))(); };
  const std::string error = run_grid(grid, size, shared_bytes, &body, run, cluster);
  if (error.empty()) return;
  pending() = cudaErrorLaunchFailure;
  state().error = error;
}

template <class T> T lane_of(const unsigned char (*slots)[SLOT_BYTES], int lane) {
  T value;
  std::memcpy(&value, slots[lane], sizeof(T));
  return value;
}
}  // namespace shim

// The body is made once for the whole grid: a kernel's arguments are constants to its threads.
#define MEGALM_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  shim::launch(grid, block, shared_bytes, [=] { (void)(stream); kernel(__VA_ARGS__); })
#define MEGALM_SHARED(type, name, count) \
  static const char name##_site = 0;     \
  type *name = static_cast<type *>(shim::shared_array(&name##_site, sizeof(type) * (count)))
#define MEGALM_DYNAMIC_SHARED(type, name) type *name = reinterpret_cast<type *>(shim::self().block->dynamic.data())

inline void __syncthreads() { shim::barrier(0); }
inline int __syncthreads_or(int vote) { return shim::barrier(vote) > 0; }
inline void __syncwarp(uint32_t mask = 0xffffffffu) { shim::exchange(mask, "", 1); }

template <class T> T __shfl_sync(uint32_t mask, T value, int from, int width = 32) {
  const int lane = shim::self().lane;
  return shim::lane_of<T>(shim::exchange(mask, &value, sizeof(T)), (lane & ~(width - 1)) | (from & (width - 1)));
}
template <class T> T __shfl_xor_sync(uint32_t mask, T value, int distance) {
  const int lane = shim::self().lane;
  return shim::lane_of<T>(shim::exchange(mask, &value, sizeof(T)), lane ^ distance);
}
template <class T> T __shfl_down_sync(uint32_t mask, T value, unsigned distance) {
  const int lane = shim::self().lane;
  const auto slots = shim::exchange(mask, &value, sizeof(T));
  return shim::lane_of<T>(slots, lane + int(distance) < 32 ? lane + int(distance) : lane);
}

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint32_t(uint64_t(a) * b >> 32); }

inline cudaError_t cudaGetDevice(int *device) { *device = 0; return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr which, int) {
  *value = which == cudaDevAttrMultiProcessorCount ? shim::PROCESSORS : which == cudaDevAttrComputeCapabilityMajor ? 9 : 0;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t) { std::memset(to, value, bytes); return cudaSuccess; }
template <class Kernel> cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, Kernel, int, size_t shared_bytes) {
  *blocks = shared_bytes > shim::MAX_SHARED / 3 ? 1 : shim::BLOCKS_EACH;
  return cudaSuccess;
}
template <class Kernel> cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) { return cudaSuccess; }
template <class Kernel> cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *found, Kernel) { *found = {90}; return cudaSuccess; }
inline cudaError_t cudaGetLastError() {
  const cudaError_t error = shim::pending();
  shim::pending() = cudaSuccess;
  return error;
}
inline const char *cudaGetErrorString(cudaError_t error) {
  if (error == cudaSuccess) return "no error";
  return error == cudaErrorInvalidValue ? "invalid argument" : shim::state().error.c_str();
}

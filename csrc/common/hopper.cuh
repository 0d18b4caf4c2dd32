// What sm_90 adds for kernels whose warps have roles: barriers in shared memory that count arrivals and bytes, the tensor copy engine,
// named barriers, registers that move between warpgroups, and turns that blocks take. Each PTX instruction sits in a wrapper that
// shim/hopper.h has too. Facts: PTX ISA 8.x, sections "mbarrier", "cp.async.bulk.tensor", "bar", "setmaxnreg", "red".
#pragma once
#include "common/common.cuh"
#include "common/tensor_map.cuh"

constexpr int WARPGROUP = 128;

#ifdef MEGALM_SHIM
#include "shim/hopper.h"
#else
// Kernels of Hopper's own instructions have a body in sm_90a's machine code only.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define MEGALM_HOPPER
#endif
#define MEGALM_CONSTANT const __grid_constant__

__device__ __forceinline__ uint32_t shared_offset(const void *pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// A barrier in shared memory: a phase ends when `arrivals` threads have arrived and every byte expected has come. Phases have
// parities 0, 1, 0, ..; waiting for the parity of the phase before the current one returns at once.
__device__ __forceinline__ void barrier_start(uint64_t *barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_offset(barrier)), "r"(arrivals) : "memory");
}
// After the barriers were started, before the copy engine uses them; then a __syncthreads.
__device__ __forceinline__ void barriers_started() { asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory"); }
__device__ __forceinline__ void barrier_arrive(uint64_t *barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(shared_offset(barrier)) : "memory");
}
// Arrives, and the phase waits for so many bytes.
__device__ __forceinline__ void barrier_expect(uint64_t *barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_offset(barrier)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint64_t *barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra.uni DONE;\nbra.uni WAIT;\n"
      "DONE:\n}\n" ::"r"(shared_offset(barrier)), "r"(parity) : "memory");
}

// Starts to copy a map's box at these coordinates (column, row, head, batch) to shared memory; it arrives on the barrier as bytes.
__device__ __forceinline__ void tensor_load(void *to, const TensorMap &map, uint64_t *barrier, int column, int row, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];\n" ::"r"(
          shared_offset(to)),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(shared_offset(barrier)), "r"(column), "r"(row), "r"(head), "r"(batch)
      : "memory");
}

// Ordinary stores of this thread to shared memory come before what matrix instructions and the copy engine do there after a barrier.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }
// A store that a matrix instruction reads: fence_async and a barrier come after it.
__device__ __forceinline__ void store_operand(void *to, uint32_t word) {
  asm volatile("st.shared.b32 [%0], %1;\n" ::"r"(shared_offset(to)), "r"(word) : "memory");
}

// Barrier number `id` (1 to 15) of `threads` threads: wait for it, or only be counted.
__device__ __forceinline__ void named_wait(int id, int threads) { asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory"); }
__device__ __forceinline__ void named_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;\n" ::"r"(id), "r"(threads) : "memory"); }

// This warpgroup's registers a thread from here on; all warps of the block together have what the launch gave them.
template <int COUNT> __device__ __forceinline__ void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(COUNT)); }
template <int COUNT> __device__ __forceinline__ void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(COUNT)); }

// *to += values, four at once, in an order that nobody knows.
__device__ __forceinline__ void add_to(float *to, const float (&values)[4]) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};\n" ::"l"(to), "f"(values[0]), "f"(values[1]), "f"(values[2]),
               "f"(values[3])
               : "memory");
}
// Waits until a number that other blocks pass on is at least `value`; stops the kernel where nobody passes it on (bounds that
// decrease), after some ten seconds.
__device__ __forceinline__ void turn_wait(const int *number, int value) {
  for (int tries = 0, found; tries < 1 << 26; tries++) {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];\n" : "=r"(found) : "l"(number) : "memory");
    if (found >= value) return;
  }
  __trap();
}
// Passes it on: after what this thread did and what others did before a barrier that it has passed.
__device__ __forceinline__ void turn_pass(int *number) {
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;\n" ::"l"(number) : "memory");
}
__device__ __forceinline__ int take_ticket(int *next) { return atomicAdd(next, 1); }
#endif

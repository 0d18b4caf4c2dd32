// Sums and maxima over the threads of a warp, of a part of a warp, and of a block.
#pragma once
#include "common/common.cuh"

struct Sum {
  template <typename C> __device__ __forceinline__ C operator()(C a, C b) const { return a + b; }
  template <typename C> __device__ __forceinline__ static C neutral() { return C(0); }
};
struct Max {
  template <typename C> __device__ __forceinline__ C operator()(C a, C b) const { return a > b ? a : b; }
  template <typename C> __device__ __forceinline__ static C neutral() { return C(-INFINITY); }
};

// Over aligned groups of `width` lanes (a power of two up to 32); every lane gets the result. All lanes of the warp take part.
template <typename Op, typename C> __device__ __forceinline__ C reduce_lanes(C value, int width, Op op = Op()) {
  for (int distance = width / 2; distance > 0; distance /= 2) value = op(value, __shfl_xor_sync(ALL_LANES, value, distance));
  return value;
}

// Over a block of blockDim.x threads, a multiple of 32; every thread gets the result. All threads of the block take part.
template <typename Op, typename C> __device__ __forceinline__ C reduce_block(C value, Op op = Op()) {
  MEGALM_SHARED(C, partial, WARP);
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
  value = reduce_lanes<Op>(value, WARP, op);
  __syncthreads();  // the last reduction's partial results have been read
  if (lane == 0) partial[warp] = value;
  __syncthreads();
  return reduce_lanes<Op>(lane < warps ? partial[lane] : Op::template neutral<C>(), WARP, op);
}

// Over the threads that share a row: blockDim.x of them, and blockDim.y rows in a block where blockDim.x divides 32.
template <typename Op, typename C> __device__ __forceinline__ C reduce_row(C value, Op op = Op()) {
  return blockDim.x <= WARP ? reduce_lanes<Op>(value, blockDim.x, op) : reduce_block<Op>(value, op);
}

template <typename C> struct Two { C first, second; };

// The sums of two values over the threads that share a row, for one pair of barriers.
template <typename C> __device__ __forceinline__ Two<C> sum_row(Two<C> value) {
  const int width = blockDim.x <= WARP ? blockDim.x : WARP;
  value = {reduce_lanes<Sum>(value.first, width), reduce_lanes<Sum>(value.second, width)};
  if (blockDim.x <= WARP) return value;
  MEGALM_SHARED(Two<C>, partial, WARP);
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
  __syncthreads();
  if (lane == 0) partial[warp] = value;
  __syncthreads();
  value = lane < warps ? partial[lane] : Two<C>{C(0), C(0)};
  return {reduce_lanes<Sum>(value.first, WARP), reduce_lanes<Sum>(value.second, WARP)};
}

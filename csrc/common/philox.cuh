// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011) and the dropout mask that
// megalm/ops/random.py defines with it: a pure function of key, sample and place, so that every layout draws the same.
#pragma once
#include "common/common.cuh"

struct Words { uint32_t x, y, z, w; };

__device__ __forceinline__ Words philox4x32(Words counter, uint32_t key0, uint32_t key1) {
#pragma unroll
  for (int round = 0; round < 10; round++) {
    const uint64_t first = uint64_t(0xD2511F53u) * counter.x, second = uint64_t(0xCD9E8D57u) * counter.z;
    counter = {uint32_t(second >> 32) ^ counter.y ^ key0, uint32_t(second), uint32_t(first >> 32) ^ counter.w ^ key1, uint32_t(first)};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// The mask of one call. An element is kept where its word is at least the threshold.
struct KeyedMask {
  uint32_t key0, key1, threshold;

  __device__ __forceinline__ Words block(int64_t number, int64_t sample) const {
    return philox4x32({uint32_t(number), uint32_t(number >> 32), uint32_t(sample), uint32_t(sample >> 32)}, key0, key1);
  }

  // For N neighbours from `place` on, a multiple of N: four share a block's words.
  template <int N> __device__ __forceinline__ void keep(bool (&kept)[N], int64_t place, int64_t sample) const {
    static_assert(N < 4 ? 4 % N == 0 : N % 4 == 0, "blocks aren't split unevenly");
    if (N < 4) {
      const Words words = block(place / 4, sample);
#pragma unroll
      for (int i = 0; i < N; i++) {
        const int lane = int(place % 4) + i;
        const uint32_t word = lane < 2 ? (lane == 0 ? words.x : words.y) : (lane == 2 ? words.z : words.w);
        kept[i] = word >= threshold;
      }
    }
#pragma unroll
    for (int i = 0; i + 4 <= N; i += 4) {
      const Words words = block(place / 4 + i / 4, sample);
      kept[i] = words.x >= threshold;
      kept[i + 1] = words.y >= threshold;
      kept[i + 2] = words.z >= threshold;
      kept[i + 3] = words.w >= threshold;
    }
  }
};

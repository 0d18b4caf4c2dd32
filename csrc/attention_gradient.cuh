// What attention's kernels of the backward pass share on every GPU. Math: attention.h.
#pragma once
#include "attention_common.cuh"

namespace attention {

// What a tile of TILE queries brings along, in shared memory.
template <int TILE> struct QueryFacts {
  float lse[TILE], delta[TILE];  // lse in units of log2 e
  int begin[TILE], end[TILE];
};

// The first query in [0, queries) that passes a test which holds from some query on; `queries` if none does.
template <typename Test> __device__ __forceinline__ int first_that(int queries, Test test) {
  int low = 0, high = queries;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (test(middle)) high = middle;
    else low = middle + 1;
  }
  return low;
}

}  // namespace attention

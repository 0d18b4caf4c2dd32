// The workspace of attention's backward pass on Hopper: a ticket, whose turn it is at each tile of queries, and the sums that become
// the queries' gradient, in the order in which the threads of a warpgroup hold them.
#pragma once
#include "attention_hopper.cuh"

namespace attention {

struct Sums {
  int64_t entries, tiles;  // heads of all batch entries; tiles of queries a head
  int rows;                // queries a tile: 64, where one warpgroup has the left 64 columns and one the right, or 128, 64 each

  static constexpr int SHARE = 64 * 64;  // of a warpgroup, of a tile
  static Sums make(const megalm_attention_backward_params &p, int rows) {
    return {p.batch * p.heads, ceil_div(p.queries, int64_t(rows)), rows};
  }
  __host__ __device__ int64_t turns() const { return 2 * entries * tiles; }
  __host__ __device__ int64_t offset() const { return ceil_div((1 + turns()) * int64_t(sizeof(int)), int64_t(128)) * 128; }
  __host__ __device__ int64_t bytes() const { return offset() + turns() * SHARE * int64_t(sizeof(float)); }
  // Of a thread's four numbers of columns 8 n + .., or of the first lane's of a row.
  __device__ __forceinline__ static int place(int n, int thread) { return (n * WARPGROUP + thread) * 4; }
  __device__ __forceinline__ int64_t place(int64_t tile, int row, int chunk) const {
    return (2 * tile + row / 64 + chunk / 8) * SHARE + place(chunk % 8, row % 64 / 16 * WARP + row % 8 * 4);
  }
};

}  // namespace attention

int attention_hopper_finish_queries(const megalm_attention_backward_params &p, const attention::Sums &sums, megalm_stream stream);

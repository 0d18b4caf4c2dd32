// Attention on Hopper: whether it can serve, and the queries' gradient from the sums that the blocks of keys left. Math: attention.h.
#include "attention_checks.cuh"
#include "attention_hopper_sums.cuh"
#include "common/tensor_map.cuh"

namespace {

using namespace attention;

constexpr int FINISH_THREADS = 256;

// A thread: rows g and g + 8 of a warp's 16, eight columns of them.
template <typename T>
__global__ void __launch_bounds__(FINISH_THREADS) attention_hopper_finish(const megalm_attention_backward_params p, const Sums sums, int64_t threads) {
  const int64_t index = blockIdx.x * int64_t(FINISH_THREADS) + threadIdx.x;
  if (index >= threads) return;
  const int chunks = int(p.head_dim) / 8, chunk = int(index % chunks), eight = int(index / chunks % (sums.rows / 16 * 8));
  const int64_t tile = index / chunks / (sums.rows / 16 * 8), entry = tile / sums.tiles;
  const int row = eight / 8 * 16 + eight % 8, query = int(tile % sums.tiles) * sums.rows + row;
  const float *const from = (const float *)((const char *)p.workspace + sums.offset()) + sums.place(tile, row, chunk);
  T *const to = (T *)p.grad_q + entry / p.heads * p.grad_q_batch + entry % p.heads * p.grad_q_head + chunk * 8;
  float values[2][8];
#pragma unroll
  for (int lane = 0; lane < 4; lane++) {
    const float4 four = *reinterpret_cast<const float4 *>(from + 4 * lane);
    values[0][2 * lane] = four.x * float(p.scale);
    values[0][2 * lane + 1] = four.y * float(p.scale);
    values[1][2 * lane] = four.z * float(p.scale);
    values[1][2 * lane + 1] = four.w * float(p.scale);
  }
#pragma unroll
  for (int half = 0; half < 2; half++)
    if (query + 8 * half < p.queries) store<8>(to + (query + 8 * half) * p.grad_q_row, values[half]);
}

template <typename T> int launch(const megalm_attention_backward_params &p, const Sums &sums, megalm_stream stream) {
  const auto kernel = attention_hopper_finish<T>;
  const int64_t threads = sums.entries * sums.tiles * (sums.rows / 2) * (p.head_dim / 8);
  const int64_t blocks = ceil_div(threads, int64_t(FINISH_THREADS));
  MEGALM_LAUNCH(kernel, dim3(unsigned(blocks)), dim3(FINISH_THREADS), 0, stream, p, sums, threads);
  return cudaSuccess;
}

}  // namespace

int attention_hopper_finish_queries(const megalm_attention_backward_params &p, const attention::Sums &sums, megalm_stream stream) {
  return p.dtype == MEGALM_BF16 ? launch<bf16>(p, sums, stream) : launch<f16>(p, sums, stream);
}

// Code that the driver made of sm_80's instructions runs here too, but it has none of Hopper's kernels; and a driver may be older than
// the copy engine's maps.
bool attention_hopper_here() {
  cudaFuncAttributes found;
  return is_capability(9) && has_tensor_maps() && cudaFuncGetAttributes(&found, attention_hopper_finish<bf16>) == cudaSuccess && found.ptxVersion >= 90;
}

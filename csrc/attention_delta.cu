// delta = sum over the value dim of grad_out out: a part of a warp a row, both read once, 16 bytes a thread. Math: attention.h.
#include "attention_checks.cuh"
#include "common/reduce.cuh"

namespace {

constexpr int DELTA_THREADS = 256;

template <typename T>
__global__ void __launch_bounds__(DELTA_THREADS) attention_delta(const megalm_attention_delta_params p, int lanes) {
  const int chunks = int(p.value_dim) / 8, lane = threadIdx.x % lanes;
  const int64_t rows = p.batch * p.heads * p.queries, per_block = DELTA_THREADS / lanes;
  const int64_t row = blockIdx.x * per_block + threadIdx.x / lanes;  // [batch, heads, queries]
  float sum = 0.0f;
  if (row < rows) {
    const int64_t query = row % p.queries, head = row / p.queries % p.heads, batch = row / p.queries / p.heads;
    const T *const out = (const T *)p.out + query * p.out_row + batch * p.out_batch + head * p.out_head;
    const T *const grad = (const T *)p.grad_out + query * p.grad_row + batch * p.grad_batch + head * p.grad_head;
    for (int chunk = lane; chunk < chunks; chunk += lanes) {
      const Pack<T, 8> a = load<8>(out + chunk * 8), b = load<8>(grad + chunk * 8);
#pragma unroll
      for (int i = 0; i < 8; i++) sum += a[i] * b[i];
    }
  }
  sum = reduce_lanes<Sum>(sum, lanes);
  if (row < rows && lane == 0) ((float *)p.delta)[row] = sum;
}

template <typename T> int launch(const megalm_attention_delta_params &p, megalm_stream stream) {
  int lanes = 1;
  while (lanes < p.value_dim / 8 && lanes < WARP) lanes *= 2;
  const auto kernel = attention_delta<T>;
  const int64_t blocks = ceil_div(p.batch * p.heads * p.queries, int64_t(DELTA_THREADS / lanes));
  MEGALM_LAUNCH(kernel, dim3(unsigned(blocks)), dim3(DELTA_THREADS), 0, stream, p, lanes);
  return cudaSuccess;
}

int run(const megalm_attention_delta_params &p, megalm_stream stream) {
  const bool fits = p.value_dim % 8 == 0 && p.value_dim >= 8 && p.batch * p.heads * p.queries >= 1 &&
                    attention::pointers_fit({p.out, p.grad_out}) &&
                    attention::strides_fit({p.out_row, p.out_batch, p.out_head, p.grad_row, p.grad_batch, p.grad_head});
  if (!fits) return cudaErrorInvalidValue;
  if (p.dtype == MEGALM_BF16) return launch<bf16>(p, stream);
  return p.dtype == MEGALM_F16 ? launch<f16>(p, stream) : cudaErrorInvalidValue;
}

}  // namespace

MEGALM_DEFINE(attention_delta, run)

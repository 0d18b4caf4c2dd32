// Attention to a cache: into how many parts the keys are divided, which instance serves, and the merge of the parts.
#include "attention_checks.cuh"
#include "attention_decode.cuh"
#include "attention_instances.h"
#include "common/reduce.cuh"

namespace attention {

constexpr int MERGE_THREADS = 256, MOST_SPLITS = MERGE_THREADS;

// A block a row: every part's weight is made once, and parts are added by as many groups of threads as the block has, each in
// order, then group by group: the same bits always.
template <typename T> __global__ void __launch_bounds__(MERGE_THREADS) attention_decode_merge(const megalm_attention_decode_params p) {
  MEGALM_SHARED(float, weights, MOST_SPLITS);
  MEGALM_SHARED(float, sums, MERGE_THREADS * 4);
  const int splits = int(p.splits), packs = int(p.value_dim) / 4, parts = MERGE_THREADS / packs;
  const int64_t rows = p.batch * p.heads * p.queries, place = blockIdx.x;
  const int query = int(place % p.queries), head = int(place / p.queries % p.heads), batch = int(place / p.queries / p.heads);
  const float mine = int(threadIdx.x) < splits ? ((const float *)p.partial_lse)[threadIdx.x * rows + place] : -INFINITY;
  const float top = reduce_block<Max>(mine), weight = RowSums::factor(mine, top);
  weights[threadIdx.x] = weight;
  RowSums total{top, reduce_block<Sum>(weight)};
  __syncthreads();
  const int part = int(threadIdx.x) / packs, column = int(threadIdx.x) % packs * 4;
  float values[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  if (part < parts) {
#pragma unroll 4
    for (int split = part; split < splits; split += parts) {
      if (weights[split] == 0.0f) continue;  // an empty part: nobody wrote it
      const Pack<float, 4> found = load<4>((const float *)p.partial_out + (split * rows + place) * p.value_dim + column);
#pragma unroll
      for (int i = 0; i < 4; i++) values[i] += found[i] * weights[split];
    }
  }
  store<4>(sums + threadIdx.x * 4, values);
  __syncthreads();
  if (part > 0) return;
  for (int other = 1; other < parts; other++)
#pragma unroll
    for (int i = 0; i < 4; i++) values[i] += sums[(other * packs + threadIdx.x) * 4 + i];
  total.add(p.sinks, head);
  const float scale = RowSums::factor(top, total.top) * total.inverse();
#pragma unroll
  for (int i = 0; i < 4; i++) values[i] *= scale;
  store<4>((T *)p.out + query * p.out_row + batch * p.out_batch + head * p.out_head + column, values);
  if (column == 0) ((float *)p.lse)[place] = total.lse() * LN2;
}

// Of a head dim's kernel: launches it, or says how many splits it wants.
struct Launcher {
  const megalm_attention_decode_params &p;
  megalm_stream stream;
  bool counting;
  int64_t splits;

  template <typename T, int D, int E> int instance() {
    using F = Decode<T, D, E>;
    const auto kernel = attention_decode<T, D, E>;
    const int error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, F::SHARED_BYTES);
    if (error != cudaSuccess) return error;
    const int64_t row_tiles = ceil_div(p.heads / p.groups * p.queries, int64_t(F::ROWS));
    if (counting) {
      const int64_t seen = p.left < 0 ? p.keys : std::min(p.keys, p.left + p.queries);
      splits = best_splits(row_tiles * p.groups * p.batch, resident_blocks(kernel, F::THREADS, F::SHARED_BYTES),
                           ceil_div(seen, int64_t(2 * F::WARPS * F::KEYS)));
      return cudaSuccess;
    }
    const dim3 grid(unsigned(row_tiles * p.splits), unsigned(p.groups), unsigned(p.batch));
    MEGALM_LAUNCH(kernel, grid, dim3(F::THREADS), F::SHARED_BYTES, stream, p);
    if (p.splits == 1) return cudaSuccess;
    const auto merge = attention_decode_merge<T>;
    MEGALM_LAUNCH(merge, dim3(unsigned(p.batch * p.heads * p.queries)), dim3(MERGE_THREADS), 0, stream, p);
    return cudaSuccess;
  }

  // The fewest that leave at most a tenth of the last wave of blocks idle, or those that leave the least; `most` keeps two tiles for
  // every warp.
  static int64_t best_splits(int64_t blocks, int64_t resident, int64_t most) {
    int64_t best = 1;
    double best_share = 0.0;
    for (int64_t splits = 1; splits <= std::min(most, int64_t(MOST_SPLITS)) && best_share < 0.9; splits++) {
      const double share = double(blocks * splits) / double(ceil_div(blocks * splits, resident) * resident);
      if (share > best_share) best = splits, best_share = share;
    }
    return best;
  }

  template <typename T> int dims() {
#define MEGALM_ATTENTION_INSTANCE(d, e) \
  if (p.head_dim == d && p.value_dim == e) return instance<T, d, e>();
    MEGALM_ATTENTION_INSTANCES
#undef MEGALM_ATTENTION_INSTANCE
    return cudaErrorInvalidValue;
  }

  int run() {
    if (!sizes_fit(p) || p.batch * p.heads * p.queries > INT32_MAX || p.groups > 65535) return cudaErrorInvalidValue;
    return p.dtype == MEGALM_BF16 ? dims<bf16>() : dims<f16>();
  }
};

int run(const megalm_attention_decode_params &p, megalm_stream stream) {
  const bool pages_fit = p.table == nullptr ? p.page == 0 : p.page >= 16 && (p.page & (p.page - 1)) == 0 && p.keys % p.page == 0;
  const bool parts_fit = p.splits == 1 || (p.splits > 1 && p.splits <= MOST_SPLITS && p.partial_out != nullptr && p.partial_lse != nullptr);
  if (!inputs_fit(p) || !pointers_fit({p.out}) || !pages_fit || !parts_fit) return cudaErrorInvalidValue;
  return Launcher{p, stream, false, 0}.run();
}

}  // namespace attention

MEGALM_DEFINE(attention_decode, attention::run)

int64_t megalm_attention_decode_splits(const megalm_attention_decode_params *params) {
  attention::Launcher launcher{*params, nullptr, true, 0};
  return launcher.run() == cudaSuccess ? launcher.splits : 0;
}

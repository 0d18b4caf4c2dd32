// What the copy engine knows of a tensor: made on the host, passed to a kernel by value. A tensor is [batch, head, row, column] of
// 16-bit elements by strides; a box is `rows` rows of 64 columns of one head, which lies in shared memory as rows of 128 bytes whose
// eight 16-byte chunks are permuted by the row (the 128-byte swizzle, as matrix instructions read it). What is outside the tensor is
// zeros. Facts: CUDA driver API, "Tensor Map Object Management".
#pragma once
#include "common/common.cuh"

constexpr int PANEL = 64;                     // columns of a box
constexpr int PANEL_ROW = 2 * PANEL;          // its bytes a row
constexpr int SWIZZLE_BYTES = 8 * PANEL_ROW;  // after which the permutation repeats: where boxes must start

struct Extents {
  int64_t columns, rows, heads, batch;
  int64_t row, head, entry;  // strides in elements

  // In bytes; one that is never gone along may be anything, which the copy engine would not take.
  int64_t row_bytes() const { return rows == 1 ? 2 * columns : 2 * row; }
  int64_t head_bytes() const { return heads == 1 ? row_bytes() : 2 * head; }
  int64_t entry_bytes() const { return batch == 1 ? row_bytes() : 2 * entry; }
};

#ifdef MEGALM_SHIM
inline bool has_tensor_maps() { return true; }
struct TensorMap {
  const unsigned char *base;
  int64_t size[4], stride[4];  // strides in bytes
  int rows;
};
inline int make_tensor_map(TensorMap &map, bool, const void *base, const Extents &extent, int rows) {
  map = {static_cast<const unsigned char *>(base), {extent.columns, extent.rows, extent.heads, extent.batch},
         {2, extent.row_bytes(), extent.head_bytes(), extent.entry_bytes()}, rows};
  for (int dim = 0; dim < 4; dim++)
    if (map.size[dim] <= 0 || (dim > 0 && (map.stride[dim] <= 0 || map.stride[dim] % 16 || map.stride[dim] >> 40))) return cudaErrorInvalidValue;
  return rows <= 256 && reinterpret_cast<uintptr_t>(base) % 16 == 0 ? cudaSuccess : cudaErrorInvalidValue;
}
#else
#include <cuda.h>

using TensorMap = CUtensorMap;

// The driver's function, asked of the runtime: nothing is linked against the driver.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static const auto found = [] {
    void *function = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? function : nullptr;
  }();
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
}

inline bool has_tensor_maps() { return tensor_map_encoder() != nullptr; }

inline int make_tensor_map(TensorMap &map, bool is_bf16, const void *base, const Extents &extent, int rows) {
  const auto encode = tensor_map_encoder();
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint64_t size[4] = {cuuint64_t(extent.columns), cuuint64_t(extent.rows), cuuint64_t(extent.heads), cuuint64_t(extent.batch)};
  const cuuint64_t stride[3] = {cuuint64_t(extent.row_bytes()), cuuint64_t(extent.head_bytes()), cuuint64_t(extent.entry_bytes())};
  const cuuint32_t box[4] = {PANEL, cuuint32_t(rows), 1, 1}, step[4] = {1, 1, 1, 1};
  const CUresult error = encode(&map, is_bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
                                const_cast<void *>(base), size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return error == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}
#endif

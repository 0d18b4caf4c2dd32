// What the copy engine knows of a tensor: made on the host, passed to a kernel by value. A tensor is [batch, head, row, column] of
// 16-bit elements or bytes by strides; a box is `rows` rows of 64 or 128 columns of one head, which lies in shared memory as rows of 128
// bytes whose eight 16-byte chunks are permuted by the row (the 128-byte swizzle, as matrix instructions read it). What is outside the
// tensor is zeros. Facts: CUDA driver API, "Tensor Map Object Management".
#pragma once
#include "common/common.cuh"

constexpr int PANEL_ROW = 128;                // bytes of a box a row
template <typename T> constexpr int PANEL = PANEL_ROW / int(sizeof(T));  // its columns
constexpr int SWIZZLE_BYTES = 8 * PANEL_ROW;  // after which the permutation repeats: where boxes must start

struct Extents {
  int64_t columns, rows, heads, batch;
  int64_t row, head, entry;  // strides in elements

  // Those of rows, heads and entries; one that is never gone along may be anything, which the copy engine would not take.
  int64_t row_stride() const { return rows == 1 ? columns : row; }
  int64_t head_stride() const { return heads == 1 ? row_stride() : head; }
  int64_t entry_stride() const { return batch == 1 ? row_stride() : entry; }
};

#ifdef MEGALM_SHIM
inline bool has_tensor_maps() { return true; }
struct TensorMap {
  const unsigned char *base;
  int64_t size[4], stride[4];  // strides in bytes
  int rows, element;           // bytes of an element
};
template <typename T> inline int make_tensor_map(TensorMap &map, const void *base, const Extents &extent, int rows) {
  constexpr int BYTES = sizeof(T);
  map = {static_cast<const unsigned char *>(base), {extent.columns, extent.rows, extent.heads, extent.batch},
         {BYTES, BYTES * extent.row_stride(), BYTES * extent.head_stride(), BYTES * extent.entry_stride()}, rows, BYTES};
  for (int dim = 0; dim < 4; dim++)
    if (map.size[dim] <= 0 || (dim > 0 && (map.stride[dim] <= 0 || map.stride[dim] % 16 || map.stride[dim] >> 40))) return cudaErrorInvalidValue;
  return rows <= 256 && reinterpret_cast<uintptr_t>(base) % 16 == 0 ? cudaSuccess : cudaErrorInvalidValue;
}
#else
#include <cuda.h>

#include <type_traits>

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

template <typename T> inline int make_tensor_map(TensorMap &map, const void *base, const Extents &extent, int rows) {
  const auto encode = tensor_map_encoder();
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint64_t size[4] = {cuuint64_t(extent.columns), cuuint64_t(extent.rows), cuuint64_t(extent.heads), cuuint64_t(extent.batch)};
  const cuuint64_t stride[3] = {sizeof(T) * extent.row_stride(), sizeof(T) * extent.head_stride(), sizeof(T) * extent.entry_stride()};
  const cuuint32_t box[4] = {PANEL<T>, cuuint32_t(rows), 1, 1}, step[4] = {1, 1, 1, 1};
  constexpr CUtensorMapDataType TYPE = sizeof(T) == 1                   ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                                       : std::is_same<T, bf16>::value ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                                       : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult error = encode(&map, TYPE, 4, const_cast<void *>(base), size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return error == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}
#endif

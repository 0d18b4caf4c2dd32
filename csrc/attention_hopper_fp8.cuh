// Attention, forward, for sm_90a, with products of bytes: q, k and v are rounded into the workspace, then the kernel of
// attention_hopper_forward.cuh reads them there. Math: attention.h.
#pragma once
#include "attention_hopper_forward.cuh"
#include "attention_hopper_quantize.cuh"

namespace attention {

template <typename T, int D, int E, int CONSUMERS, int KEYS>
int launch_hopper_fp8(const megalm_attention_forward_params &p, megalm_stream stream) {
  constexpr int ROWS = HopperForward<T, e4m3, D, E, CONSUMERS, KEYS>::ROWS;
  const Bytes bytes = Bytes::make(p);
  const char *const workspace = (const char *)p.workspace;
  ForwardMaps maps;
  int error = attention_hopper_quantize(p, bytes, stream);
  if (error == cudaSuccess)
    error = make_tensor_map<e4m3>(maps.q, workspace, {D, p.queries, p.heads, p.batch, D, p.queries * D, p.heads * p.queries * D}, ROWS);
  if (error == cudaSuccess)
    error = make_tensor_map<e4m3>(maps.k, workspace + bytes.k, {D, p.keys, p.groups, p.batch, D, p.keys * D, p.groups * p.keys * D}, KEYS);
  if (error == cudaSuccess)
    error = make_tensor_map<e4m3>(maps.v, workspace + bytes.v,
                                  {bytes.keys, E, p.groups, p.batch, bytes.keys, E * bytes.keys, p.groups * E * bytes.keys}, E);
  const Units units{(const float *)(workspace + bytes.units), int(p.heads), int(p.groups)};
  return error != cudaSuccess ? error : start_hopper_forward<T, e4m3, D, E, CONSUMERS, KEYS>(p, maps, units, stream);
}

}  // namespace attention

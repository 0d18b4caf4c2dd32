// Clusters of neighbouring blocks, which run at once and reach each other's shared memory: sm_90 and newer. PTX ISA,
// "barrier.cluster", "mapa"; CUDA programming guide, "Thread Block Clusters". shim/cluster.h has the same wrappers.
#pragma once
#include "common/reduce.cuh"

constexpr int MAX_CLUSTER = 8;  // what every device that has clusters can do

#ifdef MEGALM_SHIM
#include "shim/cluster.h"
#else
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define MEGALM_CLUSTER_CODE(...) __VA_ARGS__
#else
#define MEGALM_CLUSTER_CODE(...) __trap()  // has_clusters keeps such launches away
#endif

// Of all threads of all blocks of the cluster; what they wrote to shared memory before it is seen behind it.
__device__ __forceinline__ void cluster_barrier() {
  MEGALM_CLUSTER_CODE(
      asm volatile("barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;\n" ::: "memory"));
}

// To where the block `rank` of the cluster has what this block has at `mine` in its shared memory.
__device__ __forceinline__ void store_in_cluster(Two<float> *mine, int rank, const Two<float> &value) {
  MEGALM_CLUSTER_CODE(
      const uint32_t here = static_cast<uint32_t>(__cvta_generic_to_shared(mine)); uint32_t there;
      asm volatile("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(there) : "r"(here), "r"(rank));
      asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};\n" ::"r"(there), "f"(value.first), "f"(value.second) : "memory"));
}

// Whether `kernel` was compiled for a device with clusters: the code of sm_80 also runs on newer devices, but has none.
template <typename Kernel> inline bool has_clusters(Kernel kernel) {
  cudaFuncAttributes attributes{};
  return succeeded(cudaFuncGetAttributes(&attributes, kernel)) && attributes.ptxVersion >= 90;
}

struct ClusterLaunch {
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};
  ClusterLaunch(int cluster, dim3 grid, dim3 block, size_t shared_bytes, megalm_stream stream) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {unsigned(cluster), 1, 1};
    config = {grid, block, shared_bytes, stream, &attribute, 1};
  }
  ClusterLaunch(const ClusterLaunch &) = delete;  // config points to attribute
};

// Clusters of `kernel` that fill the device once.
template <typename Kernel> inline int64_t resident_clusters(Kernel kernel, int cluster, int threads, size_t shared_bytes) {
  const ClusterLaunch launch(cluster, dim3(cluster), dim3(threads), shared_bytes, nullptr);
  int count = 0;
  cudaOccupancyMaxActiveClusters(&count, kernel, &launch.config);
  return count > 0 ? count : 1;
}

template <typename... Params, typename... Args>
void launch_clusters(void (*kernel)(Params...), int cluster, dim3 grid, dim3 block, size_t shared_bytes, megalm_stream stream,
                     const Args &...args) {
  const ClusterLaunch launch(cluster, grid, block, shared_bytes, stream);
  cudaLaunchKernelEx(&launch.config, kernel, args...);
}
#define MEGALM_LAUNCH_CLUSTERS(kernel, cluster, grid, block, shared_bytes, stream, ...) \
  launch_clusters(kernel, cluster, grid, block, shared_bytes, stream, __VA_ARGS__)
#endif

// The sums of two values over the threads of a cluster of blocks (of the block where there is none), for one barrier: `turn`
// alternates between 0 and 1 from call to call, so that nobody writes to what others still read.
template <bool CLUSTERS, int MAX_WARPS, typename C>
__device__ __forceinline__ Two<C> sum_cluster(Two<C> value, int cluster, int rank, int turn) {
  constexpr int PLACES = MAX_WARPS * (CLUSTERS ? MAX_CLUSTER : 1);
  MEGALM_SHARED(Two<C>, partial, 2 * PLACES);
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
  Two<C> *mine = partial + turn * PLACES;
  value = {reduce_lanes<Sum>(value.first, WARP), reduce_lanes<Sum>(value.second, WARP)};
  if constexpr (CLUSTERS) {
    if (lane < cluster) store_in_cluster(mine + rank * warps + warp, lane, value);
    cluster_barrier();
  } else {
    if (lane == 0) mine[warp] = value;
    __syncthreads();
  }
  value = {C(0), C(0)};
  for (int at = lane; at < cluster * warps; at += WARP) value.first += mine[at].first, value.second += mine[at].second;
  return {reduce_lanes<Sum>(value.first, WARP), reduce_lanes<Sum>(value.second, WARP)};
}

// Bodies of common/cluster.cuh for the CPU: the blocks of a cluster take turns on one thread.
#pragma once
#include "shim/cuda_on_cpu.h"

inline void cluster_barrier() { shim::cluster_barrier(); }

template <typename C> void store_in_cluster(Two<C> *mine, int rank, const Two<C> &value) {
  *static_cast<Two<C> *>(shim::in_cluster(mine, rank)) = value;
}

// In order 1 the device is an older one, so that what serves those is run too.
template <typename Kernel> bool has_clusters(Kernel) { return shim::state().order != 1; }
template <typename Kernel> int64_t resident_clusters(Kernel, int, int, size_t) { return shim::PROCESSORS; }

#define MEGALM_LAUNCH_CLUSTERS(kernel, cluster, grid, block, shared_bytes, stream, ...) \
  shim::launch(grid, block, shared_bytes, [=] { (void)(stream); kernel(__VA_ARGS__); }, cluster)

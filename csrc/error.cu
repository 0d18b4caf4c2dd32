#include "common/common.cuh"

const char *megalm_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

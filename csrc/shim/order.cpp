// What only the library for the CPU has: in which order the next launches run their threads and blocks.
#define MEGALM_SHIM
#include "common/common.cuh"

MEGALM_C void megalm_shim_order(unsigned order) { shim::state().order = order; }

/* What every header of csrc/ shares. Plain C: the kernels' callers (Python's ctypes) need neither CUDA's headers nor torch's.
 *
 * An operation is `int megalm_<name>(const megalm_<name>_params *, megalm_stream)`: it launches and returns a cudaError_t (0 is
 * success) and never waits. `megalm_<name>_size()` is the size of its params: a caller that has another one was made from other
 * sources. Pointers are device memory; each one's shape stands beside it, rows contiguous unless a stride is given, strides in
 * elements. A null pointer means that an optional argument is absent.
 */
#pragma once
#include <stdint.h>

typedef struct CUstream_st *megalm_stream; /* a cudaStream_t */

enum megalm_dtype { MEGALM_F32 = 0, MEGALM_F16 = 1, MEGALM_BF16 = 2, MEGALM_F64 = 3 /* on the CPU only, for the tests */ };

#ifdef __cplusplus
#define MEGALM_C extern "C"
#else
#define MEGALM_C
#endif

#define MEGALM_OPERATION(name)                                                        \
  MEGALM_C int megalm_##name(const megalm_##name##_params *params, megalm_stream stream); \
  MEGALM_C int64_t megalm_##name##_size(void)

/* The text of an error that an operation returned. */
MEGALM_C const char *megalm_error(int error);

"""Memory on the CPU: freed tensors are kept for the next step, as a GPU's caching allocator keeps them."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # mallopt(3)
NEVER = -1


def keep_freed_memory() -> bool:
    """Have the C library keep what is freed; False where it isn't glibc, which then does as it likes.

    By default glibc gives every large tensor back to the system as soon as it is freed, and each step faults in and zeroes
    the same pages again: about 5% of a training step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, NEVER))

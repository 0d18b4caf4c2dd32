"""In which precision an operation computes, and in pieces of which size."""

from __future__ import annotations

import torch
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for half precisions, which only store; fp32 and fp64 compute as they are."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def wide(x: Tensor) -> Tensor:
    """x in the precision in which it is computed with."""
    return x.to(wide_dtype(x.dtype))


def eager_cpu(x: Tensor) -> bool:
    """Whether to go through the rows in pieces by hand: elsewhere a fused kernel or the compiler does better."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def rows_in_cache(width: int, elements: int = 1 << 17) -> int:
    """Rows of `width` elements whose fp32 temporaries stay in the L2 cache of every core: `elements` for each thread."""
    return max(1, torch.get_num_threads() * elements // max(1, width))

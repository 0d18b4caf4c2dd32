"""Sums of half-precision products in fp32, and back to half precision without a second buffer."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

BLOCK_ROWS = 4096
"""Of a product at a time where it can be made in fp32 but not added."""
_FIRST = 4096


def fp32_product(a: Tensor, b: Tensor) -> Tensor:
    """a b in fp32: [m, k] [k, n] -> [m, n]. On a CPU a bf16 product is rounded to bf16 on its way."""
    if _multiplies(a.device, a.dtype):
        return torch.mm(a, b, out_dtype=torch.float32)
    if a.dtype == torch.float16:
        return a.float().matmul(b.float())  # its sums would overflow
    return a.matmul(b).float()


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b where a, b are half precision and total is fp32 [m, n]; as `fp32_product`."""
    if _adds(a.device, a.dtype):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    elif _multiplies(a.device, a.dtype):
        for first in range(0, a.shape[0], BLOCK_ROWS):
            total[first:first + BLOCK_ROWS] += fp32_product(a[first:first + BLOCK_ROWS], b)
    else:
        total += fp32_product(a, b)


@lru_cache(maxsize=16)
def _multiplies(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch makes fp32 products of this dtype: on CUDA, since 2.8."""
    a = torch.zeros(16, 16, dtype=dtype, device=device)
    try:
        torch.mm(a, a, out_dtype=torch.float32)
    except (RuntimeError, TypeError):
        return False
    return True


@lru_cache(maxsize=16)
def _adds(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether it also adds them into an fp32 matrix: since pull request 167931 of November 2025."""
    a, total = (torch.zeros(16, 16, dtype=kind, device=device) for kind in (dtype, torch.float32))
    try:
        torch.addmm(total, a, a, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return True


def narrowed(values: Tensor, dtype: torch.dtype, factor: Tensor) -> Tensor:
    """values * factor in `dtype`, in the memory of `values`, which is contiguous and lost.

    factor: a scalar. Half precisions take the front half of fp32's place: element i is written where element i / 2 was, so that
    [n, 2n) of them can be written when the first n have been read.
    """
    if values.dtype == dtype:
        return values.mul_(factor)
    assert values.dtype == torch.float32 and dtype.itemsize == 2, (values.dtype, dtype)
    flat = values.view(-1)
    half = flat.view(dtype)[:flat.numel()]
    done = min(_FIRST, flat.numel())
    half[:done] = flat[:done] * factor
    while done < flat.numel():
        following = slice(done, 2 * done)
        torch.mul(flat[following], factor, out=half[following])
        done *= 2
    return half.view(values.shape)

"""Rotary position embedding (Su et al., "RoFormer", 2021) in the half-split form of Llama and GPT-NeoX.

Pair j of a head is (x[j], x[j + d/2]); at position p it is turned by the angle p * theta^(-2j/d). The backward pass is the
rotation by the negative angle and keeps nothing but the tables.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalm.ops.dtypes import eager_cpu, rows_in_cache, wide, wide_dtype
from megalm.ops.registry import Features, choose, register

_PIECE = 1 << 18


def rotary_tables(seq_length: int, head_dim: int, theta: float, scaling: Any, device, offset: int = 0) -> tuple[Tensor, Tensor]:
    """(cos, sin) of the angles at positions offset .. offset + seq_length, fp32 [s, d/2]; computed in float64.

    scaling: None, or {"type": "linear", "factor"} (positions divided by the factor, Chen et al., 2023), or {"type": "llama3",
    "factor", "low_freq_factor", "high_freq_factor", "original_seq_length"} (Llama 3.1: only slow pairs are slowed), as a
    mapping or an object with these attributes. Raises ValueError for an odd head_dim or an unknown type.
    """
    if head_dim % 2:
        raise ValueError(f"rotary positions need an even head_dim, not {head_dim}")
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim
    frequencies = _scaled(float(theta) ** -exponents, scaling)                                     # [d/2], radians a position
    positions = torch.arange(offset, offset + seq_length, dtype=torch.float64, device=device)
    angles = torch.outer(positions, frequencies)                                                   # [s, d/2]
    return angles.cos().float(), angles.sin().float()


def _scaled(frequencies: Tensor, scaling: Any) -> Tensor:
    if scaling is None:
        return frequencies
    get = scaling.__getitem__ if isinstance(scaling, Mapping) else lambda key: getattr(scaling, key)
    kind = get("type")
    if kind == "linear":
        return frequencies / get("factor")
    if kind != "llama3":
        raise ValueError(f"rotary_scaling.type is {kind!r}; it can be linear or llama3")
    # Turns within the original length: below low_freq_factor a pair is slowed fully, above high_freq_factor not at all.
    low, high = get("low_freq_factor"), get("high_freq_factor")
    turns = get("original_seq_length") * frequencies / (2 * math.pi)
    share = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * (share + (1 - share) / get("factor"))


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, backend: str = "auto") -> Tensor:
    """Turn x [s, b, heads, d] by tables [s, d/2]; half-precision x is turned in fp32. Raises ValueError for other shapes."""
    expected = (x.shape[0], x.shape[-1] // 2)
    if cos.shape != expected or sin.shape != expected or x.shape[-1] % 2:
        raise ValueError(f"rotary tables of shapes {tuple(cos.shape)} and {tuple(sin.shape)} don't fit x of shape "
                         f"{tuple(x.shape)}: need {expected} and an even last dim")
    run, _ = choose("rotary", backend, Features(x.device.type, x.dtype))
    return run(x, cos, sin)


def _reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = (table[:, None, None].to(wide_dtype(x.dtype)) for table in (cos, sin))             # [s, 1, 1, d/2]
    first, second = wide(x).chunk(2, dim=-1)                                                       # [s, b, heads, d/2]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _torch(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _reference(x, cos, sin) if torch.compiler.is_compiling() else _Rotary.apply(x, cos, sin)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, -sin), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x * (cos, cos) + swap(x) * (-sin, sin), swap exchanging a head's halves; on CPU in pieces of positions.

    Tables as wide as all heads let the products run over rows of heads * d elements instead of d/2, which is twice as fast.
    """
    if not eager_cpu(x):
        return _reference(x, cos, sin)
    s, b, heads, d = x.shape
    dtype = wide_dtype(x.dtype)
    cos = torch.cat((cos, cos), dim=-1).to(dtype).repeat(1, heads).unsqueeze(1)                    # [s, 1, heads * d]
    sin = torch.cat((-sin, sin), dim=-1).to(dtype).repeat(1, heads).unsqueeze(1)
    turned = torch.empty(s, b, heads, d, dtype=x.dtype)
    step = rows_in_cache(b * heads * d, _PIECE)
    for first in range(0, s, step):
        piece = slice(first, first + step)
        part = x[piece].to(dtype)
        target = turned[piece] if dtype == x.dtype else torch.empty_like(part, memory_format=torch.contiguous_format)
        halves, swapped = part.unflatten(-1, (2, d // 2)), target.view(*target.shape[:-1], 2, d // 2)
        swapped[..., 0, :] = halves[..., 1, :]
        swapped[..., 1, :] = halves[..., 0, :]
        target.flatten(2).mul_(sin[piece]).addcmul_(part.flatten(2), cos[piece])
        if target.dtype != x.dtype:
            turned[piece] = target
    return turned


register("rotary", torch=_torch, reference=_reference)

"""Rotary position embedding (Su et al., "RoFormer", 2021), of the first r dims of a head.

Pair j is (x[j], x[j + r/2]) in the half-split form of Llama and GPT-NeoX, or (x[2j], x[2j + 1]) interleaved, as in GPT-J; at
position p it is turned by the angle p * theta^(-2j/r). The backward pass is the rotation by the negative angle and keeps nothing
but the tables. No `liger` backend: its rope wants duplicated tables and contiguous [b, s, heads, d], which would be copied, and
overwrites the gradients that it is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalm.ops.dtypes import eager_cpu, rows_in_cache, wide, wide_dtype
from megalm.ops.installed import megalm_kernels
from megalm.ops.kernels import rotary as kernels
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


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, offset: int = 0, positions: Tensor | None = None,
           backend: str = "auto") -> Tensor:
    """Turn x [s, b, heads, d] by tables [places, r/2], r <= d: the first r dims; half-precision x is turned in fp32.

    interleaved: pairs are neighbours and not a dim of either half. The token at s has position offset + s, or offset +
    positions[s] or [s, b] (int64; for packed documents). One outside the tables is an error, or gives NaN (`megalm`).
    Raises ValueError for shapes that don't fit.
    """
    _check(tuple(x.shape), cos, sin, offset, positions)
    turn, _ = choose("rotary", backend, Features(x.device.type, x.dtype))[0]
    return turn(x, cos, sin, interleaved, offset, positions)


def rotary_qkv(qkv: Tensor, heads: int, groups: int, cos: Tensor, sin: Tensor, *, interleaved: bool = False, offset: int = 0,
               positions: Tensor | None = None, backend: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """Query [s, b, H, d] and key [s, b, G, d], turned as by `rotary`, and value [s, b, G, d] of qkv [s, b, (H + 2G) d].

    qkv is given up: `megalm` turns it in place where it can, and leaves it empty.
    """
    every = heads + 2 * groups
    if qkv.dim() != 3 or qkv.shape[-1] % every or qkv.shape[-1] == 0:
        raise ValueError(f"rotary_qkv of shape {tuple(qkv.shape)}: need [s, b, {every} d] for {heads} heads and {groups} groups; "
                         "one that was turned in place is empty")
    _check((*qkv.shape[:2], heads, qkv.shape[-1] // every), cos, sin, offset, positions)
    _, turn = choose("rotary", backend, Features(qkv.device.type, qkv.dtype))[0]
    return turn(qkv, heads, groups, cos, sin, interleaved, offset, positions)


def _check(shape: tuple[int, ...], cos: Tensor, sin: Tensor, offset: int, positions: Tensor | None) -> None:
    """Raises ValueError unless tables and positions fit x of this shape."""
    fits = len(shape) == 4 and cos.dim() == 2 and cos.shape == sin.shape and 2 * cos.shape[1] <= shape[3] and offset >= 0
    if not fits or positions is None and cos.shape[0] < offset + shape[0]:
        raise ValueError(f"rotary tables of shapes {tuple(cos.shape)} and {tuple(sin.shape)} don't fit x of shape {shape} at "
                         f"offset {offset}: need [s, b, heads, d] and [offset + s or more, r/2] with r <= d")
    if positions is not None and (positions.dtype != torch.int64 or positions.shape not in (shape[:1], shape[:2])):
        got = f"{positions.dtype} {tuple(positions.shape)}"
        raise ValueError(f"rotary positions are {got}; need int64 {shape[:1]} or {shape[:2]}")


def _angles(x: Tensor, table: Tensor, offset: int, positions: Tensor | None) -> Tensor:
    """A table's rows for the tokens of x: [s, r/2], or [s, b, r/2] where a sequence has positions of its own."""
    if positions is None:
        return table[offset:offset + x.shape[0]]
    return table.index_select(0, (positions + offset).flatten()).unflatten(0, positions.shape)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """By rows of the tables, as `_angles` gives them."""
    cos, sin = (table.unsqueeze(-2).to(wide_dtype(x.dtype)) for table in (cos, sin))              # [s, (b,) 1, r/2]
    if cos.dim() == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)                                              # [s, 1, 1, r/2]
    part, rest = x.split([2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], dim=-1)
    if interleaved:
        first, second = wide(part).unflatten(-1, (-1, 2)).unbind(-1)                               # [s, b, heads, r/2]
        turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)
    else:
        first, second = wide(part).chunk(2, dim=-1)                                                # [s, b, heads, r/2]
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    turned = turned.to(x.dtype)
    return turned if rest.shape[-1] == 0 else torch.cat((turned, rest), dim=-1)


def _reference(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, offset: int, positions: Tensor | None) -> Tensor:
    return _rotate(x, *(_angles(x, table, offset, positions) for table in (cos, sin)), interleaved)


def _torch(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, offset: int, positions: Tensor | None) -> Tensor:
    # One token, in generation, is not worth tables as wide as all heads, nor a node of autograd's.
    if torch.compiler.is_compiling() or x.shape[0] == 1 and not torch.is_grad_enabled():
        return _reference(x, cos, sin, interleaved, offset, positions)
    return _Rotary.apply(x, *(_angles(x, table, offset, positions) for table in (cos, sin)), interleaved)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, interleaved):
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _turn(x, cos, sin, interleaved)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, -sin, ctx.interleaved), None, None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x * (cos, cos) + swap(x) * (-sin, sin), swap exchanging a head's halves; on CPU in pieces of positions.

    Tables as wide as all heads let the products run over rows of heads * d elements instead of d/2, which is twice as fast.
    """
    s, b, heads, d = x.shape
    if not eager_cpu(x) or interleaved or cos.shape != (s, d // 2) or d % 2:
        return _rotate(x, cos, sin, interleaved)
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


def _split(turn: Callable) -> Callable:
    """rotary_qkv by a backend that turns one tensor."""

    def run(qkv: Tensor, heads: int, groups: int, *arguments) -> tuple[Tensor, Tensor, Tensor]:
        size = qkv.shape[-1] // (heads + 2 * groups)
        parts = qkv.split([heads * size, groups * size, groups * size], dim=-1)
        query, key, value = (part.unflatten(-1, (-1, size)) for part in parts)
        return turn(query, *arguments), turn(key, *arguments), value

    return run


register("rotary", {"megalm": megalm_kernels}, megalm=(kernels.rotary, kernels.rotary_qkv), torch=(_torch, _split(_torch)),
         reference=(_reference, _split(_reference)))

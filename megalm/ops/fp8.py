"""Attention in fp8 as the kernels of csrc define it (csrc/attention.h), in plain torch: to test them, and to try it on a CPU.

e4m3 has four bits of an exponent and three of a fraction, from 2^-6 (finer steps of 2^-9 below it) to 448. A rounding is off by
2^-4 of the number at most. So with q, k and v rounded, each score moves by at most about 2^-3 scale sum |q_i k_i|, each
probability by that as a factor, and each value and weight by 2^-4 of itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megalm.ops import library
from megalm.ops.dtypes import wide
from megalm.ops.registry import Features

MOST = 448.0
TILE = 128
"""Keys of a tile: the largest score so far, of which the exponentials are made, is that of whole tiles."""
LIFT = 2.0**8
"""What stands for the exponential of the largest score so far."""
_LEAST = 2.0**-48


def lacks(features: Features, known: Sequence[str]) -> str | None:
    """Why megalm's kernels can't serve a call in fp8 here, or None. known: the head dims that they have."""
    if features.dtype not in (torch.bfloat16, torch.float16) or not {*known} & {*features.traits}:
        return f"its fp8 takes bf16 and fp16 with {', '.join(known)}"
    if features.device == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0):
        major, minor = torch.cuda.get_device_capability()
        return f"its fp8 needs a Hopper GPU, compute capability 9.0; this one has {major}.{minor}"
    if features.device == "cuda" and "sm_90a" not in (library.about() or {}).get("targets", ()):
        return "the library has no code for sm_90a, which its fp8 needs; `make kernels` builds it"
    return None


def rounded(x: Tensor) -> Tensor:
    """x [s, b, heads, d], each head of each batch entry in units of the least power of two that leaves it within 448, as e4m3
    and back. A power of two divides exactly, and loses nothing against another unit: the precision of e4m3 is relative."""
    largest = x.detach().abs().amax((0, 3), keepdim=True).clamp(min=_LEAST)
    fraction = torch.frexp(largest).mantissa                                   # in [1/2, 1)
    unit = largest / fraction / torch.where(fraction <= MOST / 512, 512.0, 256.0).to(x.dtype)
    return _nearest(x / unit) * unit


def _nearest(x: Tensor) -> Tensor:
    return x.to(torch.float8_e4m3fn).to(x.dtype)


def emulated(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scores: Callable[[Tensor, Tensor], Tensor],
             context: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """([b, H, s, e], lse [b, H, s]) of attention in fp8, in fp32 or wider, with the gradient that the kernels have: that of the
    unrounded q, k and v, with probabilities exp(score - lse) by the lse of the forward pass.

    In float64, which other precisions are held to, exponentials are not rounded: which of two neighbours one becomes is a matter
    of the last bit of fp32.

    scores: q and k -> [b, H, s, s_k]; context: probabilities and v -> [b, H, s, e].
    """
    with torch.no_grad():
        out, lse = _forward(*(rounded(wide(x)) for x in (q, k, v)), sinks, scores, context)
    finite = torch.where(lse == -torch.inf, 0.0, lse)
    probabilities = torch.exp(scores(q, k) - finite[..., None])
    mass = probabilities.sum(-1)                                               # 1, but for what rounding q and k has changed
    if sinks is not None:
        mass = mass + torch.exp(wide(sinks)[None, :, None] - lse)
    # d out / d score = p (v - out) and d lse / d score = p, both through terms that add nothing to the values.
    slope = context(probabilities, v) - mass[..., None] * out
    return out + (slope - slope.detach()), lse + (mass - mass.detach())


def _forward(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scores: Callable[[Tensor, Tensor], Tensor],
             context: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Of the rounded q, k and v."""
    found = scores(q, k)
    keys = found.shape[-1]
    tiles = F.pad(found, (0, -keys % TILE), value=-torch.inf).unflatten(-1, (-1, TILE))
    largest = tiles.amax(-1).cummax(-1).values                                 # [b, H, s, tiles], so far
    top = largest[..., -1:]
    top = torch.where(top == -torch.inf, 0.0, top)
    weights = torch.exp(tiles - torch.where(largest == -torch.inf, 0.0, largest)[..., None])
    later = torch.exp(largest - top)[..., None]                                # scales a tile's to the last largest
    lse = (weights * later).sum((-1, -2)).log() + top[..., 0]
    if sinks is not None:
        lse = torch.logaddexp(lse, wide(sinks)[None, :, None].expand_as(lse))
    if weights.dtype != torch.float64:
        weights = _nearest(weights * LIFT) / LIFT
    weights = (weights * later).flatten(-2)[..., :keys]
    share = torch.exp(top - lse[..., None])
    return context(weights, v) * torch.where(lse[..., None] == -torch.inf, 0.0, share), lse

"""Dropout with a keyed mask: regenerated in the backward pass, never stored, and the same under every layout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalm.ops.random import DropoutKey, keep_mask, threshold


def dropout(x: Tensor, key: DropoutKey, samples: Tensor, extents: Sequence[tuple[int, int, int]], probability: float, *,
            batch_dim: int = 1) -> Tensor:
    """x with a share `probability` of its elements zeroed and the others scaled by 1 / (1 - probability).

    x: its dim `batch_dim` is the batch and the others are one sample's local slice in order, [s/tp, b, h] by default.
    samples: int64 [b], global sample indices; extents: (start, stop, full) of each of the other dims (ops/random.py, keep_mask).
    Raises ValueError for a probability outside [0, 1) or extents that don't fit x.
    """
    threshold(probability)
    local = [stop - start for start, stop, _ in extents]
    local.insert(batch_dim, samples.shape[0])
    if list(x.shape) != local:
        raise ValueError(f"dropout of x with shape {tuple(x.shape)}: samples and extents describe {tuple(local)}")
    if probability == 0.0:
        return x
    return _Dropout.apply(x, key, samples, extents, probability, batch_dim)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, key, samples, extents, probability, batch_dim):
        ctx.arguments = key, samples, extents, probability, batch_dim
        return _apply(x, *ctx.arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _apply(grad, *ctx.arguments), None, None, None, None, None


def _apply(x: Tensor, key, samples, extents, probability: float, batch_dim: int) -> Tensor:
    mask = keep_mask(key, samples, extents, probability, x.device)            # [b, *local]
    # Zeroing is exact and the scale is a scalar, applied in fp32: a scale rounded to bf16 would be 0.2% off for every element.
    return torch.mul(x, mask.movedim(0, batch_dim).to(x.dtype)).mul_(1.0 / (1.0 - probability))

"""Dropout with a keyed mask: regenerated in the backward pass, never stored, and the same under every layout.

    dropout(x)                    x with a share of its elements zeroed and the others scaled
    bias_dropout_add(x, b, r)     r + dropout(x + b), one pass over memory where the backend fuses it
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalm.ops.dtypes import wide
from megalm.ops.installed import megalm_kernels
from megalm.ops.kernels import dropout as kernels
from megalm.ops.random import DropoutKey, keep_mask, threshold
from megalm.ops.registry import Features, choose, register


def dropout(x: Tensor, key: DropoutKey, samples: Tensor, extents: Sequence[tuple[int, int, int]], probability: float, *,
            batch_dim: int = 1) -> Tensor:
    """x with a share `probability` of its elements zeroed and the others scaled by 1 / (1 - probability).

    x: its dim `batch_dim` is the batch and the others are one sample's local slice in order, [s/tp, b, h] by default.
    samples: int64 [b], global sample indices; extents: (start, stop, full) of each of the other dims (ops/random.py, keep_mask).
    Raises ValueError for a probability outside [0, 1) or extents that don't fit x.
    """
    _check(x, samples, extents, probability, batch_dim)
    if probability == 0.0:
        return x
    return _Dropout.apply(x, key, samples, extents, probability, batch_dim)


def bias_dropout_add(x: Tensor, bias: Tensor | None, residual: Tensor | None, key: DropoutKey, samples: Tensor,
                     extents: Sequence[tuple[int, int, int]], probability: float, *, backend: str = "auto") -> Tensor:
    """residual + dropout(x + bias): x and residual [s/tp, b, h], bias [h]; without a bias or a residual it is left out.

    samples: int64 [b], global sample indices, best where x is. extents: (start, stop, full) of a sample's positions and of its
    width, which no rank splits. Raises ValueError for a probability outside [0, 1), extents that don't fit x or split its width,
    or a backend that can't serve.
    """
    _check(x, samples, extents, probability, 1)
    if len(extents) != 2 or tuple(extents[1]) != (0, x.shape[2], x.shape[2]):
        raise ValueError(f"extents {list(extents)} of hidden states [s, b, h]: need two, of the positions and of a whole width")
    run = choose("dropout", backend, Features(x.device.type, x.dtype))[0]
    return run(x, bias, residual, key, samples, extents, probability)


def _check(x: Tensor, samples: Tensor, extents: Sequence[tuple[int, int, int]], probability: float, batch_dim: int) -> None:
    threshold(probability)
    local = [stop - start for start, stop, _ in extents]
    local.insert(batch_dim, samples.shape[0])
    if list(x.shape) != local:
        raise ValueError(f"dropout of x with shape {tuple(x.shape)}: samples and extents describe {tuple(local)}")


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


def _reference(x, bias, residual, key, samples, extents, probability: float) -> Tensor:
    y = wide(x) if bias is None else wide(x) + wide(bias)
    if probability > 0.0:
        keep = keep_mask(key, samples, extents, probability, x.device).transpose(0, 1)  # [b, s, h] -> [s, b, h]
        y = torch.where(keep, y / (1.0 - probability), 0.0)
    return (y if residual is None else wide(residual) + y).to(x.dtype)


def _torch(x, bias, residual, key, samples, extents, probability: float) -> Tensor:
    y = dropout(x if bias is None else x + bias, key, samples, extents, probability)
    return y if residual is None else residual + y


def _megalm(x, bias, residual, key, samples, extents, probability: float) -> Tensor:
    start, stop, full = extents[0]
    if not 0 <= start <= stop <= full:
        raise ValueError(f"dropout extent {extents[0]}: need 0 <= start <= stop <= full")
    return kernels.bias_dropout_add(x, bias, residual, key, samples, start, probability)


register("dropout", {"megalm": megalm_kernels}, megalm=_megalm, torch=_torch, reference=_reference)

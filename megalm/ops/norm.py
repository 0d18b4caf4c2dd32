"""LayerNorm (Ba, Kiros, Hinton, 2016) and RMSNorm (Zhang, Sennrich, 2019) over the last dim.

    layer_norm   y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias
    rms_norm     y = x / sqrt(mean(x^2) + eps) * weight

`add_norm` normalises the sum of x and a residual, which it returns too: one pass over memory where the backend fuses them.
Memory: the backward pass keeps x (or the sum) and one fp32 number a row (two for layer_norm).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalm.ops.dtypes import eager_cpu, rows_in_cache, wide, wide_dtype
from megalm.ops.installed import megalm_kernels, package
from megalm.ops.kernels import norm as kernels
from megalm.ops.registry import Features, choose, register

LAYER_NORM = "layer_norm"
RMS_NORM = "rms_norm"
# One pass over fp32 rows needs no temporaries beside its output, so that longer pieces still stay in the cache.
_PIECE_FULL = 1 << 18
_PIECE_HALF = 1 << 17


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, kind: str = LAYER_NORM, backend: str = "auto") -> Tensor:
    """Normalise x [..., h] with weight [h] (and bias [h] or None, layer_norm only); the result has x's shape and dtype.

    Statistics are fp32 for half-precision x. Raises ValueError for an unknown kind, an rms_norm with a bias, or a backend that
    can't serve.
    """
    return _chosen(x, bias, kind, backend)(x, None, weight, bias, eps, kind)


def add_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, kind: str = LAYER_NORM,
             backend: str = "auto") -> tuple[Tensor, Tensor]:
    """(norm(x + residual), x + residual): x and residual [..., h], otherwise as `norm`."""
    return _chosen(x, bias, kind, backend)(x, residual, weight, bias, eps, kind)


def _chosen(x: Tensor, bias: Tensor | None, kind: str, backend: str) -> Callable:
    if kind not in (LAYER_NORM, RMS_NORM):
        raise ValueError(f"norm kind is {kind!r}; it can be {LAYER_NORM} or {RMS_NORM}")
    if bias is not None and kind == RMS_NORM:
        raise ValueError("rms_norm has no bias")
    return choose("norm", backend, Features(x.device.type, x.dtype, (kind,)))[0]


def _after_sum(run: Callable) -> Callable:
    """A backend from run(x, weight, bias, eps, kind), which knows nothing of residuals."""

    def with_residual(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, kind: str):
        if residual is None:
            return run(x, weight, bias, eps, kind)
        total = x + residual
        return run(total, weight, bias, eps, kind), total

    return with_residual


def _reference(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, kind: str) -> Tensor:
    y = wide(x)
    if kind == LAYER_NORM:
        y = y - y.mean(-1, keepdim=True)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * wide(weight)
    return (y if bias is None else y + wide(bias)).to(x.dtype)


def _torch(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, kind: str) -> Tensor:
    if kind == LAYER_NORM:
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    if eager_cpu(x):
        return _RMSNorm.apply(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """RMSNorm in pieces of rows: on CPU F.rms_norm is a chain of operations whose backward takes three times as long."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        width, dtype = x.shape[-1], wide_dtype(x.dtype)
        rows = x.reshape(-1, width)                                           # [..., h] -> [n, h]
        y = torch.empty(rows.shape, dtype=x.dtype)
        inverse = torch.empty(rows.shape[0], 1, dtype=dtype)                  # 1 / rms of each row
        for piece in _pieces(rows):
            part, part_inverse = rows[piece].to(dtype), inverse[piece]
            torch.linalg.vector_norm(part, dim=-1, keepdim=True, out=part_inverse)
            part_inverse.square_().div_(width).add_(eps).rsqrt_()
            target = y[piece] if dtype == x.dtype else part
            torch.mul(part, part_inverse, out=target).mul_(weight)
            if target is part:
                y[piece] = part
        ctx.save_for_backward(x, weight, inverse)
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        # With r = 1 / rms and g the gradient of y:  dx = r g w - x r^3 mean(g w x),  dw = sum over rows of g x r.
        x, weight, inverse = ctx.saved_tensors
        width, dtype = x.shape[-1], wide_dtype(x.dtype)
        rows, grads, wide_weight = x.reshape(-1, width), grad.reshape(-1, width), weight.to(dtype)
        grad_x = torch.empty(rows.shape, dtype=x.dtype)
        grad_weight = torch.zeros(1, width, dtype=dtype)
        for piece in _pieces(rows):
            part, part_grad, r = rows[piece].to(dtype), grads[piece].to(dtype), inverse[piece]
            work = grad_x[piece] if dtype == x.dtype else torch.empty_like(part)
            torch.mul(part_grad, part, out=work)                              # g x
            grad_weight.addmm_(r.t(), work)                                   # [1, n] [n, h]
            slope = torch.mv(work, wide_weight).unsqueeze(1)                  # [n, 1], sum of g w x
            slope.mul_(r).mul_(r).mul_(r).div_(-width)
            torch.mul(part_grad, wide_weight, out=work).mul_(r).addcmul_(part, slope)
            if dtype != x.dtype:
                grad_x[piece] = work
        return grad_x.view(x.shape), grad_weight.view(width).to(weight.dtype), None


def _pieces(rows: Tensor) -> list[slice]:
    elements = _PIECE_FULL if rows.dtype == wide_dtype(rows.dtype) else _PIECE_HALF
    step = rows_in_cache(rows.shape[1], elements)
    return [slice(first, first + step) for first in range(0, rows.shape[0], step)]


def _apex(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, kind: str) -> Tensor:
    from apex.normalization import fused_layer_norm as apex

    if kind == RMS_NORM:
        return apex.fused_rms_norm_affine(x, weight, weight.shape, eps)
    bias = torch.zeros_like(weight) if bias is None else bias
    return apex.fused_layer_norm_affine(x, weight, bias, weight.shape, eps)


def _liger(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, kind: str) -> Tensor:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    if kind == RMS_NORM:
        return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "gemma", False)  # "gemma": fp32 throughout; never in place
    return LigerLayerNormFunction.apply(x, weight, torch.zeros_like(weight) if bias is None else bias, eps)


register("norm", {"megalm": megalm_kernels, "apex": package("NVIDIA apex", "fused_layer_norm_cuda"),
                  "liger": package("liger_kernel", "liger_kernel.ops")},
         megalm=kernels.norm, torch=_after_sum(_torch), apex=_after_sum(_apex), liger=_after_sum(_liger),
         reference=_after_sum(_reference))

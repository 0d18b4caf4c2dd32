"""Scaled masked softmax by csrc/softmax_forward.cu and csrc/softmax_backward.cu.

Memory: the backward pass keeps the probabilities, in the dtype of the scores, and no mask.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalm.ops.library import Operation, check_dtypes, define, dtype_code

_FORWARD = Operation("softmax_forward", pointers="x mask y", int64="batch heads queries keys mask_b mask_h mask_q",
                     float64="scale", int32="causal dtype")
_BACKWARD = Operation("softmax_backward", pointers="grad_y y grad_x", int64="batch heads queries keys", float64="scale",
                      int32="causal dtype")


def _empty_forward(x: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _forward(x: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    y = _empty_forward(x, mask, scale, causal)
    if x.numel() == 0:
        return y
    x, strides = x.contiguous(), (0, 0, 0)
    if mask is not None:
        if mask.device != x.device:
            raise ValueError(f"the mask is on {mask.device}; it must be on {x.device}")
        mask = mask if mask.shape[3] == x.shape[3] else mask.expand(*mask.shape[:3], x.shape[3])
        mask = mask if mask.stride(3) == 1 else mask.contiguous()
        strides = (0 if size == 1 else stride for size, stride in zip(mask.shape[:3], mask.stride()[:3], strict=True))
    mask_b, mask_h, mask_q = strides
    batch, heads, queries, keys = x.shape
    _FORWARD(x.device, x=x, mask=mask, y=y, batch=batch, heads=heads, queries=queries, keys=keys, mask_b=mask_b, mask_h=mask_h,
             mask_q=mask_q, scale=scale, causal=causal, dtype=dtype_code(x))
    return y


def _empty_backward(grad_y: Tensor, y: Tensor, scale: float, causal: bool) -> Tensor:
    return torch.empty_like(y)


def _backward(grad_y: Tensor, y: Tensor, scale: float, causal: bool) -> Tensor:
    check_dtypes(y, grad_y=grad_y)
    grad_x = torch.empty_like(y)
    if y.numel():
        batch, heads, queries, keys = y.shape
        _BACKWARD(y.device, grad_y=grad_y.contiguous(), y=y, grad_x=grad_x, batch=batch, heads=heads, queries=queries, keys=keys,
                  scale=scale, causal=causal, dtype=dtype_code(y))
    return grad_x


softmax_forward = define("softmax_forward(Tensor x, Tensor? mask, float scale, bool causal) -> Tensor", _forward, _empty_forward)
softmax_backward = define("softmax_backward(Tensor grad_y, Tensor y, float scale, bool causal) -> Tensor", _backward,
                          _empty_backward)


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, causal, mask):
        y = softmax_forward(x, mask, scale, causal)
        ctx.save_for_backward(y)
        ctx.arguments = scale, causal
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        return softmax_backward(grad_y, *ctx.saved_tensors, *ctx.arguments), None, None, None


def softmax(x: Tensor, scale: float, causal: bool, mask: Tensor | None) -> Tensor:
    """The backend of ops/softmax.py."""
    return _Softmax.apply(x, scale, causal, mask)

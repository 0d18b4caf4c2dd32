"""LayerNorm and RMSNorm by csrc/norm_forward.cu and csrc/norm_backward.cu.

Memory: the backward pass keeps the (summed) input and one fp32 number a row, two for layer_norm.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalm.ops.dtypes import wide_dtype
from megalm.ops.library import Operation, check_dtypes, define, dtype_code, two_strides

_FORWARD = Operation("norm_forward", pointers="x residual weight bias y sum mean rstd",
                     int64="rows width inner outer_stride inner_stride", float64="eps", int32="layer_norm dtype")
_BACKWARD = Operation("norm_backward", pointers="grad_y grad_sum sum weight mean rstd grad_x partial grad_weight grad_bias",
                      int64="rows width inner outer_stride inner_stride blocks", int32="layer_norm dtype")


def _empty_forward(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, layer_norm: bool):
    rows = x.numel() // x.shape[-1]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = x.new_empty(0) if residual is None else torch.empty_like(y)
    mean, rstd = (x.new_empty(size, dtype=wide_dtype(x.dtype)) for size in (rows if layer_norm else 0, rows))
    return y, total, mean, rstd


def _forward(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, layer_norm: bool):
    check_dtypes(x, residual=residual, weight=weight, bias=bias)
    width = x.shape[-1]
    if residual is not None and residual.shape != x.shape or any(v is not None and v.shape != (width,) for v in (weight, bias)):
        raise ValueError(f"norm of x {tuple(x.shape)}: the residual must have its shape, weight and bias be [{width}]")
    results = y, total, mean, rstd = _empty_forward(x, residual, weight, bias, eps, layer_norm)
    if x.numel() == 0:
        return results
    x, inner, outer_stride, inner_stride = two_strides(x)
    residual, weight, bias = (None if t is None else t.contiguous() for t in (residual, weight, bias))
    _FORWARD(x.device, x=x, residual=residual, weight=weight, bias=bias, y=y, sum=None if residual is None else total,
             mean=mean if layer_norm else None, rstd=rstd, rows=rstd.numel(), width=width, inner=inner, outer_stride=outer_stride,
             inner_stride=inner_stride, eps=eps, layer_norm=layer_norm, dtype=dtype_code(x))
    return results


def _empty_backward(grad_y: Tensor, grad_sum: Tensor | None, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor,
                    layer_norm: bool):
    return torch.empty_like(grad_y, memory_format=torch.contiguous_format), torch.empty_like(weight), weight.new_empty(
        weight.shape if layer_norm else 0)


def _backward(grad_y: Tensor, grad_sum: Tensor | None, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor,
              layer_norm: bool):
    check_dtypes(total, grad_y=grad_y, grad_sum=grad_sum, weight=weight)
    results = grad_x, grad_weight, grad_bias = _empty_backward(grad_y, grad_sum, total, weight, mean, rstd, layer_norm)
    if grad_y.numel() == 0:
        return grad_x, grad_weight.zero_(), grad_bias.zero_()
    total, inner, outer_stride, inner_stride = two_strides(total)
    grad_y, grad_sum, weight = (None if t is None else t.contiguous() for t in (grad_y, grad_sum, weight))
    width = total.shape[-1]
    values = dict(grad_y=grad_y, grad_sum=grad_sum, sum=total, weight=weight, mean=mean if layer_norm else None, rstd=rstd,
                  grad_x=grad_x, grad_weight=grad_weight, grad_bias=grad_bias if layer_norm else None, rows=rstd.numel(),
                  width=width, inner=inner, outer_stride=outer_stride, inner_stride=inner_stride, layer_norm=layer_norm,
                  dtype=dtype_code(total))
    blocks = _BACKWARD.count("blocks", total.device, partial=None, blocks=0, **values)
    partial = rstd.new_empty(1 + layer_norm, blocks, width)
    _BACKWARD(total.device, partial=partial, blocks=blocks, **values)
    return results


norm_forward = define("norm_forward(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps, bool layer_norm)"
                      " -> (Tensor y, Tensor sum, Tensor mean, Tensor rstd)", _forward, _empty_forward)
norm_backward = define("norm_backward(Tensor grad_y, Tensor? grad_sum, Tensor sum, Tensor weight, Tensor mean, Tensor rstd,"
                       " bool layer_norm) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)", _backward, _empty_backward)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps, layer_norm):
        y, total, mean, rstd = norm_forward(x, residual, weight, bias, eps, layer_norm)
        ctx.layer_norm, ctx.has_bias = layer_norm, bias is not None
        ctx.save_for_backward(x if residual is None else total, weight, mean, rstd)
        ctx.set_materialize_grads(False)
        return y if residual is None else (y, total)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_sum=None):
        total, weight, mean, rstd = ctx.saved_tensors
        if grad_y is None:  # only the sum was used
            grad_y = torch.zeros_like(total)
        grad_x, grad_weight, grad_bias = norm_backward(grad_y, grad_sum, total, weight, mean, rstd, ctx.layer_norm)
        return grad_x, grad_x if ctx.needs_input_grad[1] else None, grad_weight, grad_bias if ctx.has_bias else None, None, None


def norm(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, kind: str):
    """The backend of ops/norm.py."""
    return _Norm.apply(x, residual, weight, bias, eps, kind == "layer_norm")

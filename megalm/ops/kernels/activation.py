"""swiglu, geglu and gelu with a bias by csrc/activation_forward.cu and csrc/activation_backward.cu.

Memory: the backward pass keeps the input (and the bias).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalm.ops.dtypes import wide_dtype
from megalm.ops.library import Operation, check_dtypes, define, dtype_code, two_strides

_FORWARD = Operation("activation_forward", pointers="x bias y", int64="rows width inner outer_stride inner_stride",
                     int32="activation dtype")
_BACKWARD = Operation("activation_backward", pointers="grad_y x bias grad_x partial grad_bias",
                      int64="rows width inner outer_stride inner_stride blocks", int32="activation dtype")

_CODES = {"swiglu": 0, "geglu": 1, "gelu": 2}
"""enum megalm_activation of csrc/activation.h."""


def _width(x: Tensor, activation: str) -> int:
    return x.shape[-1] if activation == "gelu" else x.shape[-1] // 2


def _empty_forward(x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], _width(x, activation))


def _forward(x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    check_dtypes(x, bias=bias)
    _check_bias(x, bias)
    y, width = _empty_forward(x, bias, activation), _width(x, activation)
    if y.numel() == 0:
        return y
    x, inner, outer_stride, inner_stride = two_strides(x)
    bias = None if bias is None else bias.contiguous()
    _FORWARD(x.device, x=x, bias=bias, y=y, rows=y.numel() // width, width=width, inner=inner, outer_stride=outer_stride,
             inner_stride=inner_stride, activation=_CODES[activation], dtype=dtype_code(x))
    return y


def _check_bias(x: Tensor, bias: Tensor | None) -> None:
    if bias is not None and bias.shape != x.shape[-1:]:
        raise ValueError(f"gelu of x {tuple(x.shape)}: the bias must be [{x.shape[-1]}], not {list(bias.shape)}")


def _empty_backward(grad: Tensor, x: Tensor, bias: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(0 if bias is None else bias.shape)


def _backward(grad: Tensor, x: Tensor, bias: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    check_dtypes(x, grad=grad, bias=bias)
    results = grad_x, grad_bias = _empty_backward(grad, x, bias, activation)
    if grad.numel() == 0:
        return grad_x, grad_bias.zero_()
    x, inner, outer_stride, inner_stride = two_strides(x)
    grad, bias, width = grad.contiguous(), None if bias is None else bias.contiguous(), _width(x, activation)
    values = dict(grad_y=grad, x=x, bias=bias, grad_x=grad_x, grad_bias=None if bias is None else grad_bias,
                  rows=grad.numel() // width, width=width, inner=inner, outer_stride=outer_stride, inner_stride=inner_stride,
                  activation=_CODES[activation], dtype=dtype_code(x))
    blocks, partial = 0, None
    if bias is not None:
        blocks = _BACKWARD.count("blocks", x.device, partial=None, blocks=0, **values)
        partial = x.new_empty(blocks, width, dtype=wide_dtype(x.dtype))
    _BACKWARD(x.device, partial=partial, blocks=blocks, **values)
    return results


activation_forward = define("activation_forward(Tensor x, Tensor? bias, str activation) -> Tensor", _forward, _empty_forward)
activation_backward = define("activation_backward(Tensor grad, Tensor x, Tensor? bias, str activation)"
                             " -> (Tensor grad_x, Tensor grad_bias)", _backward, _empty_backward)


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, activation):
        ctx.activation = activation
        ctx.save_for_backward(x, bias)
        return activation_forward(x, bias, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, bias = ctx.saved_tensors
        grad_x, grad_bias = activation_backward(grad, x, bias, ctx.activation)
        return grad_x, None if bias is None else grad_bias, None


def gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    """A backend of ops/activation.py, as the others here."""
    return _Activation.apply(x, bias, "gelu")


def swiglu(gate_up: Tensor) -> Tensor:
    return _Activation.apply(gate_up, None, "swiglu")


def geglu(gate_up: Tensor) -> Tensor:
    return _Activation.apply(gate_up, None, "geglu")

"""residual + dropout(x + bias) by csrc/dropout_forward.cu and csrc/dropout_backward.cu.

Memory: the backward pass keeps nothing but the key and the sample indices: the mask is drawn again.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalm.ops.dtypes import wide_dtype
from megalm.ops.library import Operation, check_dtypes, define, dtype_code
from megalm.ops.random import DropoutKey, dropout_words, threshold

_FORWARD = Operation("dropout_forward", pointers="x bias residual samples out", int64="rows width batch start", float64="scale",
                     uint32="key0 key1 threshold")
_BACKWARD = Operation("dropout_backward", pointers="grad samples grad_x partial grad_bias",
                      int64="rows width batch start blocks", float64="scale", uint32="key0 key1 threshold")


def _mask(x: Tensor, samples: Tensor, seed: int, step: Tensor, layer: Tensor, op: int, start: int, probability: float) -> dict:
    """What both directions tell their kernel of the mask and of x [s, b, h]."""
    if x.dim() != 3 or samples.shape != x.shape[1:2]:
        raise ValueError(f"dropout of x {tuple(x.shape)}: it must be [s, b, h] and have b samples, not {tuple(samples.shape)}")
    key0, key1 = dropout_words(DropoutKey(seed, int(step), int(layer), op))
    s, batch, width = x.shape
    return dict(samples=samples.to(device=x.device, dtype=torch.int64).contiguous(), rows=s * batch, width=width, batch=batch,
                start=start, scale=1.0 / (1.0 - probability), key0=key0, key1=key1, threshold=threshold(probability),
                dtype=dtype_code(x))


def _empty_forward(x: Tensor, bias: Tensor | None, residual: Tensor | None, samples: Tensor, seed: int, step: Tensor,
                   layer: Tensor, op: int, start: int, probability: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _forward(x: Tensor, bias: Tensor | None, residual: Tensor | None, samples: Tensor, seed: int, step: Tensor, layer: Tensor,
             op: int, start: int, probability: float) -> Tensor:
    check_dtypes(x, bias=bias, residual=residual)
    if residual is not None and residual.shape != x.shape or bias is not None and bias.shape != x.shape[-1:]:
        raise ValueError(f"dropout of x {tuple(x.shape)}: the residual must have its shape, the bias be [{x.shape[-1]}]")
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    mask = _mask(x, samples, seed, step, layer, op, start, probability)
    if x.numel() == 0:
        return out
    x, bias, residual = (None if t is None else t.contiguous() for t in (x, bias, residual))
    _FORWARD(x.device, x=x, bias=bias, residual=residual, out=out, **mask)
    return out


def _empty_backward(grad: Tensor, samples: Tensor, seed: int, step: Tensor, layer: Tensor, op: int, start: int,
                    probability: float, bias: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(grad, memory_format=torch.contiguous_format), grad.new_empty(grad.shape[-1] if bias else 0)


def _backward(grad: Tensor, samples: Tensor, seed: int, step: Tensor, layer: Tensor, op: int, start: int, probability: float,
              bias: bool) -> tuple[Tensor, Tensor]:
    results = grad_x, grad_bias = _empty_backward(grad, samples, seed, step, layer, op, start, probability, bias)
    if grad.numel() == 0:
        return grad_x, grad_bias.zero_()
    grad = grad.contiguous()
    values = dict(grad=grad, grad_x=grad_x, grad_bias=grad_bias if bias else None,
                  **_mask(grad, samples, seed, step, layer, op, start, probability))
    blocks, partial = 0, None
    if bias:
        blocks = _BACKWARD.count("blocks", grad.device, partial=None, blocks=0, **values)
        partial = grad.new_empty(blocks, grad.shape[-1], dtype=wide_dtype(grad.dtype))
    _BACKWARD(grad.device, partial=partial, blocks=blocks, **values)
    return results


_KEY = "Tensor samples, int seed, Tensor step, Tensor layer, int op, SymInt start, float probability"
dropout_forward = define(f"dropout_forward(Tensor x, Tensor? bias, Tensor? residual, {_KEY}) -> Tensor", _forward, _empty_forward)
dropout_backward = define(f"dropout_backward(Tensor grad, {_KEY}, bool bias) -> (Tensor grad_x, Tensor grad_bias)", _backward,
                          _empty_backward)


class _BiasDropoutAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, residual, *mask):
        ctx.mask, ctx.has_bias = mask, bias is not None
        return dropout_forward(x, bias, residual, *mask)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        *_, probability = ctx.mask
        if probability == 0.0 and not ctx.has_bias:
            grad_x, grad_bias = grad, None
        else:
            grad_x, grad_bias = dropout_backward(grad, *ctx.mask, ctx.has_bias)
        return grad_x, grad_bias if ctx.has_bias else None, grad if ctx.needs_input_grad[2] else None, *[None] * len(ctx.mask)


def bias_dropout_add(x: Tensor, bias: Tensor | None, residual: Tensor | None, key: DropoutKey, samples: Tensor, start: int,
                     probability: float) -> Tensor:
    """A backend of ops/dropout.py."""
    # Tensors where compiled code gives tensors, so that it serves every step and layer.
    step, layer = torch.as_tensor(key.step), torch.as_tensor(key.layer)
    return _BiasDropoutAdd.apply(x, bias, residual, samples, key.seed, step, layer, key.op, start, probability)

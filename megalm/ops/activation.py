"""The activations of the feed-forward block.

    gelu     0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))   (Hendrycks, Gimpel, 2016, the tanh form of GPT-2 and Megatron-LM)
    swiglu   silu(gate) * up,  silu(x) = x sigmoid(x)            (Shazeer, "GLU variants improve Transformer", 2020)

Memory: the backward pass of swiglu keeps gate_up; on CPU also silu(gate), since reading it costs less than an exponential there.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalm.ops.dtypes import eager_cpu, rows_in_cache, wide
from megalm.ops.registry import Features, choose, register


def gelu(x: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """gelu(x + bias) in the tanh form: x [..., f], bias [f] -> [..., f]."""
    gelu_, _ = choose("activation", backend, Features(x.device.type, x.dtype, ("gelu",)))[0]
    return gelu_(x if bias is None else x + bias)


def swiglu(gate_up: Tensor, *, backend: str = "auto") -> Tensor:
    """silu(gate) * up: gate_up [..., 2f], the gate in its first half -> [..., f]. Raises ValueError for an odd last dim."""
    if gate_up.shape[-1] % 2:
        raise ValueError(f"swiglu takes gate and up side by side, an even last dim, not {gate_up.shape[-1]}")
    _, swiglu_ = choose("activation", backend, Features(gate_up.device.type, gate_up.dtype, ("swiglu",)))[0]
    return swiglu_(gate_up)


def _reference_gelu(x: Tensor) -> Tensor:
    y = wide(x)
    return (0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))).to(x.dtype)


def _reference_swiglu(gate_up: Tensor) -> Tensor:
    gate, up = wide(gate_up).chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up).to(gate_up.dtype)


def _torch_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _torch_swiglu(gate_up: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up
    return _SwiGLU.apply(gate_up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        silu = F.silu(gate)
        if eager_cpu(gate_up) and ctx.needs_input_grad[0]:
            ctx.save_for_backward(gate_up, silu)
            return silu * up
        ctx.save_for_backward(gate_up)
        return silu.mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate_up, *kept = ctx.saved_tensors
        width = grad.shape[-1]
        rows, grads = gate_up.reshape(-1, 2 * width), grad.reshape(-1, width)   # [n, 2f], [n, f]
        result = torch.empty_like(rows, memory_format=torch.contiguous_format)
        step = rows_in_cache(width) if eager_cpu(rows) else max(1, rows.shape[0])
        for first in range(0, rows.shape[0], step):
            piece = slice(first, first + step)
            gate, up = rows[piece].chunk(2, dim=-1)
            grad_gate, grad_up = result[piece].chunk(2, dim=-1)
            silu = kept[0].reshape(-1, width)[piece] if kept else F.silu(gate)
            torch.mul(silu, grads[piece], out=grad_up)
            grad_silu = torch.mul(grads[piece], up, out=None if kept else silu)
            torch.ops.aten.silu_backward.grad_input(grad_silu, gate, grad_input=grad_gate)
        return result.view(gate_up.shape)


register("activation", torch=(_torch_gelu, _torch_swiglu), reference=(_reference_gelu, _reference_swiglu))

"""The activations of the feed-forward block.

    gelu     0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))   (Hendrycks, Gimpel, 2016, the tanh form of GPT-2 and Megatron-LM)
    gelu_exact  x/2 (1 + erf(x / sqrt 2))                        (the same paper's own form)
    swiglu   silu(gate) * up,  silu(x) = x sigmoid(x)            (Shazeer, "GLU variants improve Transformer", 2020)
    geglu    gelu(gate) * up                                     (the same)

Memory: the backward pass keeps the input; on CPU swiglu and geglu keep silu(gate) or gelu(gate) too, since reading it costs less
than an exponential there.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalm.ops.dtypes import eager_cpu, rows_in_cache, wide
from megalm.ops.installed import megalm_kernels, package
from megalm.ops.kernels import activation as kernels
from megalm.ops.registry import Features, choose, register


def gelu(x: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """gelu(x + bias) in the tanh form: x [..., f], bias [f] -> [..., f]."""
    gelu_, *_ = choose("activation", backend, Features(x.device.type, x.dtype, ("gelu",)))[0]
    return gelu_(x, bias)


def gelu_exact(x: Tensor, *, backend: str = "auto") -> Tensor:
    """x/2 (1 + erf(x / sqrt 2)): x [..., f] -> [..., f]."""
    *_, exact = choose("activation", backend, Features(x.device.type, x.dtype, ("gelu_exact",)))[0]
    return exact(x)


def swiglu(gate_up: Tensor, *, backend: str = "auto") -> Tensor:
    """silu(gate) * up: gate_up [..., 2f], the gate in its first half -> [..., f]. Raises ValueError for an odd last dim."""
    _check_gated("swiglu", gate_up)
    _, swiglu_, *_ = choose("activation", backend, Features(gate_up.device.type, gate_up.dtype, ("swiglu",)))[0]
    return swiglu_(gate_up)


def geglu(gate_up: Tensor, *, backend: str = "auto") -> Tensor:
    """gelu(gate) * up in the tanh form, otherwise as `swiglu`."""
    _check_gated("geglu", gate_up)
    _, _, geglu_, _ = choose("activation", backend, Features(gate_up.device.type, gate_up.dtype, ("geglu",)))[0]
    return geglu_(gate_up)


def _check_gated(name: str, gate_up: Tensor) -> None:
    if gate_up.shape[-1] % 2:
        raise ValueError(f"{name} takes gate and up side by side, an even last dim, not {gate_up.shape[-1]}")


def _definition(y: Tensor) -> Tensor:
    return 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))


def _reference_gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    return _definition(wide(x if bias is None else x + bias)).to(x.dtype)


def _reference_exact(x: Tensor) -> Tensor:
    y = wide(x)
    return (0.5 * y * (1 + torch.erf(y / math.sqrt(2)))).to(x.dtype)


def _reference_swiglu(gate_up: Tensor) -> Tensor:
    gate, up = wide(gate_up).chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up).to(gate_up.dtype)


def _reference_geglu(gate_up: Tensor) -> Tensor:
    gate, up = wide(gate_up).chunk(2, dim=-1)
    return (_definition(gate) * up).to(gate_up.dtype)


_gelu = partial(F.gelu, approximate="tanh")
_GATES = {"swiglu": (F.silu, torch.ops.aten.silu_backward.grad_input),
          "geglu": (_gelu, partial(torch.ops.aten.gelu_backward.grad_input, approximate="tanh"))}
"""The function of the gate, and its backward pass into a given tensor."""


def _torch_gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    return _gelu(x if bias is None else x + bias)


def _torch_gated(gate_up: Tensor, name: str) -> Tensor:
    if torch.compiler.is_compiling():
        gate, up = gate_up.chunk(2, dim=-1)
        return _GATES[name][0](gate) * up
    return _Gated.apply(gate_up, name)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up, name):
        ctx.name = name
        gate, up = gate_up.chunk(2, dim=-1)
        gated = _GATES[name][0](gate)
        if eager_cpu(gate_up) and ctx.needs_input_grad[0]:
            ctx.save_for_backward(gate_up, gated)
            return gated * up
        ctx.save_for_backward(gate_up)
        return gated.mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate_up, *kept = ctx.saved_tensors
        function, function_backward = _GATES[ctx.name]
        width = grad.shape[-1]
        rows, grads = gate_up.reshape(-1, 2 * width), grad.reshape(-1, width)   # [n, 2f], [n, f]
        result = torch.empty_like(rows, memory_format=torch.contiguous_format)
        step = rows_in_cache(width) if eager_cpu(rows) else max(1, rows.shape[0])
        for first in range(0, rows.shape[0], step):
            piece = slice(first, first + step)
            gate, up = rows[piece].chunk(2, dim=-1)
            grad_gate, grad_up = result[piece].chunk(2, dim=-1)
            gated = kept[0].reshape(-1, width)[piece] if kept else function(gate)
            torch.mul(gated, grads[piece], out=grad_up)
            grad_gated = torch.mul(grads[piece], up, out=None if kept else gated)
            function_backward(grad_gated, gate, grad_input=grad_gate)
        return result.view(gate_up.shape), None


def _liger_gated(gate_up: Tensor, name: str) -> Tensor:
    from liger_kernel.ops.geglu import LigerGELUMulFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    # Halves of their own: Liger makes contiguous copies of strided ones, and its backward pass writes into what it was given.
    gate, up = (half.clone(memory_format=torch.contiguous_format) for half in gate_up.chunk(2, dim=-1))
    return (LigerSiLUMulFunction if name == "swiglu" else LigerGELUMulFunction).apply(gate, up)


def _both(gated) -> tuple[partial, partial]:
    return partial(gated, name="swiglu"), partial(gated, name="geglu")


register("activation", {"megalm": megalm_kernels, "liger": package("liger_kernel", "liger_kernel.ops")},
         megalm=(kernels.gelu, kernels.swiglu, kernels.geglu, None), torch=(_torch_gelu, *_both(_torch_gated), F.gelu),
         liger=(None, *_both(_liger_gated), None),
         reference=(_reference_gelu, _reference_swiglu, _reference_geglu, _reference_exact))

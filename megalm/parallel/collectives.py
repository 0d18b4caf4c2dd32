"""The conjugate pairs of collectives that tensor and sequence parallelism consist of, as autograd functions.

f and g are those of Shoeybi et al., "Megatron-LM" (2019), section 3; the sequence-parallel pair is that of
Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (2022), section 4.2.2.
Each is the identity where the tensor-parallel size is 1.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megalm.parallel.groups import TensorParallel

# torch 2.13 renamed both; the older names only warn there, and are the only ones before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_reduce(tensor: Tensor, tp: TensorParallel) -> Tensor:
    """Sum over tp, in place."""
    dist.all_reduce(tensor, group=tp.group)
    return tensor


def all_gather_first(tensor: Tensor, tp: TensorParallel) -> Tensor:
    """[s/tp, ...] -> [s, ...]: the shards of dim 0 in rank order."""
    out = torch.empty((tensor.shape[0] * tp.size, *tensor.shape[1:]), dtype=tensor.dtype, device=tensor.device)
    _all_gather(out, tensor.contiguous(), group=tp.group)
    return out


def reduce_scatter_first(tensor: Tensor, tp: TensorParallel, async_op: bool = False):
    """[s, ...] {tp} -> [s/tp, ...]: sum over tp, each rank keeping its share of dim 0; with the work handle if async."""
    out = torch.empty((tensor.shape[0] // tp.size, *tensor.shape[1:]), dtype=tensor.dtype, device=tensor.device)
    work = _reduce_scatter(out, tensor.contiguous(), group=tp.group, async_op=async_op)
    return (out, work) if async_op else out


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, tp):
        ctx.tp = tp
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad):
        return all_reduce(grad.contiguous().clone(), ctx.tp), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, tp):
        return all_reduce(tensor.clone(memory_format=torch.contiguous_format), tp)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, tp):
        ctx.tp = tp
        return all_gather_first(tensor, tp)

    @staticmethod
    def backward(ctx, grad):
        return reduce_scatter_first(grad, ctx.tp), None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, tp):
        ctx.tp = tp
        return reduce_scatter_first(tensor, tp)

    @staticmethod
    def backward(ctx, grad):
        return all_gather_first(grad, ctx.tp), None


def copy_to_tp(tensor: Tensor, tp: TensorParallel) -> Tensor:
    """f: identity forward, all-reduce of the gradient over tp. Also completes a partial parameter gradient."""
    return tensor if tp.size == 1 else _Copy.apply(tensor, tp)


def reduce_from_tp(tensor: Tensor, tp: TensorParallel) -> Tensor:
    """g: [..] {tp} -> [..], all-reduce forward, identity backward."""
    return tensor if tp.size == 1 else _Reduce.apply(tensor, tp)


def gather_sequence(tensor: Tensor, tp: TensorParallel) -> Tensor:
    """[s/tp, b, h] -> [s, b, h]; the gradient is summed over tp and scattered back."""
    return tensor if tp.size == 1 else _Gather.apply(tensor, tp)


def reduce_scatter_sequence(tensor: Tensor, tp: TensorParallel) -> Tensor:
    """[s, b, h] {tp} -> [s/tp, b, h]; the gradient is gathered."""
    return tensor if tp.size == 1 else _ReduceScatter.apply(tensor, tp)


def enter(tensor: Tensor, tp: TensorParallel) -> Tensor:
    """Into a column-parallel region: [s/tp, b, h] or [s, b, h] -> [s, b, h]."""
    return gather_sequence(tensor, tp) if tp.shards_sequence else copy_to_tp(tensor, tp)


def leave(tensor: Tensor, tp: TensorParallel) -> Tensor:
    """Out of a row-parallel region: [s, b, h] {tp} -> [s/tp, b, h] or [s, b, h]."""
    return reduce_scatter_sequence(tensor, tp) if tp.shards_sequence else reduce_from_tp(tensor, tp)

"""Linear layers split over the tensor-parallel ranks: along their outputs (column-parallel) or inputs (row-parallel).

Weights are [out, in] as in torch, so that "column-parallel" splits dim 0 and "row-parallel" dim 1 (Shoeybi et al., 2019).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megalm.parallel.collectives import all_gather_first, leave, reduce_scatter_first
from megalm.parallel.groups import TensorParallel
from megalm.parallel.sharding import Kind, Part, declare, use


class _ColumnLinear(torch.autograd.Function):
    """y = gather(x) W^T, with the reduction of dX in flight while dW is computed.

    Only this rank's x is kept: under sequence parallelism the gathered input is gathered again in backward
    (Korthikanti et al., 2022, section 4.2.2).
    """

    @staticmethod
    def forward(ctx, x, weight, bias, tp):
        ctx.tp, ctx.has_bias = tp, bias is not None
        ctx.save_for_backward(x, weight)
        whole = all_gather_first(x, tp) if tp.shards_sequence else x
        return F.linear(whole, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        tp = ctx.tp
        whole = all_gather_first(x, tp) if tp.shards_sequence else x
        grad_x = grad.matmul(weight)  # [s, b, out/tp] -> [s, b, in] {tp}
        if tp.shards_sequence:
            grad_x, pending = reduce_scatter_first(grad_x, tp, async_op=True)
        else:
            pending = dist.all_reduce(grad_x, group=tp.group, async_op=True)
        rows = grad.reshape(-1, grad.shape[-1])
        grad_weight = rows.t().matmul(whole.reshape(-1, whole.shape[-1])) if ctx.needs_input_grad[1] else None
        grad_bias = rows.sum(0) if ctx.has_bias else None
        pending.wait()
        return grad_x, grad_weight, grad_bias, None


class ColumnParallelLinear(nn.Module):
    """One or several full weights [out_i, in], each split along its outputs and fused into one local parameter.

    Args:
        names: canonical names without ".weight", e.g. ("layers.0.attention.query", ...key, ...value).
        outs: full output size of each; the tp size divides each.
    Input [s/tp, b, in] under sequence parallelism, else [s, b, in]; output [s, b, sum(outs)/tp].
    """

    def __init__(self, names: Sequence[str], outs: Sequence[int], in_features: int, *, bias: bool, std: float, tp: TensorParallel,
                 dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.tp = tp
        local = sum(outs) // tp.size
        parts = [(name, out, *tp.share(out)) for name, out in zip(names, outs, strict=True)]
        self.weight = declare(nn.Parameter(torch.empty(local, in_features, dtype=dtype, device=device)), Kind.SHARDED,
                              [Part(f"{n}.weight", (out, in_features), 0, a, b) for n, out, a, b in parts], std=std)
        self.bias = None
        if bias:
            self.bias = declare(nn.Parameter(torch.empty(local, dtype=dtype, device=device)), Kind.SHARDED,
                                [Part(f"{n}.bias", (out,), 0, a, b) for n, out, a, b in parts])

    def forward(self, x: Tensor, entered: bool = False) -> Tensor:
        """`entered`: the input has already gone through `enter`, which several layers then share."""
        if entered or self.tp.size == 1:
            return F.linear(x, self.weight, self.bias)
        return _ColumnLinear.apply(x, self.weight, self.bias, self.tp)


class RowParallelLinear(nn.Module):
    """A full weight [out, in] split along its inputs; the ranks' terms are summed, then the bias is added once.

    Input [s, b, in/tp]; output [s/tp, b, out] under sequence parallelism (reduce-scatter), else [s, b, out] (all-reduce).
    """

    def __init__(self, name: str, out_features: int, in_features: int, *, bias: bool, std: float, tp: TensorParallel,
                 dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.tp = tp
        start, stop = tp.share(in_features)
        self.weight = declare(nn.Parameter(torch.empty(out_features, stop - start, dtype=dtype, device=device)), Kind.SHARDED,
                              [Part(f"{name}.weight", (out_features, in_features), 1, start, stop)], std=std)
        self.bias = None
        if bias:
            kind = Kind.PARTIAL if tp.shards_sequence else Kind.REPLICATED
            self.bias = declare(nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)), kind,
                                [Part(f"{name}.bias", (out_features,))])

    def forward(self, x: Tensor) -> Tensor:
        if self.tp.size == 1:
            return F.linear(x, self.weight, self.bias)
        out = leave(F.linear(x, self.weight), self.tp)  # [s, b, in/tp] -> [s, b, out] {tp} -> [s/tp or s, b, out]
        return out if self.bias is None else out + use(self.bias, self.tp)

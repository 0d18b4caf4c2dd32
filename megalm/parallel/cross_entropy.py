"""The output projection and the vocabulary-parallel cross entropy, fused so that the logits are never whole in memory.

A chunk of tokens at a time: its logits [n, V/tp], their statistics reduced over tp, and, while the chunk is at hand, its
gradient. So one chunk of logits is the only [n, V/tp] buffer, and no rank ever sees the logits of another
(the statistics are those of Shoeybi et al., 2019, section 3; taking the gradient in the forward pass follows from the
loss being a sum).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megalm.ops.cross_entropy import chunk_gradient, chunk_loss, chunk_statistics
from megalm.parallel.collectives import all_gather_first, all_reduce, reduce_scatter_first
from megalm.parallel.groups import TensorParallel

CHUNK_ELEMENTS = 1 << 24  # logits a chunk: 64 MB in fp32


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, vocab: int, tp: TensorParallel,
                         backend: str = "auto") -> Tensor:
    """Sum over the tokens of -log softmax(hidden weight^T)[label], as fp32 scalar.

    Args:
        hidden: [s/tp, b, h] under sequence parallelism, else [s, b, h].
        weight: [V/tp, h], this rank's rows of the output embedding.
        labels: int64 [b, s]; -100 is ignored.
        vocab: columns from here on are padding and take no probability.
    """
    if not (torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)):
        return _run(hidden, weight, labels, vocab, tp, backend, with_gradient=False)[0]
    return _LinearCrossEntropy.apply(hidden, weight, labels, vocab, tp, backend)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, vocab, tp, backend):
        loss, grad_hidden, grad_weight = _run(hidden, weight, labels, vocab, tp, backend, with_gradient=True)
        ctx.tp = tp
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss

    @staticmethod
    def backward(ctx, grad):
        grad_hidden, grad_weight = ctx.saved_tensors
        tp = ctx.tp
        if tp.shards_sequence:
            grad_hidden = reduce_scatter_first(grad_hidden, tp)  # [s, b, h] {tp} -> [s/tp, b, h]
        elif tp.size > 1:
            grad_hidden = all_reduce(grad_hidden, tp)
        # A loss sum's gradients are made in the forward pass; only the outer factor was unknown there.
        return grad_hidden.mul_(grad), grad_weight.mul_(grad), None, None, None, None


def _run(hidden: Tensor, weight: Tensor, labels: Tensor, vocab: int, tp: TensorParallel, backend: str,
         with_gradient: bool):
    """(loss sum, gradient of hidden [s, b, h] {tp}, gradient of weight), the gradients None without `with_gradient`."""
    if tp.shards_sequence:
        hidden = all_gather_first(hidden, tp)
    rows = hidden.reshape(-1, hidden.shape[-1])  # [s b, h]
    targets = labels.t().reshape(-1)
    start = tp.rank * weight.shape[0]
    step = max(1, min(rows.shape[0], CHUNK_ELEMENTS // weight.shape[0]))
    chunks = range(0, rows.shape[0], step)
    loss = torch.zeros((), dtype=torch.float64, device=rows.device)
    grad_rows = torch.empty_like(rows) if with_gradient else None
    grad_weight = None
    for first in chunks:
        x, target = rows[first:first + step], targets[first:first + step]
        logits = x.matmul(weight.t())  # [n, h] -> [n, V/tp]
        loss += _loss_of_chunk(logits, target, start, vocab, tp, backend)
        if with_gradient:
            grad_logits = logits
            torch.matmul(grad_logits, weight, out=grad_rows[first:first + step])
            grad_weight = _accumulate(grad_weight, grad_logits, x, len(chunks))
    if with_gradient:
        grad_weight = grad_weight.to(weight.dtype)
        grad_rows = grad_rows.view(hidden.shape)
    return loss.float(), grad_rows, grad_weight


def _loss_of_chunk(logits: Tensor, target: Tensor, start: int, vocab: int, tp: TensorParallel, backend: str) -> Tensor:
    """Loss sum of [n] tokens, float64; their logits [n, V/tp] become their gradient."""
    weight = (target >= 0).double()
    if tp.size == 1:
        return chunk_loss(logits, target, vocab, weight, backend=backend).sum()
    logsumexp, target_logit = _reduced_statistics(logits, target, start, vocab, tp, backend)
    logits.copy_(chunk_gradient(logits, target, start, vocab, logsumexp, weight, backend=backend))
    return (weight * (logsumexp - target_logit)).sum()


def _accumulate(total: Tensor | None, grad_logits: Tensor, x: Tensor, chunks: int) -> Tensor:
    """Add one chunk's weight gradient [V/tp, h]; several chunks are summed in fp32, as half precision would lose small terms."""
    if chunks == 1:
        return grad_logits.t().matmul(x)
    if x.dtype == torch.float32:
        return grad_logits.t().matmul(x) if total is None else total.addmm_(grad_logits.t(), x)
    term = grad_logits.t().matmul(x).float()
    return term if total is None else total.add_(term)


def _reduced_statistics(logits: Tensor, target: Tensor, start: int, vocab: int, tp: TensorParallel,
                        backend: str) -> tuple[Tensor, Tensor]:
    """(log-sum-exp, float64; target logit) of each of [n] tokens, over the whole vocabulary from each rank's share of it."""
    maximum, exponentials, target_logit = chunk_statistics(logits, target, start, vocab, backend=backend)
    own = maximum.clone()
    dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=tp.group)
    sums = torch.stack((exponentials * torch.exp(own - maximum), target_logit))  # [2, n] {tp}
    exponentials, target_logit = all_reduce(sums, tp)
    # In fp32 this sum alone would double the loss's error.
    return maximum.double() + exponentials.double().log(), target_logit

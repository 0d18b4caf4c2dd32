"""The output projection and the vocabulary-parallel cross entropy, fused so that the logits are never whole in memory.

A chunk of tokens at a time: its logits [n, V/tp], their statistics reduced over tp, and, while the chunk is at hand, its
gradient. So one chunk of logits is the only [n, V/tp] buffer, and no rank ever sees the logits of another
(the statistics are those of Shoeybi et al., 2019, section 3; taking the gradient in the forward pass follows from the
loss being a sum).

The forward pass knows all of the gradients but the factor that comes from outside (loss scale, accumulation, token count).
Several chunks of half precision are summed in fp32, and the weight's gradient stays so until the factor is known: it is rounded
once, and in fp16 neither the sum over the tokens overflows nor a product with a small factor vanishes. Then each element takes
the front half of its place, so that no second [V/tp, h] buffer is made. Memory besides the gradients: a chunk of logits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalm.ops.accumulate import add_product, fp32_product, narrowed
from megalm.ops.cross_entropy import chunk_gradient, chunk_loss, chunk_statistics, loss_of
from megalm.parallel.collectives import all_gather_first, all_reduce, reduce_scatter_first
from megalm.parallel.groups import TensorParallel
from megalm.plan.activations import logits_chunk

CHUNK_ELEMENTS = 1 << 24  # logits a chunk on a CPU: 64 MB in fp32
HALF = (torch.bfloat16, torch.float16)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, vocab: int, tp: TensorParallel, backend: str = "auto", *,
                         z_loss: float = 0.0, label_smoothing: float = 0.0) -> Tensor:
    """Sum over the tokens of the loss that ops/cross_entropy.py defines, of the logits hidden weight^T, as fp32 scalar.

    Args:
        hidden: [s/tp, b, h] under sequence parallelism, else [s, b, h].
        weight: [V/tp, h], this rank's rows of the output embedding.
        labels: int64 [b, s]; -100 is ignored.
        vocab: columns from here on are padding and take no probability.
        z_loss, label_smoothing: 0 for plain cross entropy.
    """
    loss = _Loss(vocab, tp, backend, z_loss, label_smoothing)
    if not (torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)):
        return loss.run(hidden, weight, labels, with_gradient=False)[0]
    return _LinearCrossEntropy.apply(hidden, weight, labels, loss)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, loss):
        value, *gradients = loss.run(hidden, weight, labels, with_gradient=True)
        ctx.tp, ctx.dtype = loss.tp, weight.dtype
        # Not saved by autograd: it would keep the weight's gradient when backward hands it on, and so have it copied.
        ctx.gradients = gradients
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        if ctx.gradients is None:
            raise RuntimeError("the loss's gradients are made once, in its forward pass; a second backward pass has none")
        (grad_hidden, grad_weight), ctx.gradients = ctx.gradients, None
        tp = ctx.tp
        if tp.shards_sequence:
            grad_hidden = reduce_scatter_first(grad_hidden, tp)  # [s, b, h] {tp} -> [s/tp, b, h]
        elif tp.size > 1:
            grad_hidden = all_reduce(grad_hidden, tp)
        # A loss sum's gradients are made in the forward pass; only the outer factor was unknown there.
        return grad_hidden.mul_(grad), narrowed(grad_weight, ctx.dtype, grad), None, None


class _Loss:
    """What is the same for every chunk."""

    def __init__(self, vocab: int, tp: TensorParallel, backend: str, z_loss: float, label_smoothing: float):
        self.vocab, self.tp, self.backend = vocab, tp, backend
        self.z_loss, self.label_smoothing = z_loss, label_smoothing

    def run(self, hidden: Tensor, weight: Tensor, labels: Tensor, with_gradient: bool):
        """(loss sum, gradient of hidden [s, b, h] {tp}, gradient of weight), the gradients None without `with_gradient`.

        The weight's gradient may be fp32 where the weight is not.
        """
        if self.tp.shards_sequence:
            hidden = all_gather_first(hidden, self.tp)
        rows = hidden.reshape(-1, hidden.shape[-1])  # [s b, h]
        targets = labels.t().reshape(-1)
        chunks = list(_chunks(rows, weight))
        loss = torch.zeros((), dtype=torch.float64, device=rows.device)
        grad_rows = torch.empty_like(rows) if with_gradient else None
        grad_weight = None
        for chunk in chunks:
            logits = rows[chunk].matmul(weight.t())  # [n, h] -> [n, V/tp]
            loss += self.of_chunk(logits, targets[chunk], self.tp.rank * weight.shape[0])
            if with_gradient:  # which the logits have become
                torch.matmul(logits, weight, out=grad_rows[chunk])
                grad_weight = _accumulate(grad_weight, logits, rows[chunk], len(chunks))
            del logits  # before the next chunk's are made
        return loss.float(), None if grad_rows is None else grad_rows.view(hidden.shape), grad_weight

    def of_chunk(self, logits: Tensor, target: Tensor, start: int) -> Tensor:
        """Loss sum of [n] tokens, float64; their logits [n, V/tp], columns `start` .., become their gradient."""
        weight = (target >= 0).double()
        extra = {"z_loss": self.z_loss, "label_smoothing": self.label_smoothing, "backend": self.backend}
        if self.tp.size == 1:
            return chunk_loss(logits, target, self.vocab, weight, **extra).sum()
        logsumexp, expected = self._reduced_statistics(logits, target, start)
        logits.copy_(chunk_gradient(logits, target, start, self.vocab, logsumexp, weight, **extra))
        return (weight * loss_of(logsumexp, expected, self.z_loss)).sum()

    def _reduced_statistics(self, logits: Tensor, target: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """(log-sum-exp, float64; expected logit) of each of [n] tokens, over the whole vocabulary from each rank's part of it."""
        maximum, exponentials, expected = chunk_statistics(logits, target, start, self.vocab, backend=self.backend,
                                                           label_smoothing=self.label_smoothing)
        own = maximum.clone()
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=self.tp.group)
        sums = torch.stack((exponentials * torch.exp(own - maximum), expected))  # [2, n] {tp}
        exponentials, expected = all_reduce(sums, self.tp)
        # In fp32 this sum alone would double the loss's error.
        return maximum.double() + exponentials.double().log(), expected


def _chunks(rows: Tensor, weight: Tensor) -> Iterator[slice]:
    tokens, columns = rows.shape[0], weight.shape[0]
    if rows.device.type == "cpu":
        step = max(1, min(tokens, CHUNK_ELEMENTS // columns))  # what stays near the caches
    else:
        step = logits_chunk(tokens, columns, rows.element_size())
    return (slice(first, first + step) for first in range(0, tokens, step))


def _accumulate(total: Tensor | None, grad_logits: Tensor, x: Tensor, chunks: int) -> Tensor:
    """Add one chunk's weight gradient [V/tp, h]; several chunks are summed in fp32, as half precision would lose small terms."""
    left = grad_logits.t()  # [V/tp, n]
    # A single chunk's is rounded as it is made, except in fp16, where it could overflow before the outer factor is known.
    if x.dtype not in HALF or (chunks == 1 and x.dtype == torch.bfloat16):
        return left.matmul(x) if total is None else total.addmm_(left, x)
    if total is None:
        return fp32_product(left, x)
    add_product(total, left, x)
    return total

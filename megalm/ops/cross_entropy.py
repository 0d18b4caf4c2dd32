"""Cross entropy of one rank's share of the vocabulary: statistics of a chunk of logits, then its gradient in their place.

With m = max(logits), S = sum(exp(logits - m)) over the whole vocabulary, a token's loss is log(S) + m - logits[target] and its
gradient softmax(logits) - onehot(target), times the token's weight. What is summed over ranks is the caller's.
Targets outside this rank's columns (ignored ones are -100) contribute nothing here; columns from valid_vocab on are padding.
A rank that holds the whole vocabulary needs no reduction between the two: `chunk_loss` does both in one pass.
Memory: one chunk of logits; temporaries stay in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megalm.ops.dtypes import eager_cpu, rows_in_cache, wide_dtype
from megalm.ops.registry import Features, choose, register


def chunk_statistics(logits: Tensor, targets: Tensor, vocab_start: int, valid_vocab: int, *,
                     backend: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """(maximum, sum of exp(logit - maximum), target logit) of each row, fp32 [n] (float64 for float64 logits).

    logits: [n, V/tp], columns vocab_start .. of the vocabulary. targets: int64 [n], places in the whole vocabulary.
    The target logit is 0 where another rank holds it or it is ignored. A rank of padding alone gives (-inf, 0, 0).
    """
    statistics, _, _ = choose("cross_entropy", backend, Features(logits.device.type, logits.dtype))[0]
    return statistics(logits, targets, vocab_start, valid_vocab)


def chunk_gradient(logits: Tensor, targets: Tensor, vocab_start: int, valid_vocab: int, logsumexp: Tensor, weight: Tensor, *,
                   backend: str = "auto") -> Tensor:
    """weight * (softmax - onehot(target)) of each row: [n, V/tp] in the logits' dtype, written over them where possible.

    logsumexp: [n], over the whole vocabulary; in float64 it keeps what fp32 loses of a maximum plus a logarithm.
    weight: [n], a token's factor in the loss, 0 for an ignored one.
    """
    _, gradient, _ = choose("cross_entropy", backend, Features(logits.device.type, logits.dtype))[0]
    return gradient(logits, targets, vocab_start, valid_vocab, logsumexp, weight)


def chunk_loss(logits: Tensor, targets: Tensor, valid_vocab: int, weight: Tensor, *, backend: str = "auto") -> Tensor:
    """weight * loss of each row, float64 [n], where the logits [n, V] are those of the whole vocabulary.

    The gradient, weight * (softmax - onehot(target)), is written over the logits.
    """
    _, _, loss = choose("cross_entropy", backend, Features(logits.device.type, logits.dtype))[0]
    return loss(logits, targets, valid_vocab, weight)


def _columns(logits: Tensor, vocab_start: int, valid_vocab: int) -> int:
    """How many of the local columns are not padding."""
    return min(max(valid_vocab - vocab_start, 0), logits.shape[1])


def _local_targets(targets: Tensor, vocab_start: int, columns: int) -> tuple[Tensor, Tensor]:
    """(whether the target is one of the local columns, its column or 0), each [n, 1]."""
    local = targets.unsqueeze(1) - vocab_start
    here = (local >= 0) & (local < columns)
    return here, torch.where(here, local, 0)


def _reference_statistics(logits: Tensor, targets: Tensor, vocab_start: int, valid_vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    columns = _columns(logits, vocab_start, valid_vocab)
    values = logits[:, :columns].to(wide_dtype(logits.dtype))
    if columns == 0:
        zeros = values.new_zeros(logits.shape[0])
        return torch.full_like(zeros, -torch.inf), zeros, zeros.clone()
    maximum = values.amax(dim=1, keepdim=True)
    here, column = _local_targets(targets, vocab_start, columns)
    target_logit = torch.where(here, values.gather(1, column), 0.0)
    return maximum.squeeze(1), (values - maximum).exp().sum(dim=1), target_logit.squeeze(1)


def _reference_gradient(logits: Tensor, targets: Tensor, vocab_start: int, valid_vocab: int, logsumexp: Tensor,
                        weight: Tensor) -> Tensor:
    columns = _columns(logits, vocab_start, valid_vocab)
    here, column = _local_targets(targets, vocab_start, columns)
    dtype = wide_dtype(logits.dtype)
    probabilities = (logits.to(dtype) - logsumexp.unsqueeze(1)).exp().to(dtype)
    probabilities[:, columns:] = 0.0
    if columns:
        probabilities.scatter_add_(1, column, -here.to(probabilities.dtype))
    return (probabilities * weight.to(dtype).unsqueeze(1)).to(logits.dtype)


def _reference_loss(logits: Tensor, targets: Tensor, valid_vocab: int, weight: Tensor) -> Tensor:
    maximum, exponentials, target_logit = _reference_statistics(logits, targets, 0, valid_vocab)
    logsumexp = maximum.double() + exponentials.double().log()
    logits.copy_(_reference_gradient(logits, targets, 0, valid_vocab, logsumexp, weight))
    return weight * (logsumexp - target_logit)


def _pieces(logits: Tensor) -> Iterator[slice]:
    step = rows_in_cache(logits.shape[1]) if eager_cpu(logits) else max(1, (1 << 24) // max(1, logits.shape[1]))
    return (slice(first, first + step) for first in range(0, logits.shape[0], step))


def _torch_statistics(logits: Tensor, targets: Tensor, vocab_start: int, valid_vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    columns, dtype = _columns(logits, vocab_start, valid_vocab), wide_dtype(logits.dtype)
    if columns == 0:
        return _reference_statistics(logits, targets, vocab_start, valid_vocab)
    valid = logits[:, :columns]
    maximum = valid.amax(dim=1).to(dtype)                                      # [n]
    sums = torch.empty_like(maximum)
    for piece in _pieces(valid):
        torch.sum((valid[piece] - maximum[piece, None]).exp_(), dim=1, out=sums[piece])
    here, column = _local_targets(targets, vocab_start, columns)
    target_logit = torch.where(here, valid.gather(1, column).to(dtype), 0.0)
    return maximum, sums, target_logit.squeeze(1)


def _torch_gradient(logits: Tensor, targets: Tensor, vocab_start: int, valid_vocab: int, logsumexp: Tensor,
                    weight: Tensor) -> Tensor:
    columns, dtype = _columns(logits, vocab_start, valid_vocab), wide_dtype(logits.dtype)
    logits[:, columns:] = 0.0
    if columns == 0:
        return logits
    valid = logits[:, :columns]
    here, column = _local_targets(targets, vocab_start, columns)
    # exp(x - l) = exp(x - rounded l) * exp(rounded l - l): a float64 logsumexp costs nothing on the way through the logits.
    rounded = logsumexp.to(dtype)
    factor = (weight * torch.exp(rounded - logsumexp)).to(dtype).unsqueeze(1)  # [n, 1]
    rounded = rounded.unsqueeze(1)
    hit = torch.where(here, -weight.to(dtype).unsqueeze(1), 0.0)
    for piece in _pieces(valid):
        part = valid[piece]
        # Half-precision logits are 0.4% off around 10: the difference and its exponential are fp32, in the cache.
        work = part.sub_(rounded[piece]) if dtype == logits.dtype else part - rounded[piece]
        work.exp_().mul_(factor[piece]).scatter_add_(1, column[piece], hit[piece])
        if work.dtype != logits.dtype:
            part.copy_(work)
    return logits


def _torch_loss(logits: Tensor, targets: Tensor, valid_vocab: int, weight: Tensor) -> Tensor:
    columns, dtype = _columns(logits, 0, valid_vocab), wide_dtype(logits.dtype)
    here, column = _local_targets(targets, 0, columns)
    logits[:, columns:] = 0.0
    valid, factor = logits[:, :columns], weight.to(dtype).unsqueeze(1)         # [n, V], [n, 1]
    hit = torch.where(here, -factor, 0.0)
    target_logit = torch.where(here, valid.gather(1, column), 0.0).squeeze(1)
    maximum, largest = torch.empty(2, len(logits), dtype=dtype, device=logits.device)
    for piece in _pieces(valid):
        part = valid[piece].to(dtype)
        torch.amax(part, dim=1, out=maximum[piece])
        probabilities = torch.softmax(part, dim=1)
        # The largest is exp(0) / sum of exponentials, which is all that the loss needs: no exponential is taken twice.
        torch.amax(probabilities, dim=1, out=largest[piece])
        valid[piece] = probabilities.mul_(factor[piece]).scatter_add_(1, column[piece], hit[piece])
    return weight * (maximum.double() - largest.double().log() - target_logit)


register("cross_entropy", torch=(_torch_statistics, _torch_gradient, _torch_loss),
         reference=(_reference_statistics, _reference_gradient, _reference_loss))

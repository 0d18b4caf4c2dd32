"""Cross entropy of one rank's share of the vocabulary: statistics of a chunk of logits, then its gradient in their place.

With lse = log(sum(exp(logits))) over the whole vocabulary and q the distribution that a token's target stands for,

    q         (1 - label_smoothing) onehot(target) + label_smoothing / vocabulary      (Szegedy et al. 2016, section 7)
    loss      lse - sum(q logits) + z_loss lse^2                                       (Chowdhery et al. 2022, section 5)
    gradient  softmax(logits) (1 + 2 z_loss lse) - q

times the token's weight. What is summed over ranks is the caller's: lse comes from each rank's maximum and sum of
exponentials, sum(q logits), which the statistics call expected, is a plain sum.
A target outside this rank's columns (ignored ones are -100) has no onehot here; columns from valid_vocab on are padding and
have neither probability nor gradient, whatever they hold. A logit that is NaN or +inf spreads to its token's loss and gradient,
a weight of 0 notwithstanding. A rank that holds the whole vocabulary needs no reduction between the two: `chunk_loss` does both
in one pass. Memory: one chunk of logits; temporaries stay in the cache.

Liger has no backend here: its kernels take neither a share of the vocabulary nor padding nor a weight for each token.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megalm.ops.dtypes import eager_cpu, rows_in_cache, wide_dtype
from megalm.ops.installed import megalm_kernels
from megalm.ops.kernels import cross_entropy as kernels
from megalm.ops.registry import Features, choose, register


def chunk_statistics(logits: Tensor, targets: Tensor, vocab_start: int, valid_vocab: int, *, label_smoothing: float = 0.0,
                     backend: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """(maximum, sum of exp(logit - maximum), expected) of each row, fp32 [n] (float64 for float64 logits).

    logits: [n, V/tp], columns vocab_start .. of the vocabulary. targets: int64 [n], places in the whole vocabulary.
    expected: this rank's part of sum(q logits); without smoothing that is the target's logit, 0 where another rank holds it or it
    is ignored. A rank of padding alone gives (-inf, 0, 0).
    """
    statistics, _, _ = choose("cross_entropy", backend, Features(logits.device.type, logits.dtype))[0]
    return statistics(logits, targets, vocab_start, valid_vocab, label_smoothing)


def chunk_gradient(logits: Tensor, targets: Tensor, vocab_start: int, valid_vocab: int, logsumexp: Tensor, weight: Tensor, *,
                   z_loss: float = 0.0, label_smoothing: float = 0.0, backend: str = "auto") -> Tensor:
    """weight * (softmax (1 + 2 z_loss logsumexp) - q) of each row: [n, V/tp] in the logits' dtype, over them where possible.

    logsumexp: [n], over the whole vocabulary; in float64 it keeps what fp32 loses of a maximum plus a logarithm.
    weight: [n], a token's factor in the loss, 0 for an ignored one.
    """
    _, gradient, _ = choose("cross_entropy", backend, Features(logits.device.type, logits.dtype))[0]
    return gradient(logits, targets, vocab_start, valid_vocab, logsumexp, weight, z_loss, label_smoothing)


def chunk_loss(logits: Tensor, targets: Tensor, valid_vocab: int, weight: Tensor, *, z_loss: float = 0.0,
               label_smoothing: float = 0.0, backend: str = "auto") -> Tensor:
    """weight * loss of each row, float64 [n], where the logits [n, V] are those of the whole vocabulary.

    The gradient, weight * (softmax (1 + 2 z_loss logsumexp) - q), is written over the logits.
    """
    _, _, loss = choose("cross_entropy", backend, Features(logits.device.type, logits.dtype))[0]
    return loss(logits, targets, valid_vocab, weight, z_loss, label_smoothing)


def loss_of(logsumexp: Tensor, expected: Tensor, z_loss: float = 0.0) -> Tensor:
    """Each token's loss [n] from its float64 log-sum-exp and sum(q logits), both over the whole vocabulary."""
    loss = logsumexp - expected
    return loss.add_(logsumexp.square(), alpha=z_loss) if z_loss else loss


def _columns(logits: Tensor, vocab_start: int, valid_vocab: int) -> int:
    """How many of the local columns are not padding."""
    return min(max(valid_vocab - vocab_start, 0), logits.shape[1])


def _local_targets(targets: Tensor, vocab_start: int, columns: int) -> tuple[Tensor, Tensor]:
    """(whether the target is one of the local columns, its column or 0), each [n, 1]."""
    local = targets.unsqueeze(1) - vocab_start
    here = (local >= 0) & (local < columns)
    return here, torch.where(here, local, 0)


def _reference_statistics(logits: Tensor, targets: Tensor, vocab_start: int, valid_vocab: int,
                          label_smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
    columns = _columns(logits, vocab_start, valid_vocab)
    values = logits[:, :columns].to(wide_dtype(logits.dtype))
    if columns == 0:
        zeros = values.new_zeros(logits.shape[0])
        return torch.full_like(zeros, -torch.inf), zeros, zeros.clone()
    maximum = values.amax(dim=1, keepdim=True)
    here, column = _local_targets(targets, vocab_start, columns)
    expected = torch.where(here, values.gather(1, column), 0.0).squeeze(1)
    if label_smoothing:
        expected = (1.0 - label_smoothing) * expected + label_smoothing / valid_vocab * values.sum(dim=1)
    return maximum.squeeze(1), (values - maximum).exp().sum(dim=1), expected


def _reference_gradient(logits: Tensor, targets: Tensor, vocab_start: int, valid_vocab: int, logsumexp: Tensor, weight: Tensor,
                        z_loss: float, label_smoothing: float) -> Tensor:
    columns = _columns(logits, vocab_start, valid_vocab)
    here, column = _local_targets(targets, vocab_start, columns)
    dtype = wide_dtype(logits.dtype)
    gradient = (logits.to(dtype) - logsumexp.unsqueeze(1)).exp() * (1.0 + 2.0 * z_loss * logsumexp.unsqueeze(1))
    gradient = gradient.to(dtype) - label_smoothing / valid_vocab
    gradient[:, columns:] = 0.0
    if columns:
        gradient.scatter_add_(1, column, here.to(dtype) * (label_smoothing - 1.0))
    return (gradient * weight.to(dtype).unsqueeze(1)).to(logits.dtype)


def _reference_loss(logits: Tensor, targets: Tensor, valid_vocab: int, weight: Tensor, z_loss: float,
                    label_smoothing: float) -> Tensor:
    maximum, exponentials, expected = _reference_statistics(logits, targets, 0, valid_vocab, label_smoothing)
    logsumexp = maximum.double() + exponentials.double().log()
    logits.copy_(_reference_gradient(logits, targets, 0, valid_vocab, logsumexp, weight, z_loss, label_smoothing))
    return weight * loss_of(logsumexp, expected, z_loss)


def _pieces(logits: Tensor) -> Iterator[slice]:
    step = rows_in_cache(logits.shape[1]) if eager_cpu(logits) else max(1, (1 << 22) // max(1, logits.shape[1]))
    return (slice(first, first + step) for first in range(0, logits.shape[0], step))


def _torch_statistics(logits: Tensor, targets: Tensor, vocab_start: int, valid_vocab: int,
                      label_smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
    columns, dtype = _columns(logits, vocab_start, valid_vocab), wide_dtype(logits.dtype)
    if columns == 0:
        return _reference_statistics(logits, targets, vocab_start, valid_vocab, label_smoothing)
    valid = logits[:, :columns]
    maximum = valid.amax(dim=1).to(dtype)                                      # [n]
    sums = torch.empty_like(maximum)
    for piece in _pieces(valid):
        torch.sum((valid[piece] - maximum[piece, None]).exp_(), dim=1, out=sums[piece])
    return maximum, sums, _expected(valid, *_local_targets(targets, vocab_start, columns), valid_vocab, label_smoothing)


def _expected(valid: Tensor, here: Tensor, column: Tensor, valid_vocab: int, label_smoothing: float) -> Tensor:
    """This rank's part of sum(q logits), [n]."""
    expected = torch.where(here, valid.gather(1, column).to(wide_dtype(valid.dtype)), 0.0).squeeze(1)
    if label_smoothing:
        sums = valid.sum(dim=1, dtype=expected.dtype)
        expected.mul_(1.0 - label_smoothing).add_(sums, alpha=label_smoothing / valid_vocab)
    return expected


def _torch_gradient(logits: Tensor, targets: Tensor, vocab_start: int, valid_vocab: int, logsumexp: Tensor, weight: Tensor,
                    z_loss: float, label_smoothing: float) -> Tensor:
    columns, dtype = _columns(logits, vocab_start, valid_vocab), wide_dtype(logits.dtype)
    logits[:, columns:] = 0.0
    if columns == 0:
        return logits
    valid = logits[:, :columns]
    here, column = _local_targets(targets, vocab_start, columns)
    # exp(x - l) = exp(x - rounded l) * exp(rounded l - l): a float64 logsumexp costs nothing on the way through the logits.
    rounded = logsumexp.to(dtype)
    factor = weight * torch.exp(rounded - logsumexp)
    if z_loss:
        factor = factor * (1.0 + 2.0 * z_loss * logsumexp)
    factor, rounded = factor.to(dtype).unsqueeze(1), rounded.unsqueeze(1)      # [n, 1]
    hit, level = _onehot(here, weight.to(dtype).unsqueeze(1), valid_vocab, label_smoothing)
    for piece in _pieces(valid):
        part = valid[piece]
        # Half-precision logits are 0.4% off around 10: the difference and its exponential are fp32, in the cache.
        work = part.sub_(rounded[piece]) if dtype == logits.dtype else part - rounded[piece]
        work.exp_().mul_(factor[piece])
        if level is not None:
            work.sub_(level[piece])
        work.scatter_add_(1, column[piece], hit[piece])
        if work.dtype != logits.dtype:
            part.copy_(work)
    return logits


def _onehot(here: Tensor, weight: Tensor, valid_vocab: int, label_smoothing: float) -> tuple[Tensor, Tensor | None]:
    """What the gradient has in a target's column, and less in every column (None: nothing): [n, 1] each."""
    if not label_smoothing:
        return torch.where(here, -weight, 0.0), None
    return torch.where(here, weight * (label_smoothing - 1.0), 0.0), weight * (label_smoothing / valid_vocab)


def _torch_loss(logits: Tensor, targets: Tensor, valid_vocab: int, weight: Tensor, z_loss: float,
                label_smoothing: float) -> Tensor:
    columns, dtype = _columns(logits, 0, valid_vocab), wide_dtype(logits.dtype)
    here, column = _local_targets(targets, 0, columns)
    logits[:, columns:] = 0.0
    valid, factor = logits[:, :columns], weight.to(dtype).unsqueeze(1)         # [n, V], [n, 1]
    hit, level = _onehot(here, factor, valid_vocab, label_smoothing)
    expected = _expected(valid, here, column, valid_vocab, label_smoothing)
    maximum, largest = torch.empty(2, len(logits), dtype=dtype, device=logits.device)
    for piece in _pieces(valid):
        part, scale = valid[piece].to(dtype), factor[piece]
        torch.amax(part, dim=1, out=maximum[piece])
        probabilities = torch.softmax(part, dim=1)
        # The largest is exp(0) / sum of exponentials, which is all that the loss needs: no exponential is taken twice.
        torch.amax(probabilities, dim=1, out=largest[piece])
        if z_loss:
            scale = scale * (1.0 + 2.0 * z_loss * (maximum[piece] - largest[piece].log()).unsqueeze(1))
        probabilities.mul_(scale)
        if level is not None:
            probabilities.sub_(level[piece])
        valid[piece] = probabilities.scatter_add_(1, column[piece], hit[piece])
    return weight * loss_of(maximum.double() - largest.double().log(), expected, z_loss)


register("cross_entropy", {"megalm": megalm_kernels}, megalm=(kernels.statistics, kernels.gradient, kernels.loss),
         torch=(_torch_statistics, _torch_gradient, _torch_loss),
         reference=(_reference_statistics, _reference_gradient, _reference_loss))

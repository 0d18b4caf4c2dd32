"""From what the head returns to the number DeepSpeed averages."""

from __future__ import annotations

import torch
from torch import Tensor

from megalm.parallel.cross_entropy import linear_cross_entropy
from megalm.parallel.groups import TensorParallel


class TokenLoss:
    """loss((hidden_states, weight), (labels, scale)) = scale x sum of the tokens' losses.

    With scale = accumulation x dp / (labels that count in the step), DeepSpeed's mean over micro-batches of the mean over
    data-parallel ranks is the mean over the step's tokens, however unevenly they are spread. Where no gradient is asked
    for, it is an evaluation, whose loss is the cross entropy alone: its exponential is the perplexity.
    """

    def __init__(self, vocab: int, tp: TensorParallel, backend: str = "auto", z_loss: float = 0.0, label_smoothing: float = 0.0):
        self.vocab, self.tp, self.backend = vocab, tp, backend
        self.z_loss, self.label_smoothing = z_loss, label_smoothing

    def __call__(self, outputs: tuple[Tensor, Tensor], targets: tuple[Tensor, Tensor]) -> Tensor:
        (hidden, weight), (labels, scale) = outputs, targets
        extra = {"z_loss": self.z_loss, "label_smoothing": self.label_smoothing} if torch.is_grad_enabled() else {}
        return linear_cross_entropy(hidden, weight, labels, self.vocab, self.tp, self.backend, **extra) * scale


def counted(labels: Tensor) -> int:
    """How many labels count (-100 does not)."""
    return int((labels >= 0).sum())


def token_scale(count: Tensor, terms: int) -> Tensor:
    """`terms` / count as a fp32 scalar; a step in which nothing counts has loss 0, not NaN."""
    return (terms / count.clamp(min=1).double()).float()

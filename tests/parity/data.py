"""Deterministic training data for the parity proof: the global batch of a step, and its cut into micro-batches.

Unevenly many labels count in the samples of a batch, from none to all: a mean of means, or a division by zero, shows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megalm.data import MicroBatch
from megalm.plan import Place, Plan

GLOBAL_BATCH, SEQ_LENGTH = 8, 32
IGNORED = -100
# Labels that count, by (sample + step) mod 8: the sample with none moves through the dp ranks and the accumulation steps.
COUNTED = (32, 1, 17, 0, 5, 31, 9, 23)


@dataclass(frozen=True)
class Batch:
    """One global batch: samples int64 [B], tokens int64 [B, s], labels int64 [B, s] (-100 = ignored), and each token's document
    within its sample, int64 [B, s] from 0 on."""

    samples: Tensor
    tokens: Tensor
    labels: Tensor
    documents: Tensor


def global_batch(step: int, vocab_size: int, silent: bool = False) -> Batch:
    """The batch of `step`: tokens that can be learned (a noisy arithmetic progression), a random subset of labels counted.

    `silent`: none is.
    """
    generator = torch.Generator().manual_seed(1_000_003 * (step + 1))
    start = torch.randint(0, vocab_size, (GLOBAL_BATCH, 1), generator=generator)
    stride = torch.randint(1, 4, (GLOBAL_BATCH, 1), generator=generator)
    noise = torch.randint(0, 2, (GLOBAL_BATCH, SEQ_LENGTH + 1), generator=generator)
    text = (start + stride * torch.arange(SEQ_LENGTH + 1) + noise) % vocab_size
    labels = text[:, 1:].clone()
    for sample in range(GLOBAL_BATCH):
        order = torch.randperm(SEQ_LENGTH, generator=generator)
        counted = 0 if silent else COUNTED[(sample + step) % GLOBAL_BATCH]
        labels[sample, order[counted:]] = IGNORED
    samples = step * GLOBAL_BATCH + torch.arange(GLOBAL_BATCH)
    return Batch(samples, text[:, :-1].contiguous(), labels, _documents(step))


def _documents(step: int) -> Tensor:
    """From one document in a sample to one for each token."""
    generator = torch.Generator().manual_seed(7_000_003 * (step + 1))
    often = torch.tensor([0.0, 0.03, 0.06, 0.1, 0.2, 0.4, 0.8, 1.0]).roll(step)
    begins = torch.rand(GLOBAL_BATCH, SEQ_LENGTH, generator=generator) < often[:, None]
    begins[:, 0] = False
    return begins.cumsum(1)


def micro_batches(batch: Batch, plan: Plan, place: Place, documents: bool = False) -> list[MicroBatch]:
    """This rank's accumulation steps: micro-batch m of dp rank r starts at sample m x micro x dp + r x micro."""
    ends = place.pp in (0, plan.pp - 1)
    cut = []
    for m in range(plan.accumulation_steps):
        start = (m * plan.dp + place.dp) * plan.micro_batch
        part = slice(start, start + plan.micro_batch)
        tokens, labels = (batch.tokens[part], batch.labels[part]) if ends else (None, None)
        # Documents are numbered in order: the first place of a number is where its document begins.
        starts = torch.searchsorted(batch.documents[part], batch.documents[part]).int() if documents else None
        cut.append(MicroBatch(batch.samples[part], tokens, labels, starts))
    return cut

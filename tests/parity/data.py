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
    """One global batch: samples int64 [B], tokens int64 [B, s], labels int64 [B, s] (-100 = ignored)."""

    samples: Tensor
    tokens: Tensor
    labels: Tensor


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
    return Batch(samples, text[:, :-1].contiguous(), labels)


def micro_batches(batch: Batch, plan: Plan, place: Place) -> list[MicroBatch]:
    """This rank's accumulation steps: micro-batch m of dp rank r starts at sample m x micro x dp + r x micro."""
    ends = place.pp in (0, plan.pp - 1)
    cut = []
    for m in range(plan.accumulation_steps):
        start = (m * plan.dp + place.dp) * plan.micro_batch
        part = slice(start, start + plan.micro_batch)
        cut.append(MicroBatch(batch.samples[part], *((batch.tokens[part], batch.labels[part]) if ends else (None, None))))
    return cut

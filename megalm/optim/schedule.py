"""The learning rate as a pure function of the step: nothing to save, and a resumed run gets the rate that it would have had.

With w warm-up steps and d decay steps, and f = (step - w) / d clipped to 0..1:
  warm-up   lr (step + 1) / w for step < w: linear, from lr / w, so that the first step isn't lost
  cosine    min_lr + (lr - min_lr) (1 + cos(pi f)) / 2      (Loshchilov and Hutter 2017, without restarts)
  linear    lr - (lr - min_lr) f
  wsd       lr until the last d steps of the run, then linear to min_lr      (warm-up, stable, decay; Hu et al. 2024)
  constant  lr
"""

from __future__ import annotations

import math
from typing import Protocol

WSD_SHARE = 0.1
"""Of a run's steps that wsd decays over, unless decay_steps says otherwise."""


class Schedule(Protocol):
    """The config's section."""

    warmup_steps: int
    decay: str
    min_lr: float
    decay_steps: int | None


def decay_range(schedule: Schedule, total_steps: int) -> tuple[int, int]:
    """[first, stop) of the steps over which the rate falls; the rate is min_lr from `stop` on."""
    if schedule.decay == "wsd":
        length = schedule.decay_steps or max(1, round(WSD_SHARE * total_steps))
        return max(total_steps - length, schedule.warmup_steps), total_steps
    length = schedule.decay_steps or max(1, total_steps - schedule.warmup_steps)
    return schedule.warmup_steps, schedule.warmup_steps + length


def lr_at(schedule: Schedule, optimizer_lr: float, total_steps: int, step: int) -> float:
    """The rate of step `step` (0 is the first) of a run of `total_steps`; `optimizer_lr` is the peak.

    It depends on train.steps, never on train.stop_at, so that an interrupted run's schedule is the whole run's. Raises
    ValueError for a min_lr above the peak.
    """
    if schedule.min_lr > optimizer_lr:
        raise ValueError(f"schedule.min_lr {schedule.min_lr} is above optimizer.lr {optimizer_lr}")
    assert step >= 0, step
    if step < schedule.warmup_steps:
        return optimizer_lr * (step + 1) / schedule.warmup_steps
    if schedule.decay == "constant":
        return optimizer_lr
    first, stop = decay_range(schedule, total_steps)
    done = min(1.0, max(0.0, (step - first) / max(stop - first, 1)))
    if schedule.decay == "cosine":
        left = (1.0 + math.cos(math.pi * done)) / 2.0
    else:
        assert schedule.decay in ("linear", "wsd"), schedule.decay
        left = 1.0 - done
    return schedule.min_lr + (optimizer_lr - schedule.min_lr) * left

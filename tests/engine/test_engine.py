"""What the engine says of a step, on a driver that pretends: fp16 can't run on a CPU, but its loss scaler can."""
from __future__ import annotations

import json
import math
from types import SimpleNamespace

import torch

from megalm.engine.engine import COUNTERS, Engine, StepResult
from megalm.engine.grid import adopt_process_group
from megalm.parallel.groups import start
from megalm.plan import make_plan
from tests import dist
from tests.config.trees import config


class DeepSpeedZeroOptimizer:
    """As much of DeepSpeed's as the engine looks at; every step's gradients overflow."""

    def __init__(self, scaler):
        self.loss_scaler, self.overflow = scaler, False


class Overflowing:
    """A driver whose steps DeepSpeed skips because their gradients are too large for fp16."""

    def __init__(self, scaler):
        self.deepspeed = SimpleNamespace(optimizer=DeepSpeedZeroOptimizer(scaler), get_global_grad_norm=lambda: math.inf,
                                         gradient_accumulation_steps=lambda: 1, **dict.fromkeys(COUNTERS, 0))

    def train(self, step, batches, scale, before_step):
        optimizer = self.deepspeed.optimizer
        optimizer.overflow = True
        optimizer.loss_scaler.update_scale(True)
        return torch.tensor(2.5)


def overflow(rank: int, world: int, steps: int) -> tuple[list[bool], dict, dict]:
    """(was each step bad, the scaler's numbers, those of another engine's scaler after it took over the counters)."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    adopt_process_group()
    described = config(precision={"dtype": "fp16"})
    plan = make_plan(described, 1)
    groups = start(plan, torch.device("cpu"))
    scalers = [DynamicLossScaler(init_scale=4.0, scale_window=window, min_scale=1.0, delayed_shift=1,
                                 consecutive_hysteresis=False) for window in (1000, 7)]
    one, two = (Engine(described, plan, groups, Overflowing(scaler), torch.optim.SGD([torch.zeros(1)], lr=0.1))
                for scaler in scalers)
    bad = [one.train_step(step, []).bad for step in range(steps)]
    two.refresh(json.loads(json.dumps(one.counters())))
    return bad, vars(scalers[0]), vars(scalers[1])


def test_fp16_at_the_floor_of_its_scale_is_bad_steps_and_no_exception():
    """Scales 4 and 2 may fall and are no bad steps; at 1, DeepSpeed would raise an Exception by default."""
    [(bad, scaler, other)] = dist.run(overflow, 1, 5)
    assert bad == [False, False, True, True, True]
    assert scaler["cur_scale"] == 1.0 and scaler["cur_iter"] == 5
    assert other == {**scaler, "scale_window": 7}  # where it has come to is the run's, how it moves is the config's


def test_a_step_is_bad_where_anything_is_not_finite():
    assert not StepResult(1.0, 2.0, False, 0.1).bad
    assert StepResult(1.0, 2.0, True, 0.1).bad and not StepResult(1.0, math.inf, True, 0.1, rescaled=True).bad
    for loss, norm in ((math.nan, 2.0), (math.inf, 2.0), (1.0, math.nan), (1.0, -math.inf)):
        assert StepResult(loss, norm, False, 0.1).bad

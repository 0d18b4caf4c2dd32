"""AdamW with the state of DeepSpeed's and of NVIDIA apex's FusedAdam, and a job that trains, saves and goes on with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pytest import MonkeyPatch
from torch import Tensor

from megalm.engine import engine as engine_module
from megalm.engine.engine import Engine, build
from megalm.model import layers
from megalm.parallel.groups import start
from megalm.parallel.random import StepContext
from megalm.plan import make_plan
from tests.config.trees import config as small_config
from tests.plan.live import batches

STEPS = 4


class _FusedAdam(torch.optim.Optimizer):
    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})

    def _count(self, group: dict[str, Any]) -> int:
        raise NotImplementedError

    def _start(self, group: dict[str, Any]) -> dict[str, Any]:
        return {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            if not group["params"]:
                continue
            for p in group["params"]:
                if not self.state[p]:
                    self.state[p].update(self._start(group), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            t, (b1, b2), lr = self._count(group), group["betas"], group["lr"]
            for p in group["params"]:
                state = self.state[p]
                first = state["exp_avg"].lerp_(p.grad, 1 - b1)
                second = state["exp_avg_sq"].mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
                p.mul_(1 - lr * group["weight_decay"])
                p.addcdiv_(first, (second / (1 - b2**t)).sqrt_().add_(group["eps"]), value=-lr / (1 - b1**t))


class DeepSpeeds(_FusedAdam):
    """An int for each tensor, of which only the last one of a group is counted up (deepspeed 0.19.8)."""

    def _start(self, group: dict[str, Any]) -> dict[str, Any]:
        return {"step": group.setdefault("step", 0)}

    def _count(self, group: dict[str, Any]) -> int:
        state = self.state[group["params"][-1]]
        state["step"] += 1
        return state["step"]


class Apexs(_FusedAdam):
    """An int for each group."""

    def _count(self, group: dict[str, Any]) -> int:
        group["step"] = group.get("step", 0) + 1
        return group["step"]


DeepSpeeds.__module__ = "deepspeed.ops.adam.fused_adam"
Apexs.__module__ = "apex.optimizers.fused_adam"
FAKES = {"deepspeed": DeepSpeeds, "apex": Apexs}


def make(kind: str) -> Callable:
    def build_optimizer(section: Any, named_parameters: Any, makers: Any, zero_stage: int) -> torch.optim.Optimizer:
        from megalm.optim import param_groups

        groups = param_groups(named_parameters, section.weight_decay)
        return FAKES[kind](groups, section.lr, tuple(section.betas), section.eps)

    return build_optimizer


def resumed(rank: int, world_size: int, kind: str, sections: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Master weights after four steps with torch's AdamW, with the fake, and with the fake saved and loaded after two."""
    config = small_config(**sections)
    plan = make_plan(config, world_size)
    groups = start(plan, torch.device("cpu"))

    def engine() -> Engine:
        context = StepContext(config.train.seed)
        return build(config, plan, groups, context, layers(config, plan, groups.tp, context))

    def train(live: Engine, steps: range) -> None:
        for step in steps:
            live.train_step(step, batches(plan, groups.place.dp, config.model.seq_length))

    def masters(live: Engine) -> list[Tensor]:
        return [fragment.tensor.clone() for fragment in live.fragments() if fragment.role == "master"]

    plain = engine()
    train(plain, range(STEPS))
    with MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "build_optimizer", make(kind))
        whole, first, second = engine(), engine(), engine()
    train(whole, range(STEPS))
    fresh = first.counters()["optimizer_step"]
    train(first, range(STEPS // 2))
    saved, counters = first.fragments(), first.counters()
    for fragment, source in zip(second.fragments(), saved, strict=True):
        assert (fragment.part, fragment.role, fragment.start) == (source.part, source.role, source.start)
        fragment.tensor.copy_(source.tensor)
    second.refresh(counters)
    train(second, range(STEPS // 2, STEPS))
    return {"fresh": fresh, "counted": counters["optimizer_step"], "last": second.counters()["optimizer_step"],
            "steps of moments": {fragment.step for fragment in saved if fragment.role != "master"},
            "roles": {fragment.role for fragment in saved}, "wrapper": plan.wrapper,
            "plain": masters(plain), "whole": masters(whole), "resumed": masters(second)}

"""The one door to DeepSpeed: builds the engine that the plan asks for and drives it a step at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalm.checkpoint.fragment import Fragment
from megalm.config import Config
from megalm.data.loader import MicroBatch
from megalm.engine import fragments as state
from megalm.engine.ds_config import ds_config
from megalm.engine.ema import Ema
from megalm.engine.fused_adam import fused_adam
from megalm.engine.gradients import clip, global_norm, reduced_gradients
from megalm.engine.grid import adopt_process_group, quiet
from megalm.engine.loss import TokenLoss, counted, token_scale
from megalm.model.description import LayerDescription
from megalm.optim import build_optimizer, lr_at
from megalm.parallel.groups import Groups
from megalm.parallel.random import StepContext
from megalm.parallel.sharding import Part, declared
from megalm.plan import Plan

COUNTERS = ("skipped_steps", "global_steps", "global_samples")
SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class StepResult:
    """Of one optimizer step: token-mean loss, gradient norm before clipping, whether it was skipped as non-finite, its rate.

    `rescaled`: it was skipped only because fp16's loss scale was too high, which a lower one mends.
    """

    loss: float
    grad_norm: float
    skipped: bool
    lr: float
    rescaled: bool = False

    @property
    def bad(self) -> bool:
        """Loss or gradients were not finite; if it wasn't skipped either, the weights can't be trusted any more."""
        return not self.rescaled and (self.skipped or not (math.isfinite(self.loss) and math.isfinite(self.grad_norm)))


class Engine:
    """Trains one rank's share of the model. Every method is collective: all ranks call it together.

    `on_gradients`, when set, is called between reduction and step with an iterator of (Part, fp32 slice of the reduced
    gradient).
    """

    def __init__(self, config: Config, plan: Plan, groups: Groups, driver: Any, optimizer: torch.optim.Optimizer):
        self.config, self.plan, self.groups = config, plan, groups
        self.driver, self.optimizer = driver, optimizer
        self.on_gradients: Callable[[Iterator[tuple[Part, Tensor]]], None] | None = None
        self._own_norm: Tensor | None = None
        bare = self.deepspeed.optimizer is optimizer
        wrapper = "none" if bare else type(self.deepspeed.optimizer).__name__
        assert wrapper == plan.wrapper, (wrapper, plan.wrapper)
        decay = config.optimizer.ema_decay
        self.ema = None if decay is None else Ema(decay, state.steppable(self.deepspeed, optimizer))
        if self._scaler is not None:
            self._scaler.raise_error_at_min_scale = False  # what to do about it is train.max_bad_steps' decision

    @property
    def deepspeed(self) -> Any:
        """DeepSpeed's own engine."""
        return self.driver.deepspeed

    @property
    def parameters(self) -> list[Tensor]:
        return list(self.deepspeed.module.parameters())

    @property
    def _last_stage(self) -> bool:
        return self.groups.place.pp == self.plan.pp - 1

    def train_step(self, step: int, batches: Sequence[MicroBatch]) -> StepResult:
        """One step over this rank's micro-batches; `step` counts from 0 and keys dropout and the learning rate."""
        lr = lr_at(self.config.schedule, self.config.optimizer.lr, self.config.train.steps, step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        scale_can_fall = self._scaler is not None and self._scaler.cur_scale > self._scaler.min_scale
        loss = float(self.driver.train(step, batches, self._scale(batches), self._before_step))
        norm = float(self._own_norm if self.plan.wrapper == "none" else self.deepspeed.get_global_grad_norm())
        skipped = not math.isfinite(norm) if self.plan.wrapper == "none" else bool(self.deepspeed.optimizer.overflow)
        if self.ema is not None and not skipped:
            self.ema.update()
        return StepResult(loss, norm, skipped, lr, skipped and math.isfinite(loss) and scale_can_fall)

    @property
    def _scaler(self) -> Any | None:
        """What finds fp16's loss scale; None where that is fixed or there is none."""
        scaler = getattr(self.deepspeed.optimizer, "loss_scaler", None)
        return scaler if self.config.precision.dtype == "fp16" and getattr(scaler, "dynamic", False) else None

    def _scale(self, batches: Sequence[MicroBatch]) -> Tensor:
        """accumulation x dp / (labels that count in the step), where the loss is; elsewhere nobody reads it."""
        if not self._last_stage:
            return torch.zeros((), device=self.groups.device)
        count = torch.tensor(sum(counted(batch.labels) for batch in batches), dtype=torch.int64, device=self.groups.device)
        return token_scale(self.groups.sum_over_dp(count), len(batches) * self.plan.dp)

    def _before_step(self) -> bool:
        """Between reduction and step; False drops the step (non-finite gradients where no DeepSpeed wrapper would notice)."""
        if self.on_gradients is not None:
            self.on_gradients(reduced_gradients(self.parameters))
        if self.plan.wrapper != "none":
            return True
        parameters = self.parameters
        self._own_norm = global_norm(parameters, self.groups)
        if not math.isfinite(self._own_norm.item()):
            return False
        if self.config.optimizer.clip_grad_norm > 0:
            clip(parameters, self._own_norm, self.config.optimizer.clip_grad_norm)
        return True

    def evaluate(self, batches: Sequence[MicroBatch]) -> tuple[float, int]:
        """(sum of the losses, labels that count) over all dp ranks' batches; each rank brings the same number of batches."""
        device = self.groups.device
        loss = self.driver.evaluate(batches, torch.ones((), device=device))
        speaks = self._last_stage and self.groups.tp.rank == 0
        count = torch.tensor(sum(counted(batch.labels) for batch in batches) if speaks else 0, dtype=torch.int64)
        if self.groups.world_size > 1:
            dist.all_reduce(count, group=self.groups.control)
        return float(loss), int(count)

    def fragments(self) -> list[Fragment]:
        """Live views of this rank's masters and moments, for a checkpoint to read or to overwrite (then call `refresh`)."""
        state.allocate_state(self.deepspeed, self.optimizer)
        return state.fragments(self.deepspeed, self.optimizer, self.groups, self.ema)

    def counters(self) -> dict[str, Any]:
        """Everything besides tensors that a resumed run needs; JSON."""
        state.allocate_state(self.deepspeed, self.optimizer)
        engine = self.deepspeed
        counters = {"optimizer_step": state.optimizer_step(engine, self.optimizer)}
        counters |= {name: getattr(engine, name) for name in COUNTERS}
        if self.ema is not None:
            counters["ema_steps"] = self.ema.steps
        if self._scaler is not None:
            counters["loss_scaler"] = {name: getattr(self._scaler, name) for name in SCALER_STATE}
        return counters

    def refresh(self, counters: dict[str, Any]) -> None:
        """After `fragments` were overwritten from a checkpoint: counters set, working weights derived from the masters."""
        engine = self.deepspeed
        state.refresh(engine, self.optimizer, counters["optimizer_step"])
        for name in COUNTERS:
            setattr(engine, name, counters[name])
        # By its remainder DeepSpeed knows where a step ends. It is this layout's: the saved run may have had other micro-batches.
        engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
        if self.ema is not None:
            self.ema.restart(counters.get("ema_steps", 0))
        if self._scaler is not None and "loss_scaler" in counters:
            for name in SCALER_STATE:
                setattr(self._scaler, name, counters["loss_scaler"][name])


def build(config: Config, plan: Plan, groups: Groups, context: StepContext, layers: Sequence[LayerDescription]) -> Engine:
    """The engine for this plan: the pipeline's where pp > 1, else the sequential one."""
    with quiet():
        return _build(config, plan, groups, context, layers)


def _build(config: Config, plan: Plan, groups: Groups, context: StepContext, layers: Sequence[LayerDescription]) -> Engine:
    adopt_process_group()
    loss = TokenLoss(plan.vocab_size, groups.tp, config.kernels.cross_entropy, config.train.z_loss, config.train.label_smoothing)
    if plan.pp > 1:
        from megalm.engine.pipeline import Pipeline, StageModule
        with torch.no_grad():  # it broadcasts tied weights, and autograd must not see that
            model = StageModule(layers, groups, loss)
        driver = Pipeline
    else:
        from megalm.engine.sequential import Sequential, SequentialModel
        model, driver = SequentialModel(layers, loss).to(groups.device), Sequential
    for parameter in model.parameters():
        declared(parameter)  # a parameter without a kind would train with a wrong norm: found here, not in a loss curve
    optimizer = build_optimizer(config.optimizer, model.named_parameters(), {"deepspeed": fused_adam}, plan.zero_stage)
    return Engine(config, plan, groups, driver(model, optimizer, ds_config(config, plan), groups, context), optimizer)

"""PP = 1: the layer list as one module under DeepSpeed's plain engine, with ZeRO 0-3."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from megalm.data.loader import MicroBatch
from megalm.engine.grid import Grid
from megalm.engine.loss import TokenLoss
from megalm.model.description import LayerDescription
from megalm.parallel.groups import Groups
from megalm.parallel.random import StepContext


class SequentialModel(nn.Module):
    """The layers one after the other, the loss included: tokens [b, s], (labels [b, s], scale) -> fp32 scalar."""

    def __init__(self, descriptions: Sequence[LayerDescription], loss: TokenLoss | None):
        super().__init__()
        self.layers, self._calls, self._loss = nn.ModuleList(), [], loss
        tied: dict[str, nn.Module] = {}
        for description in descriptions:
            shared = tied.get(description.tied) if description.tied else None
            module = shared or description.build()
            if shared is None:
                self.layers.append(module)
            if description.tied:
                tied[description.tied] = module
            self._calls.append((len(self.layers) - 1 if shared is None else list(self.layers).index(shared), description.forward))

    def outputs(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(hidden_states [s/tp or s, b, h], head weight [V/tp, h])."""
        x = tokens
        for index, forward in self._calls:
            module = self.layers[index]
            x = module(x) if forward is None else forward(module, x)
        return x

    def forward(self, tokens: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
        return self._loss(self.outputs(tokens), (labels, scale))

    def head_weight(self) -> nn.Parameter:
        """The output embedding: the head's own or the tied one."""
        return self.layers[self._calls[-1][0]].weight


class Sequential:
    """Runs the micro-batches of a step through DeepSpeedEngine; the interface of engine.pipeline.Pipeline."""

    def __init__(self, model: SequentialModel, optimizer: torch.optim.Optimizer, config: dict, groups: Groups,
                 context: StepContext):
        from deepspeed.runtime.config import DeepSpeedConfig
        from deepspeed.runtime.zero import register_external_parameter

        from megalm.engine.reduction import FrugalReduction

        grid = Grid(groups)
        if config["zero_optimization"]["stage"] == 3:
            # The loss reads the head's weight after the head has returned it, outside the head's own forward.
            register_external_parameter(model, model.head_weight())
        self.deepspeed = FrugalReduction(args=None, model=model, optimizer=optimizer, mpu=grid, config=config,
                                         config_class=DeepSpeedConfig(config, grid), dont_change_device=True)
        self._context, self._groups = context, groups

    def train(self, step: int, batches: Sequence[MicroBatch], scale: Tensor, before_step: Callable[[], bool]) -> Tensor:
        """One optimizer step; the loss, fp32 scalar, before the sum over dp. `before_step` False: the step is dropped."""
        engine, device = self.deepspeed, self._groups.device
        engine.train()
        total = torch.zeros((), dtype=torch.float32, device=device)
        for index, batch in enumerate(batches):
            self._context.set(step, batch.samples.to(device, non_blocking=True), batch.document_starts)
            loss = engine(batch.tokens.to(device), batch.labels.to(device), scale)
            engine.backward(loss)
            total += loss.detach()
            if index == len(batches) - 1 and not before_step():
                self._drop_step()
            else:
                engine.step()
        total /= len(batches) * self._groups.plan.dp
        return self._groups.sum_over_dp(total)

    def _drop_step(self) -> None:
        """What engine.step() does with an overflown step, for the bare optimizer that checks no norm."""
        engine = self.deepspeed
        engine.zero_grad()
        engine.micro_steps += 1
        engine.global_steps += 1
        engine.skipped_steps += 1
        engine.global_samples += engine.train_batch_size()

    @torch.no_grad()
    def evaluate(self, batches: Sequence[MicroBatch], scale: Tensor) -> Tensor:
        """Sum of the losses of this dp rank's batches, then over dp: fp32 scalar."""
        engine, device = self.deepspeed, self._groups.device
        engine.eval()
        total = torch.zeros((), dtype=torch.float32, device=device)
        for batch in batches:
            self._context.set(0, batch.samples.to(device, non_blocking=True), batch.document_starts)
            total += engine(batch.tokens.to(device), batch.labels.to(device), scale)
        return self._groups.sum_over_dp(total)

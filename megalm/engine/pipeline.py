"""PP > 1: the layer list under DeepSpeed's pipeline engine (1F1B), with ZeRO 0-1.

Three instructions of its schedule are ours: the forward sets the step context first, the gradient reduction completes
partial gradients over tp before the data-parallel sum, and the optimizer step offers the reduced gradients first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from megalm.data.loader import MicroBatch
from megalm.engine.loss import TokenLoss
from megalm.engine.reduction import FrugalReduction
from megalm.model.description import LayerDescription
from megalm.parallel.groups import Groups
from megalm.parallel.random import StepContext
from megalm.parallel.sharding import Kind, declared


class _Spec(LayerSpec):
    """DeepSpeed's delayed layer, around one of ours."""

    def __init__(self, description: LayerDescription):
        super().__init__(nn.Module)
        self._description = description

    def build(self, log: bool = False) -> nn.Module:
        return self._description.build()


class _TiedSpec(TiedLayerSpec):
    def __init__(self, description: LayerDescription):
        key = description.tied.replace(".", "_")  # a module's name has no dot
        super().__init__(key, nn.Module, forward_fn=description.forward, tied_weight_attr=["weight"])
        self._description = description

    def build(self, log: bool = False) -> nn.Module:
        return self._description.build()


class StageModule(PipelineModule):
    """The layers of this rank's stage, by the plan's bounds rather than DeepSpeed's own partition."""

    def __init__(self, descriptions: Sequence[LayerDescription], groups: Groups, loss: TokenLoss):
        self._plan_bounds = groups.plan.stages
        plan = groups.plan
        super().__init__([_TiedSpec(d) if d.tied else _Spec(d) for d in descriptions], loss_fn=loss,
                         topology=PipeModelDataParallelTopology(num_pp=plan.pp, num_mp=plan.tp, num_dp=plan.dp))

    def forward(self, inputs: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """This stage's layers; on the last stage (hidden_states, weight) for the loss."""
        outputs = super().forward(inputs)
        if isinstance(outputs, tuple):
            # DeepSpeed hooks what a stage returns and clears the half-precision gradients when the first hook fires. A leaf
            # gets no hook: the weight's gradient would arrive first and be cleared. A view gets one.
            hidden, weight = outputs
            outputs = hidden, weight.view_as(weight)
        return outputs

    def _partition_layers(self, method: str = "uniform") -> None:
        stage = self._topo.get_coord(self.global_rank).pipe
        self.parts = list(self._plan_bounds)
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])


class StageEngine(FrugalReduction, PipelineEngine):
    """PipelineEngine with our three instructions."""

    def attach(self, groups: Groups, context: StepContext) -> None:
        """What the instructions need, beyond what DeepSpeed's constructor takes."""
        self._groups, self._context = groups, context
        self._partial = [p for p in self.module.parameters() if declared(p).kind is Kind.PARTIAL]
        self._places: Iterator[tuple[int, Tensor, Tensor | None]] = iter(())
        self._before_step: Callable[[], bool] | None = None

    def begin(self, step: int, batches: Sequence[MicroBatch], before_step: Callable[[], bool] | None) -> None:
        # Under 1F1B and under the inference schedule alike a stage runs its forwards in the order 0, 1, 2, ...
        self._places = iter([(step, batch.samples.to(self._groups.device, non_blocking=True), batch.document_starts)
                             for batch in batches])
        self._before_step = before_step

    def _exec_forward_pass(self, buffer_id: int) -> None:
        self._context.set(*next(self._places))
        super()._exec_forward_pass(buffer_id)

    def _exec_reduce_grads(self) -> None:
        if self._groups.tp.size > 1:
            self._complete_partial_gradients()
        super()._exec_reduce_grads()

    def _complete_partial_gradients(self) -> None:
        """One flat all-reduce over tp; DeepSpeed itself never completes a partial gradient."""
        gradients = [p._hp_grad if self.using_bf16_optimizer else p.grad for p in self._partial]
        if not gradients:
            return
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat, group=self._groups.tp.group)
        for gradient, whole in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(whole.view_as(gradient))

    def _exec_optimizer_step(self, lr_kwargs=None) -> None:
        apply = self._before_step()
        assert apply, "every pipeline optimizer checks its own norm"
        super()._exec_optimizer_step(lr_kwargs)

    # The map holds functions: without these entries the overrides above would silently never be called.
    _INSTRUCTION_MAP = {
        **PipelineEngine._INSTRUCTION_MAP,
        schedule.ForwardPass: _exec_forward_pass,
        schedule.ReduceGrads: _exec_reduce_grads,
        schedule.OptimizerStep: _exec_optimizer_step,
    }


class Pipeline:
    """Runs the micro-batches of a step through StageEngine; the interface of engine.sequential.Sequential."""

    def __init__(self, model: StageModule, optimizer: torch.optim.Optimizer, config: dict, groups: Groups, context: StepContext):
        self.deepspeed = StageEngine(args=None, model=model, optimizer=optimizer, mpu=model.mpu(), config=config,
                                     config_class=DeepSpeedConfig(config, model.mpu()))
        self.deepspeed.attach(groups, context)
        self._groups = groups

    def train(self, step: int, batches: Sequence[MicroBatch], scale: Tensor, before_step: Callable[[], bool]) -> Tensor:
        """One optimizer step; the step's token-mean loss, on every stage."""
        self.deepspeed.begin(step, batches, before_step)
        return self.deepspeed.train_batch(_feed(batches, scale))

    def evaluate(self, batches: Sequence[MicroBatch], scale: Tensor) -> Tensor:
        """Sum of the losses of all dp ranks' batches, on every stage."""
        self.deepspeed.begin(0, batches, None)
        mean = self.deepspeed.eval_batch(_feed(batches, scale), num_micro_batches=len(batches))
        return mean * (len(batches) * self._groups.plan.dp)


def _feed(batches: Sequence[MicroBatch], scale: Tensor) -> Iterator[tuple[Tensor | None, tuple | None]]:
    """What the first stage (tokens) and the last one (labels, scale) take; a stage between never asks."""
    for batch in batches:
        yield batch.tokens, None if batch.labels is None else (batch.labels, scale)

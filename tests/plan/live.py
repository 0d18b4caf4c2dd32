"""What each rank of a job measures: the bytes of the tensors that its engine really holds."""
from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from pytest import MonkeyPatch
from torch import Tensor

from megalm.data import MicroBatch
from megalm.engine.engine import Engine, build
from megalm.engine.fragments import steppable
from megalm.model import layers
from megalm.ops import sdpa
from megalm.parallel.groups import start
from megalm.parallel.random import StepContext
from megalm.parallel.sharding import declared
from megalm.plan import Plan, make_plan
from tests.config.trees import config as small_config


def measure(rank: int, world_size: int, sections: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One step on random tokens; bytes as the plan counts them, and the parts that this rank declares."""
    config = small_config(**sections)
    plan = make_plan(config, world_size)
    groups = start(plan, torch.device("cpu"))
    context = Watch(config.train.seed)
    engine = build(config, plan, groups, context, layers(config, plan, groups.tp, context))
    context.engine = engine
    engine.on_gradients = lambda slices: context.look()
    engine.train_step(0, batches(plan, groups.place.dp, config.model.seq_length))
    stepped = steppable(engine.deepspeed, engine.optimizer)
    moments = [value for tensor in stepped for value in engine.optimizer.state[tensor].values()
               if torch.is_tensor(value) and value.dim() > 0]
    masters = [] if plan.wrapper == "none" else [tensor.detach() for tensor in stepped]
    parameters = engine.parameters
    return {
        "stage": groups.place.pp,
        "parameters": sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters),
        "weights": held(weights(engine, plan)),
        "gradients": context.most,
        "optimizer": held(masters) + held(moments),
        "parts": sorted((part.name, tuple(part.full_shape), part.dim, declared(parameter).kind.value)
                        for parameter in parameters for part in declared(parameter).parts),
    }


def saved_by_a_layer(rank: int, world_size: int, sections: dict[str, dict[str, Any]]) -> int:
    """Bytes that autograd keeps for the backward pass of one transformer layer, its weights apart; SDPA is called as on a GPU."""
    with MonkeyPatch.context() as patch:
        patch.setattr(sdpa, "kernel", partial(_kernel_of_a_gpu, sdpa.kernel))
        return _saved_by_a_layer(world_size, sections)


def _kernel_of_a_gpu(kernel: Callable[..., str], device: str, *call) -> str:
    return kernel("cuda", *call)


def _saved_by_a_layer(world_size: int, sections: dict[str, dict[str, Any]]) -> int:
    config = small_config(**sections)
    plan = make_plan(config, world_size)
    tp = start(plan, torch.device("cpu")).tp
    context = StepContext(config.train.seed)
    places = torch.arange(config.model.seq_length, dtype=torch.int32)
    context.set(0, torch.arange(plan.micro_batch), (places // 50 * 50).expand(plan.micro_batch, -1))
    layer = layers(config, plan, tp, context)[2].build()
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            saved.append(tensor)
        return tensor

    length = config.model.seq_length // (plan.tp if plan.sequence_parallel else 1)
    shape = (length, plan.micro_batch, config.model.hidden_size)
    hidden = torch.randn(shape, dtype=next(layer.parameters()).dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(hidden)
    return held(saved)


class Watch(StepContext):
    """Looks at the gradients before each forward of a step: the most that it ever saw is what is accumulated."""

    def __init__(self, seed: int):
        super().__init__(seed)
        self.engine: Engine | None = None
        self.most = 0

    def set(self, step: int, samples: Tensor, document_starts: Tensor | None = None) -> None:
        self.look()
        super().set(step, samples, document_starts)

    def look(self) -> None:
        if self.engine is not None:
            self.most = max(self.most, held(gradients(self.engine)))


def gradients(engine: Engine) -> list[Tensor]:
    """Every tensor in which gradients are kept right now."""
    wrapper = engine.deepspeed.optimizer
    found = [tensor for parameter in engine.parameters for tensor in (parameter.grad, getattr(parameter, "grad_accum", None))]
    found += getattr(wrapper, "fp32_groups_gradients_flat", [])
    found.append(getattr(wrapper, "grad_partitions_flat_buffer", None))
    for name in ("averaged_gradients", "all_grad_tensors"):
        for group in getattr(wrapper, name, {}).values():
            found += [] if group is None else list(group)
    return [tensor for tensor in found if tensor is not None]


def weights(engine: Engine, plan: Plan) -> list[Tensor]:
    """The tensors the model computes with; under ZeRO 3 the partitions, not what is gathered for the moment."""
    if plan.zero_stage == 3:
        return [parameter.ds_tensor for parameter in engine.parameters]
    return [parameter.detach() for parameter in engine.parameters]


def held(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' storages, each storage once: flat buffers count with their padding."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def batches(plan: Plan, dp_rank: int, seq_length: int) -> list[MicroBatch]:
    generator = torch.Generator().manual_seed(dp_rank)
    shape = (plan.micro_batch, seq_length)

    def tokens() -> Tensor:
        return torch.randint(0, plan.vocab_size, shape, generator=generator)

    return [MicroBatch(torch.arange(plan.micro_batch), tokens(), tokens()) for _ in range(plan.accumulation_steps)]

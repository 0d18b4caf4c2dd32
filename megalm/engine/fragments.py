"""What DeepSpeed's optimizer wrappers hold, as Fragments: live views of fp32 masters and moments by canonical part name.

Each wrapper flattens and pads differently; here is the one place that knows how. A range of a flat buffer is cut where a
parameter ends and where a part of a fused parameter ends, so that a fragment belongs to exactly one part.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megalm.checkpoint.fragment import Fragment
from megalm.engine.ema import Ema
from megalm.parallel.groups import Groups
from megalm.parallel.sharding import Kind, declared

MOMENTS = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "momentum_buffer": "momentum"}
MOMENTUM = ("SGD", "FusedSGD")
"""Optimizers that have a momentum at most and count no steps."""


class Counter(Enum):
    """Where an optimizer keeps the number of steps that it has applied."""

    TENSOR = "a tensor in the state of each stepped tensor"
    NUMBER = "an int there, of which only one in a parameter group is counted up"
    GROUP = "an int in each parameter group"


def counter_of(optimizer: torch.optim.Optimizer) -> Counter:
    """By who made it: torch, DeepSpeed (its FusedAdam) or NVIDIA apex."""
    made_by = type(optimizer).__module__.split(".", 1)[0]
    return {"apex": Counter.GROUP, "deepspeed": Counter.NUMBER}.get(made_by, Counter.TENSOR)


class Range(NamedTuple):
    """Elements [start, start + count) of a flattened parameter lie at [at, at + count) of `flat`, which the optimizer steps."""

    parameter: Tensor
    start: int
    count: int
    flat: Tensor
    at: int
    owned: bool


def fragments(engine: Any, optimizer: torch.optim.Optimizer, groups: Groups, ema: Ema | None = None) -> list[Fragment]:
    """Every piece of optimizer state on this rank, replicas included (marked as not owned)."""
    found = []
    whole = None if counter_of(optimizer) is Counter.TENSOR else optimizer_step(engine, optimizer)
    for piece in _ranges(engine, groups):
        replica = getattr(piece.parameter, "ds_pipe_replicated", False)
        counted = declared(piece.parameter).kind is Kind.SHARDED or groups.tp.rank == 0
        state = optimizer.state[piece.flat]
        found += _cut(piece, state, piece.owned and counted and not replica, _step(state) if whole is None else whole, ema)
    return found


def _cut(piece: Range, state: dict[str, Any], owned: bool, step: int | None, ema: Ema | None) -> Iterator[Fragment]:
    """One range as a Fragment for each part and role that it covers."""
    offset = 0
    for part in declared(piece.parameter).parts:
        first, last = max(offset, piece.start), min(offset + part.numel, piece.start + piece.count)
        if first < last:
            low, high = (part.start, part.stop) if part.dim is not None else (0, part.full_shape[0])
            at = piece.at + first - piece.start
            roles = {"master": piece.flat.detach()} | {role: state[key] for key, role in MOMENTS.items() if key in state}
            roles |= {"ema": ema.of(piece.flat)} if ema is not None else {}
            for role, values in roles.items():
                yield Fragment(part.name, role, part.full_shape, part.dim, low, high, first - offset,
                               values.view(-1)[at:at + last - first], owned, None if role in ("master", "ema") else step)
        offset += part.numel


def _step(state: dict[str, Any]) -> int | None:
    return int(state["step"]) if "step" in state else None


def _ranges(engine: Any, groups: Groups) -> Iterator[Range]:
    wrapper, parameters = engine.optimizer, list(engine.module.parameters())
    kind = type(wrapper).__name__
    if kind == "DeepSpeedZeroOptimizer_Stage3":
        for parameter in parameters:
            group, at, count = wrapper.grad_position[wrapper.get_param_id(parameter)]
            start = groups.place.dp * count
            valid = max(0, min(parameter.ds_numel - start, count))  # the rest of a partition is padding
            if valid:
                yield Range(parameter, start, valid, wrapper.fp32_partitioned_groups_flat[group], at, True)
    elif kind in ("DeepSpeedZeroOptimizer", "BF16_Optimizer"):
        bf16 = kind == "BF16_Optimizer"
        grouped = zip(wrapper.bf16_groups if bf16 else wrapper.bit16_groups,
                      wrapper.fp32_groups_flat_partition if bf16 else wrapper.single_partition_of_fp32_groups, strict=True)
        for members, flat in grouped:
            for parameter in members:
                mapping = parameter._hp_mapping
                if mapping is not None:
                    here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
                    yield Range(parameter, here.start, here.numel, flat, there.start, True)
    else:
        for parameter in parameters:  # no wrapper: the parameter is its own master, and each dp rank saves its share of it
            count = parameter.numel()
            edges = [count * rank // groups.plan.dp for rank in range(groups.plan.dp + 1)]
            for rank, (start, stop) in enumerate(zip(edges, edges[1:], strict=False)):
                if start < stop:
                    yield Range(parameter, start, stop - start, parameter, start, rank == groups.place.dp)


def steppable(engine: Any, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors that the optimizer steps: flat partitions under a wrapper, else the parameters."""
    if type(engine.optimizer).__name__ == "DeepSpeedZeroOptimizer_Stage3":
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return [tensor for group in optimizer.param_groups for tensor in group["params"]]


def allocate_state(engine: Any, optimizer: torch.optim.Optimizer) -> None:
    """Give every stepped tensor the state that the optimizer would make at its first step: zeros, step 0.

    A checkpoint can then be written and read at any step, a run whose first steps were all skipped included.
    """
    counter = counter_of(optimizer)
    for tensor in steppable(engine, optimizer):
        state = optimizer.state[tensor]
        if state:
            continue
        if type(optimizer).__name__ in MOMENTUM:
            if optimizer.param_groups[0]["momentum"]:
                state["momentum_buffer"] = torch.zeros_like(tensor.detach())
            continue
        if counter is Counter.TENSOR:
            on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
            state["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device if on_device else "cpu")
        elif counter is Counter.NUMBER:
            state["step"] = 0
        state["exp_avg"] = torch.zeros_like(tensor.detach())
        state["exp_avg_sq"] = torch.zeros_like(tensor.detach())


def optimizer_step(engine: Any, optimizer: torch.optim.Optimizer) -> int:
    """How many steps the optimizer has applied; it differs from the step count where steps were skipped."""
    counter = counter_of(optimizer)
    if counter is Counter.GROUP:
        steps = {group.get("step", 0) for group in optimizer.param_groups}
    else:
        steps = {_step(optimizer.state[tensor]) or 0 for tensor in steppable(engine, optimizer)}
        if counter is Counter.NUMBER and steps:
            steps = {max(steps)}
    assert len(steps) <= 1, f"tensors at different optimizer steps: {sorted(steps)}"
    return steps.pop() if steps else 0


@torch.no_grad()
def refresh(engine: Any, optimizer: torch.optim.Optimizer, step: int) -> None:
    """After masters and moments were overwritten: set the optimizer's step and derive the working weights again."""
    counter = counter_of(optimizer)
    for tensor in steppable(engine, optimizer):
        state = optimizer.state[tensor]
        if "step" in state and counter is Counter.TENSOR:
            state["step"].fill_(step)
        elif "step" in state:
            state["step"] = step
    if counter is Counter.GROUP and type(optimizer).__name__ not in MOMENTUM:
        for group in optimizer.param_groups:
            group["step"] = step
    wrapper = engine.optimizer
    if type(wrapper).__name__ == "DeepSpeedZeroOptimizer_Stage3":
        wrapper.checkpoint_event_prologue()
        for group in range(len(wrapper.fp32_partitioned_groups_flat)):
            wrapper._reassign_or_swap_out_partitioned_parameters(group)
        wrapper.checkpoint_event_epilogue()
    elif hasattr(wrapper, "update_lp_params"):
        wrapper.update_lp_params()

"""Bytes on one rank: weights, gradients and optimizer state as DeepSpeed 0.19.8 lays them out; the rest is estimated.

All tp ranks hold the same amount, as tp divides every sharded dim; so do dp ranks, as ZeRO pads its partitions to equal size.
ZeRO 2 without fp32 accumulation is the exception: a rank keeps the whole gradient of each parameter that its partition touches.

The optimizer's groups (with and without weight decay) are flattened one by one. ZeRO 1 and 2 and BF16_Optimizer pad each flat
group to a multiple of 2 dp elements (stage_1_and_2.py and bf16_optimizer.py, nccl_start_alignment_factor); ZeRO 3 pads each
parameter to a multiple of dp (partition_parameters.py, _padding_size). The optimizer's scalar step counts are left out.
"""
from __future__ import annotations

import itertools
from dataclasses import dataclass

from megalm.config import Config

from . import parameters
from .activations import WIDTH, activations
from .plan import Plan

REDUCE_BUCKET = 50_000_000  # elements; each backward pass allocates it whole, and DeepSpeed's own default is ten times this
ZERO3_PERSISTENT = 100_000   # elements, DeepSpeed's stage3_param_persistence_threshold: smaller parameters stay gathered


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank."""
    parameters: int     # elements this rank's layers hold before ZeRO splits them, a tied copy included
    weights: int        # as the model reads them, ZeRO's padding included
    gradients: int      # what is kept from one micro-batch to the next
    optimizer: int      # master weights and moments
    activations: int    # kept for the backward passes of all micro-batches in flight, and the recomputed layer
    working: int        # what comes and goes: the bucket gradients are reduced in, weights that ZeRO 3 has gathered

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.working


def memory(config: Config, plan: Plan) -> tuple[RankMemory, ...]:
    """One entry a stage: its fullest rank."""
    dp_ranks = range(plan.dp if plan.zero_stage == 2 else 1)
    stages = [[rank_memory(config, plan, pp, dp) for dp in dp_ranks] for pp in range(plan.pp)]
    return tuple(max(ranks, key=lambda held: held.total) for ranks in stages)


def rank_memory(config: Config, plan: Plan, pp: int, dp: int = 0) -> RankMemory:
    """The bytes on each tp rank of stage `pp` and data-parallel rank `dp`."""
    sizes = parameters.parameter_sizes(parameters.stage_parts(config, plan, pp), plan.tp)
    width = WIDTH[config.precision.dtype]
    weights, master = _state_elements(plan, sizes)
    return RankMemory(
        parameters=sum(size for size, _ in sizes.values()),
        weights=weights * width,
        gradients=_gradient_bytes(config, plan, sizes, dp),
        # Without ZeRO the weights are the master.
        optimizer=master * 4 * ((plan.zero_stage > 0) + moments(config)),
        activations=activations(config, plan, pp),
        working=_working(config, plan, pp))


def moments(config: Config) -> int:
    """fp32 values the optimizer keeps for each element, master weights apart."""
    return 2 if config.optimizer.name == "adamw" else int(config.optimizer.momentum > 0)


def _groups(sizes: dict[str, tuple[int, bool]]) -> list[list[int]]:
    """Sizes of the parameters of each optimizer group, in order."""
    return [[size for size, decays in sizes.values() if decays == which] for which in (True, False)]


def _padded(plan: Plan, group: list[int]) -> int:
    """Elements of a group's flat buffer."""
    alignment = 2 * plan.dp
    return -(-sum(group) // alignment) * alignment


def _state_elements(plan: Plan, sizes: dict[str, tuple[int, bool]]) -> tuple[int, int]:
    """(weights, masters) in elements; moments come in the masters' number."""
    if plan.zero_stage == 0:
        count = sum(size for size, _ in sizes.values())
        return count, count
    if plan.zero_stage == 3:
        partition = sum(-(-size // plan.dp) for size, _ in sizes.values())
        return partition, partition
    flat = sum(_padded(plan, group) for group in _groups(sizes))
    return flat, flat // plan.dp


def _gradient_bytes(config: Config, plan: Plan, sizes: dict[str, tuple[int, bool]], dp: int) -> int:
    dtype, count = config.precision.dtype, sum(size for size, _ in sizes.values())
    if plan.wrapper == "BF16_Optimizer":
        # A whole flat fp32 buffer on every rank; unless asked to add each bf16 gradient to it at once, DeepSpeed keeps those too.
        kept = 0 if config.passed_on("bf16.immediate_grad_update", False) else 2 * count
        return 4 * sum(_padded(plan, group) for group in _groups(sizes)) + kept
    width = 2 if dtype == "fp16" else 4  # bf16 accumulates in fp32
    if plan.zero_stage == 3:
        return width * _state_elements(plan, sizes)[0]
    if plan.zero_stage < 2:
        return width * count
    if dtype == "bf16":
        return width * _state_elements(plan, sizes)[1]
    return width * sum(_touched(group, _padded(plan, group) // plan.dp, dp) for group in _groups(sizes))


def _touched(group: list[int], partition: int, dp: int) -> int:
    """Elements of the parameters that overlap [dp partition, (dp + 1) partition) of the flat buffer, and of its padding."""
    first, last = dp * partition, (dp + 1) * partition
    ends = list(itertools.accumulate(group))
    whole = sum(size for size, end in zip(group, ends, strict=True) if end > first and end - size < last)
    return whole + last - min(last, max(first, sum(group)))


def _working(config: Config, plan: Plan, pp: int) -> int:
    width, total = WIDTH[config.precision.dtype], 0
    if plan.wrapper.startswith("DeepSpeedZeroOptimizer"):
        total += int(config.passed_on("zero_optimization.reduce_bucket_size", REDUCE_BUCKET)) * width
    if plan.zero_stage == 3:
        layers = [parameters.parameter_sizes(parameters.layer_parts(config, plan, layer), plan.tp)
                  for layer in plan.stage_layers(pp)]
        # The layer at work and the next one, which is fetched meanwhile; and what always stays gathered.
        total += 2 * width * max(sum(size for size, _ in layer.values()) for layer in layers)
        total += width * sum(size for layer in layers for size, _ in layer.values() if size <= ZERO3_PERSISTENT)
    return total

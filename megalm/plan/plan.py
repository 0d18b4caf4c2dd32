"""From a config and a world size to the plan: every derived number, exact, or one error with all problems."""
from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megalm.config import Config

from . import batch, partition
from .backends import intended_backends, keeps_scores
from .errors import PlanError
from .topology import Place, Topology


@dataclass(frozen=True)
class Plan:
    """What follows from the config on a cluster of world_size ranks. The same on every rank."""
    world_size: int
    tp: int
    pp: int
    dp: int
    sequence_parallel: bool         # False where tp is 1
    zero_stage: int                 # the effective one: see notes
    micro_batch: int
    global_batch: int
    accumulation_steps: int         # micro-batches a replica runs in one step
    vocab_size: int
    padded_vocab_size: int
    layers: tuple[str, ...]         # embedding, position, layers.0 ... layers.N-1, final_norm, head
    stages: tuple[int, ...]         # pp + 1 bounds over layers
    wrapper: str                    # DeepSpeed's optimizer class, "none" for the bare optimizer
    bubble: float                   # share of a step in which a stage waits
    backends: dict[str, str]        # operation -> the kernel backend meant to run ("auto" where ops decide at start)
    notes: tuple[str, ...]          # what differs from the config's wording, and why

    @property
    def topology(self) -> Topology:
        return Topology(pp=self.pp, dp=self.dp, tp=self.tp)

    def place(self, rank: int) -> Place:
        """(pp, dp, tp) of a global rank."""
        return self.topology.place(rank)

    def rank(self, *, pp: int, dp: int, tp: int) -> int:
        """The global rank at a place."""
        return self.topology.rank(pp=pp, dp=dp, tp=tp)

    def tp_groups(self) -> list[list[int]]:
        """Every tp group's ranks, in the same order on every rank."""
        return self.topology.tp_groups()

    def dp_groups(self) -> list[list[int]]:
        """Every dp group's ranks, in the same order on every rank."""
        return self.topology.dp_groups()

    def stage_layers(self, pp: int) -> tuple[str, ...]:
        """Names of the layers that stage `pp` holds."""
        return self.layers[self.stages[pp]:self.stages[pp + 1]]

    def to_dict(self) -> dict[str, Any]:
        """For plan.json: plain JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(self).items()}


def make_plan(config: Config, world_size: int, vocab_size: int | None = None) -> Plan:
    """The plan for `world_size` ranks.

    vocab_size is the tokenizer's; model.vocab_size, where given, is used and must not be smaller. Raises PlanError with all
    problems.
    """
    parallel, model = config.parallel, config.model
    dp, world_problem = batch.data_parallel(world_size, parallel.tp, parallel.pp, parallel.dp)
    accumulation, batch_problem = batch.accumulation_steps(config.batch.global_, config.batch.micro, dp)
    vocabulary, vocab_problem = _vocabulary(model.vocab_size, vocab_size)
    # Without a dp the batch can't be judged.
    problems = [world_problem, None if world_problem else batch_problem, vocab_problem]
    if any(problems):
        raise PlanError(problem for problem in problems if problem)
    padded = batch.padded_vocabulary(vocabulary, model.vocab_multiple)
    counts = parallel.stages or partition.balance(model.num_layers, parallel.pp, partition.costs(config, padded))
    zero_stage = effective_zero_stage(config)
    bubble, backends = batch.bubble(parallel.pp, accumulation), intended_backends(config)
    return Plan(
        world_size=world_size, tp=parallel.tp, pp=parallel.pp, dp=dp,
        sequence_parallel=parallel.sequence_parallel and parallel.tp > 1, zero_stage=zero_stage,
        micro_batch=config.batch.micro, global_batch=config.batch.global_, accumulation_steps=accumulation,
        vocab_size=vocabulary, padded_vocab_size=padded,
        layers=partition.layer_names(model.num_layers), stages=partition.bounds(counts),
        wrapper=optimizer_wrapper(config.precision.dtype, zero_stage), bubble=bubble,
        backends=backends, notes=tuple(_notes(config, zero_stage, accumulation, bubble, backends)))


def effective_zero_stage(config: Config) -> int:
    """ZeRO 0 runs as 1 where DeepSpeed's stage 0 is wrong or missing: in a pipeline (it clips with the first stage's norm) and
    with bf16 or fp16 (no fp32 accumulation)."""
    if config.parallel.zero_stage == 0 and (config.parallel.pp > 1 or config.precision.dtype != "fp32"):
        return 1
    return config.parallel.zero_stage


def optimizer_wrapper(dtype: str, zero_stage: int) -> str:
    """The class DeepSpeed 0.19.8 wraps the optimizer in (engine.py, _do_optimizer_sanity_check), bf16 accumulating in fp32."""
    if zero_stage == 0:
        return "none"
    if zero_stage == 3:
        return "DeepSpeedZeroOptimizer_Stage3"
    return "BF16_Optimizer" if dtype == "bf16" and zero_stage == 1 else "DeepSpeedZeroOptimizer"


def _vocabulary(of_model: int | None, of_tokenizer: int | None) -> tuple[int, str | None]:
    if of_model is None and of_tokenizer is None:
        return 1, "model.vocab_size: missing, and no tokenizer tells it; give the number of tokens"
    if of_model is not None and of_tokenizer is not None and of_tokenizer > of_model:
        return 1, f"model.vocab_size: {of_model} is smaller than the tokenizer's vocabulary of {of_tokenizer}"
    return of_model or of_tokenizer, None


def _notes(config: Config, zero_stage: int, accumulation: int, bubble: float, backends: Mapping[str, str]) -> list[str]:
    parallel, notes = config.parallel, []
    if zero_stage != parallel.zero_stage:
        reason = "in a pipeline" if parallel.pp > 1 else f"with {config.precision.dtype}"
        notes.append(f"parallel.zero_stage {parallel.zero_stage} runs as {zero_stage} {reason}")
    if parallel.sequence_parallel and parallel.tp == 1:
        notes.append("parallel.sequence_parallel has no effect at parallel.tp = 1")
    attention = backends["attention"]
    if config.recompute.mode == "selective" and not keeps_scores(config, attention):
        notes.append(f"recompute.mode selective has nothing to recompute: attention by {attention} keeps no scores")
    if bubble > 0.25:
        notes.append(f"each stage waits {bubble:.0%} of a step: {accumulation} micro-batches in {parallel.pp} stages; "
                     "a larger batch.global or a smaller batch.micro shortens it")
    return notes

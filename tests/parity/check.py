"""Run a case on its ranks and hold it against the reference."""

from __future__ import annotations

from tests import dist
from tests.parity import compare, references
from tests.parity.cases import STEPS, Case
from tests.parity.job import train

TIMEOUT = 300  # seconds; a case takes a few


def expected_replicas(case: Case) -> dict[str, frozenset[str] | None]:
    """Along which axes ranks hold the same gradients and weights, each in its own memory; None: they hold none whole."""
    _, plan = references.config_and_plan(case)
    split = frozenset() if plan.wrapper in ("none", "BF16_Optimizer") else frozenset({"dp"})  # ZeRO leaves one copy of a gradient
    released = dict(case.zero).get("stage3_param_persistence_threshold") == 0
    return {"gradient": case.replicas - split, "weight": None if released else case.replicas}


def problems_of(case: Case, mutation: str | None = None, steps: int = STEPS) -> list[str]:
    """Everything in which the case, with one mechanism taken away where `mutation` names it, is not the reference's equal."""
    results = dist.run(train, case.world_size, case, mutation, steps, timeout=TIMEOUT)
    ours, problems = compare.gather(results)
    problems += compare.replica_problems(results, expected_replicas(case))
    if case.dtype == "bf16":
        serial = [references.record(case, micro, steps) for micro in (1, 2, 8)]
        return problems + compare.bf16_problems(ours, serial, references.record(case.serial("fp32"), steps=steps))
    return problems + compare.fp32_problems(ours, references.record(case, steps=steps))

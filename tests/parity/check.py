"""Run a case on its ranks and hold it against the reference."""

from __future__ import annotations

from tests import dist
from tests.parity import compare, references
from tests.parity.cases import STEPS, Case
from tests.parity.job import train

TIMEOUT = 300  # seconds; a case takes a few


def problems_of(case: Case, mutation: str | None = None, steps: int = STEPS) -> list[str]:
    """Everything in which the case, with one mechanism taken away where `mutation` names it, is not the reference's equal."""
    results = dist.run(train, case.world_size, case, mutation, steps, timeout=TIMEOUT)
    ours, problems = compare.gather(results)
    problems += compare.replica_problems(results, case.has_replicas)
    if case.dtype == "bf16":
        serial = [references.record(case, micro, steps) for micro in (1, 2, 8)]
        return problems + compare.bf16_problems(ours, serial, references.record(case.serial("fp32"), steps=steps))
    return problems + compare.fp32_problems(ours, references.record(case, steps=steps))

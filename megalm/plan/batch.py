"""World size and batch: every degree exact, or a line with all its numbers."""
from __future__ import annotations

from typing import Literal


def data_parallel(world_size: int, tp: int, pp: int, dp: int | Literal["auto"]) -> tuple[int, str | None]:
    """(dp, problem): dp = world size / (tp pp), as asked for where parallel.dp is a number."""
    if dp == "auto":
        if world_size % (tp * pp):
            return 1, (f"world size {world_size} is not divisible by parallel.tp x parallel.pp = {tp} x {pp} = {tp * pp}; "
                       f"the next that fit are {_neighbours(world_size, tp * pp)}")
        return world_size // (tp * pp), None
    if world_size != tp * pp * dp:
        return dp, (f"world size {world_size} is not parallel.tp x parallel.pp x parallel.dp = {tp} x {pp} x {dp} = "
                    f'{tp * pp * dp}; parallel.dp = "auto" takes what the cluster has')
    return dp, None


def accumulation_steps(global_batch: int, micro_batch: int, dp: int) -> tuple[int, str | None]:
    """(micro-batches a replica runs in one step, problem): global / (micro dp), exactly."""
    if global_batch % (micro_batch * dp):
        return 1, (f"batch.global = {global_batch} is not divisible by batch.micro x dp = {micro_batch} x {dp} = "
                   f"{micro_batch * dp}; the next that fit are {_neighbours(global_batch, micro_batch * dp)}")
    return global_batch // (micro_batch * dp), None


def bubble(pp: int, accumulation: int) -> float:
    """Share of a step in which a stage of a 1F1B pipeline waits (Narayanan et al. 2021, section 2.2, as a share of the whole)."""
    return (pp - 1) / (accumulation + pp - 1)


def padded_vocabulary(vocab_size: int, multiple: int) -> int:
    """The vocabulary rounded up; tp divides `multiple`, so the result doesn't depend on tp."""
    return -(-vocab_size // multiple) * multiple


def _neighbours(value: int, divisor: int) -> str:
    below = value // divisor * divisor
    return f"{below} and {below + divisor}" if below else str(divisor)

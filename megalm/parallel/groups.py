"""The groups of a plan's grid, as objects that are handed to whoever needs them; none is kept in a module."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megalm.parallel.world import DEFAULT_TIMEOUT, LaunchError, World, connect
from megalm.plan import Place, Plan


@dataclass(frozen=True)
class TensorParallel:
    """The tensor-parallel side of one rank: what a parallel layer needs to know.

    `complete_in_backward`: partial gradients are all-reduced over tp as they are made (pp = 1); otherwise the
    pipeline engine reduces them all at once before the data-parallel reduction.
    """

    rank: int = 0
    size: int = 1
    group: Any = None
    sequence_parallel: bool = False
    complete_in_backward: bool = False

    @property
    def shards_sequence(self) -> bool:
        """True when norms, dropout and residuals see s/tp positions only."""
        return self.sequence_parallel and self.size > 1

    def share(self, length: int) -> tuple[int, int]:
        """This rank's [start, stop) of `length` things split evenly over the tp ranks."""
        assert length % self.size == 0, (length, self.size)
        each = length // self.size
        return self.rank * each, (self.rank + 1) * each


@dataclass(frozen=True)
class Groups(World):
    """One rank's view of the job: its place in the plan's grid and the groups it belongs to."""

    plan: Plan
    place: Place
    tp: TensorParallel
    dp_group: Any

    def sum_over_dp(self, value: torch.Tensor) -> torch.Tensor:
        """Sum `value` in place over the data-parallel ranks of this stage and tp rank."""
        if self.plan.dp > 1:
            dist.all_reduce(value, group=self.dp_group)
        return value


def start(plan: Plan, device: torch.device | None = None, timeout: timedelta = DEFAULT_TIMEOUT,
          world: World | None = None) -> Groups:
    """Make this plan's groups among the ranks of `world` (default: those that the launcher started).

    Raises LaunchError when the launched world is not the planned one.
    """
    world = world or connect(device, timeout)
    if world.world_size != plan.world_size:
        raise LaunchError(f"the launcher started {world.world_size} ranks but the plan needs {plan.world_size} "
                          f"(tp {plan.tp} x pp {plan.pp} x dp {plan.dp})")
    tp_group = _own_group(plan.tp_groups(), world.rank, timeout)
    dp_group = _own_group(plan.dp_groups(), world.rank, timeout)
    place = plan.place(world.rank)
    tp = TensorParallel(place.tp, plan.tp, tp_group, plan.sequence_parallel, complete_in_backward=plan.pp == 1)
    return Groups(world.rank, world.world_size, world.device, world.control, plan, place, tp, dp_group,
                  made_here=world.made_here)


def _own_group(lists: list[list[int]], rank: int, timeout: timedelta) -> Any:
    """Make every listed group, in the same order on all ranks, and return the one that holds `rank`."""
    own = None
    for ranks in lists:
        group = dist.new_group(ranks, timeout=timeout)
        if rank in ranks:
            own = group
    return own

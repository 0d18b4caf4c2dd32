"""Process groups: starting torch.distributed and the few group-wide questions that training asks.

Every group is an object that is handed to whoever needs it; none is kept in a module.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megalm.plan import Place, Plan

T = TypeVar("T")
DEFAULT_TIMEOUT = timedelta(minutes=30)


class LaunchError(ValueError):
    """The ranks were not started as this run needs them."""


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
class Groups:
    """One rank's view of the job: its place in the plan's grid and the groups it belongs to."""

    rank: int
    plan: Plan
    place: Place
    device: torch.device
    tp: TensorParallel
    dp_group: Any
    control: Any

    @property
    def world_size(self) -> int:
        return self.plan.world_size

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value` (any small picklable object), in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def agree(self, problem: str | None) -> list[tuple[int, str]]:
        """(rank, problem) of every rank that reports one, known to all of them; empty when all went well."""
        return [(rank, text) for rank, text in enumerate(self.gather(problem)) if text]

    def agreed(self, work: Callable[[], T]) -> T:
        """Rank 0's result of `work`, which every rank runs. Where any rank's raised ValueError, all of them raise."""
        result, problem = None, None
        try:
            result = work()
        except ValueError as error:
            problem = error
        others = self.agree(str(problem) if problem else None)
        if problem is not None:
            raise problem
        if others:
            raise LaunchError("; ".join(f"rank {rank}: {text}" for rank, text in others))
        return self.broadcast(result)

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier(group=self.control)

    def any(self, flag: bool) -> bool:
        """True on every rank as soon as one rank's flag is."""
        if self.world_size == 1:
            return flag
        value = torch.tensor(int(flag), dtype=torch.int32)
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.control)
        return bool(value.item())

    def broadcast(self, value: Any, source: int = 0) -> Any:
        """`source`'s picklable object on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=source, group=self.control)
        return box[0]

    def sum_over_dp(self, value: torch.Tensor) -> torch.Tensor:
        """Sum `value` in place over the data-parallel ranks of this stage and tp rank."""
        if self.plan.dp > 1:
            dist.all_reduce(value, group=self.dp_group)
        return value

    def once_per_filesystem(self, work: Callable[[], None], folder: Path) -> None:
        """Run `work` on exactly one rank of each set of ranks that see the same `folder`; the others wait for it.

        Ranks find out who shares a filesystem by leaving a marker each: node-local disks and shared ones both work.
        Raises LaunchError on every rank, naming the ranks, when the work met a ValueError or an OSError anywhere.
        """
        token = self.broadcast(secrets.token_hex(8))
        folder.mkdir(parents=True, exist_ok=True)
        marker = folder / f".megalm-{token}-{self.rank:06d}"
        marker.touch()
        self.barrier()
        first = min(folder.glob(f".megalm-{token}-*"))
        problem = None
        if first == marker:
            try:
                work()
            except (ValueError, OSError) as error:
                problem = str(error)
        problems = self.agree(problem)
        marker.unlink(missing_ok=True)
        if problems:
            raise LaunchError("; ".join(f"rank {rank}: {text}" for rank, text in problems))


def launched_world() -> int:
    """How many ranks the launcher started; 1 where there was none."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start(plan: Plan, device: torch.device | None = None, timeout: timedelta = DEFAULT_TIMEOUT) -> Groups:
    """Join the process group that the launcher described in the environment and make this plan's groups.

    An already initialised torch.distributed is adopted (tests fork ranks that joined through a file).
    Raises LaunchError when the launched world is not the planned one.
    """
    if device is None:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        _initialise(device, timeout)
    rank, world = dist.get_rank(), dist.get_world_size()
    if world != plan.world_size:
        raise LaunchError(f"the launcher started {world} ranks but the plan needs {plan.world_size} "
                         f"(tp {plan.tp} x pp {plan.pp} x dp {plan.dp})")
    tp_group = _own_group(plan.tp_groups(), rank, timeout)
    dp_group = _own_group(plan.dp_groups(), rank, timeout)
    control = dist.group.WORLD if device.type == "cpu" else dist.new_group(backend="gloo", timeout=timeout)
    place = plan.place(rank)
    tp = TensorParallel(place.tp, plan.tp, tp_group, plan.sequence_parallel, complete_in_backward=plan.pp == 1)
    return Groups(rank, plan, place, device, tp, dp_group, control)


def _initialise(device: torch.device, timeout: timedelta) -> None:
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "0" if os.environ["WORLD_SIZE"] == "1" else "29500")
    if os.environ["MASTER_ADDR"] in ("127.0.0.1", "localhost"):
        # One host: gloo would otherwise listen on whatever the host name resolves to, which may be no interface of ours.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = os.environ.get("MEGALM_STORE")  # the local launcher's meeting place: a file, which unlike a port nobody can take
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", init_method=f"file://{store}" if store else "env://",
                            rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]), timeout=timeout)


def _own_group(lists: list[list[int]], rank: int, timeout: timedelta) -> Any:
    """Make every listed group, in the same order on all ranks, and return the one that holds `rank`."""
    own = None
    for ranks in lists:
        group = dist.new_group(ranks, timeout=timeout)
        if rank in ranks:
            own = group
    return own

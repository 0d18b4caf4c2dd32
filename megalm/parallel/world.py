"""All ranks of a job and the few questions that they ask together. Joining them reads the launcher's environment.

Whatever can go wrong on one rank alone is asked here, so that all ranks go on or all of them stop with the same message.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
DEFAULT_TIMEOUT = timedelta(minutes=30)
MEETING_SECONDS = 5.0
"""How often the ranks meet while one of them is at work."""


class LaunchError(ValueError):
    """The ranks were not started as this run needs them, or one of them can't go on."""


@dataclass(frozen=True)
class World:
    """This rank among all ranks. Every method is collective; `control` is a CPU group for small things.

    `made_here`: torch.distributed was started by `connect`, and so is ended by `leave`.
    """

    rank: int
    world_size: int
    device: torch.device
    control: Any
    made_here: bool = field(default=False, kw_only=True)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value` (any small picklable object), in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def broadcast(self, value: Any, source: int = 0) -> Any:
        """`source`'s picklable object on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=source, group=self.control)
        return box[0]

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier(group=self.control)

    def any(self, flag: bool) -> bool:
        """True on every rank as soon as one rank's flag is."""
        return bool(self.highest(int(flag))[0])

    def highest(self, *values: int) -> list[int]:
        """The largest of all ranks, of each of these integers; one small all-reduce."""
        if self.world_size == 1:
            return list(values)
        found = torch.tensor(values, dtype=torch.int32)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.control)
        return found.tolist()

    def agree(self, problem: str | None) -> list[tuple[int, str]]:
        """(rank, problem) of every rank that reports one, known to all of them; empty when all went well."""
        return [(rank, text) for rank, text in enumerate(self.gather(problem)) if text]

    def agreed(self, work: Callable[[], T]) -> T:
        """This rank's result of `work`. Where any rank's raised ValueError or OSError, all of them raise."""
        result, problem = None, None
        try:
            result = work()
        except (ValueError, OSError) as error:
            problem = error if isinstance(error, ValueError) else LaunchError(str(error))
        others = self.agree(str(problem) if problem else None)
        if problem is not None:
            raise problem
        if others:
            raise LaunchError("; ".join(f"rank {rank}: {text}" for rank, text in others))
        return result

    def from_first(self, work: Callable[[], T]) -> T:
        """Rank 0's result of `work`, which it alone runs; its ValueError or OSError is everybody's.

        It may take hours, longer than a collective waits: meanwhile, the ranks meet every few seconds.
        """
        if self.world_size == 1:
            return self.agreed(work)
        future: Future[T] = Future()
        if self.rank == 0:
            threading.Thread(target=_settle, args=(future, work), daemon=True).start()
        while not self.any(self.rank == 0 and bool(wait([future], MEETING_SECONDS).done)):
            pass
        return self.broadcast(self.agreed(lambda: future.result() if self.rank == 0 else None))

    def once_per_filesystem(self, work: Callable[[], None], folder: Path) -> None:
        """Run `work` on exactly one rank of each set of ranks that see the same `folder`; the others wait for it.

        Raises LaunchError on every rank, naming the ranks, when the work met a ValueError or an OSError anywhere.
        """
        with self._marked(folder) as seen:
            self.agreed(lambda: work() if min(seen) == self.rank else None)

    def require_shared(self, folder: Path, key: str) -> None:
        """Raise LaunchError on every rank unless all of them see the same `folder`, the value of config key `key`."""
        with self._marked(folder) as seen:
            missing = sorted(set(range(self.world_size)) - set(seen))
            self.agreed(lambda: _refuse_unshared(folder, key, missing))

    def leave(self) -> None:
        """The end of what the ranks do together: nobody leaves before all have come here, and nothing is on its way any more."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.barrier()
        if self.made_here:
            dist.destroy_process_group()

    @contextlib.contextmanager
    def _marked(self, folder: Path) -> Iterator[list[int]]:
        """The ranks that see what this one writes into `folder`: each leaves a marker while this lasts."""
        token = self.broadcast(secrets.token_hex(8))
        marker = folder / f".megalm-{token}-{self.rank:06d}"
        try:
            self.agreed(lambda: (folder.mkdir(parents=True, exist_ok=True), marker.touch()))
            yield [int(path.name.rpartition("-")[2]) for path in folder.glob(f".megalm-{token}-*")]
        finally:
            with contextlib.suppress(OSError):
                marker.unlink(missing_ok=True)


def _settle(future: Future[T], work: Callable[[], T]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:  # it is raised where the result is asked for
        future.set_exception(error)


def _refuse_unshared(folder: Path, key: str, missing: list[int]) -> None:
    if missing:
        raise LaunchError(f"{key} {folder} must be on a file system that all ranks share: "
                          f"what is written here isn't seen by {len(missing)} of them, rank {missing[0]} first")


def connect(device: torch.device | None = None, timeout: timedelta = DEFAULT_TIMEOUT) -> World:
    """Join the process group that the launcher described in the environment.

    An already initialised torch.distributed is adopted (tests fork ranks that joined through a file).
    """
    if device is None:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    made_here = not dist.is_initialized()
    if made_here:
        _initialise(device, timeout)
    control = dist.group.WORLD if device.type == "cpu" else dist.new_group(backend="gloo", timeout=timeout)
    return World(dist.get_rank(), dist.get_world_size(), device, control, made_here=made_here)


def join(store: Path, rank: int, world_size: int, timeout: timedelta = DEFAULT_TIMEOUT) -> None:
    """Become rank `rank` of `world_size` processes of this host that meet at the file `store`, on CPU, under no launcher."""
    given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size, "LOCAL_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in given.items()}, MEGALM_STORE=str(store), MASTER_ADDR="127.0.0.1")
    _initialise(torch.device("cpu"), timeout)


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

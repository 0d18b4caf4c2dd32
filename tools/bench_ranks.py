"""Contenders of a benchmark: each its own set of forked processes that compute on command and block in between.

The parent has imported everything (engine.warm) and computed nothing, so a contender starts in the time that it takes to
build its model. A process that waits for a command reads a pipe and uses no processor. All waits are bounded, and the
kernel ends the processes when the parent ends.
"""
from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.multiprocessing import _prctl_pr_set_pdeathsig as set_parent_death_signal

from megalm.parallel.world import join

START_SECONDS = 300
TURN_SECONDS = 300  # the first turn may compile
TAIL_LINES = 20

Step = Callable[[], float]
"""One training step; returns its loss."""


class ContenderFailed(ValueError):
    """A process raised, ended or did not answer in time; the end of its output is on stderr."""


@dataclass(frozen=True)
class Turn:
    """One turn of a contender: seconds on the clock, processor seconds of all its ranks, the last step's loss."""

    seconds: float
    cpu_seconds: float
    loss: float


class Contender:
    """`world` forked ranks, each of which calls `make(rank)` once and then the step it got as often as it is told.

    Ranks of a contender share a gloo group and take `threads` threads each. `about` is what rank 0's `make` told of itself.
    """

    def __init__(self, name: str, make: Callable[[int], tuple[Step, dict[str, Any]]], world: int, threads: int):
        self.name, self.world = name, world
        self._folder = tempfile.TemporaryDirectory(prefix="megalm-bench-")
        self._pids: list[int] = []
        self._pipes: list[Connection] = []
        try:
            for rank in range(world):
                self._fork(rank, make, threads)
            self.about: dict[str, Any] = [self._hear(rank, START_SECONDS) for rank in range(world)][0]
        except BaseException:
            self.close()
            raise

    def _fork(self, rank: int, make: Callable, threads: int) -> None:
        ours, theirs = Pipe()
        parent, folder = os.getpid(), Path(self._folder.name)
        pid = os.fork()
        if pid == 0:
            ours.close()
            _become_rank(parent, rank, self.world, threads, make, theirs, folder)
        theirs.close()
        self._pids.append(pid)
        self._pipes.append(ours)

    def turn(self, steps: int) -> Turn:
        """Have every rank run `steps` steps together. Raises ContenderFailed."""
        start = time.perf_counter()
        for pipe in self._pipes:
            pipe.send(steps)
        answers = [self._hear(rank, TURN_SECONDS) for rank in range(self.world)]
        return Turn(time.perf_counter() - start, sum(cpu for cpu, _ in answers), answers[-1][1])

    def _hear(self, rank: int, seconds: float) -> Any:
        pipe = self._pipes[rank]
        try:
            kind, value = pipe.recv() if pipe.poll(seconds) else ("failed", f"no answer within {seconds:.0f} s")
        except (EOFError, ConnectionError):
            kind, value = "failed", "the process ended"
        if kind == "failed":
            output = (Path(self._folder.name) / f"rank_{rank}.log").read_text(errors="replace")
            print(*output.splitlines()[-TAIL_LINES:], sep="\n", file=sys.stderr, flush=True)
            raise ContenderFailed(f"{self.name}, rank {rank}: {value}")
        return value

    def close(self) -> None:
        """End the processes and wait for them."""
        for pipe in self._pipes:
            pipe.close()
        for pid in self._pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        self._pids, self._pipes = [], []
        self._folder.cleanup()

    def __enter__(self) -> Contender:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _become_rank(parent: int, rank: int, world: int, threads: int, make: Callable, pipe: Connection, folder: Path) -> NoReturn:
    """A forked process, from the fork to its end: its output goes to a file, its answers through the pipe."""
    set_parent_death_signal(signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends its ranks
    log = os.open(folder / f"rank_{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        torch.set_num_threads(threads)
        join(folder / "store", rank, world, timedelta(seconds=TURN_SECONDS))
        step, about = make(rank)
        pipe.send(("ready", about))
        while True:
            steps, before = pipe.recv(), time.process_time()
            for _ in range(steps):
                loss = step()
            pipe.send(("done", (time.process_time() - before, loss)))
    except EOFError:
        pass
    except BaseException as error:
        traceback.print_exc()
        sys.stderr.flush()
        pipe.send(("failed", f"{type(error).__name__}: {error}"))
    os._exit(0)  # no destructors: a process group that others have left may not go down quietly

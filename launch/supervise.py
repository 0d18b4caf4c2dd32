"""Watching the ranks of this machine until all have ended: signals, the first failure, nothing left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megalm.launch import output, process
from megalm.launch.output import say
from megalm.launch.process import descendants, describe_status, end_descendants, ignored
from megalm.launch.rank import INTERRUPTED, USER_ERROR
from megalm.parallel.process import SIGNALS
from megalm.parallel.stop import PREEMPTED, SECOND_SIGNAL_SECONDS, preempts

POLL_SECONDS = 0.05
GRACE_SECONDS = 5.0  # from the first failure to SIGKILL for the rest: time for their own last words
STOP_SECONDS = 2400.0  # from a polite stop to SIGKILL: a step and a checkpoint; ranks wait for each other at most 1800
LEAVE_SECONDS = 900.0  # from the first rank that ends well to SIGKILL for the rest: rank 0 may have a tracker to finish
FLUSH_SECONDS = 1.0  # where the job didn't end well: for the last of rank 0's output
LEFTOVER_SECONDS = 10.0  # for helpers of ranks that ended well (loggers that are still writing)
TAIL_LINES = 20
INSIST_SECONDS = SECOND_SIGNAL_SECONDS + 1.0  # from the first signal: the ranks have heard of that one a little later


@dataclass
class RankProcess:
    """A started rank: `place` is its place in the grid in words, `status` what waitpid said once it has ended."""

    rank: int
    pid: int
    place: str
    log: Path
    status: int | None = None

    @property
    def failed(self) -> bool:
        return self.status is not None and self.status != 0 and not self.preempted

    @property
    def preempted(self) -> bool:
        """It saved and left because the cluster asked."""
        return self.status is not None and os.WIFEXITED(self.status) and os.WEXITSTATUS(self.status) == PREEMPTED

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.place})"


class Interrupts:
    """SIGINT, SIGTERM, SIGHUP and SIGUSR1 of the launcher while ranks run, as a context manager.

    The first asks the ranks to save and leave. Two seconds or more later, a second SIGINT ends everything at once, and the
    ranks are told of a SIGTERM or SIGUSR1. One that the launcher was started to ignore (nohup, a shell's background job) stays
    ignored.
    """

    SIGNALS = SIGNALS

    def __init__(self) -> None:
        self.first: float | None = None
        self.by_a_person = False
        self.at_once = False
        self.insisted = False

    def __enter__(self) -> Interrupts:
        self._before = {number: signal.signal(number, self._handle) for number in self.SIGNALS if not ignored(number)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: object) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first = now
            self.by_a_person = not preempts(number)
        elif now - self.first >= SECOND_SIGNAL_SECONDS:
            self.at_once |= number == signal.SIGINT
            self.insisted |= preempts(number)


def supervise(ranks: Sequence[RankProcess], interrupts: Interrupts) -> int:
    """Wait for every rank; returns the exit code of the job: 0 if all ended with 0, PREEMPTED if they left because the cluster
    asked (the ranks are told of a Ctrl-C by a SIGTERM too).

    When a rank fails, its place, its exit code or signal and the end of its log are printed, and the others are
    SIGKILLed after a short grace: a SIGTERM would ask them to save together with a rank that is gone. Ranks that go on for
    too long after a polite stop, or after another has ended well, have failed.
    """
    first: RankProcess | None = None
    told = False
    patience = _Patience()
    while any(rank.status is None for rank in ranks):
        for rank in _ended(ranks):
            if rank.failed and first is None:
                first = rank
                patience.at_most(GRACE_SECONDS, f"{rank} had failed")
            else:
                patience.at_most(LEAVE_SECONDS, f"{rank} had ended")
        if interrupts.first is not None and not told:
            told = True
            _signal_all(ranks, signal.SIGTERM)
            say("stopping: the ranks save and leave at the next step (Ctrl-C again ends them at once)")
            patience.at_most(STOP_SECONDS, "they were asked to save and leave")
        if interrupts.insisted and time.monotonic() >= interrupts.first + INSIST_SECONDS:
            interrupts.insisted = False
            _signal_all(ranks, signal.SIGTERM)
        if interrupts.at_once or time.monotonic() >= patience.end:
            if first is None and not interrupts.at_once:
                running = ", ".join(str(rank) for rank in ranks if rank.status is None)
                say(f"{running} still ran {patience.reason}: killed")
            _kill(ranks)
            first = first or next((rank for rank in ranks if rank.failed), None)
        time.sleep(POLL_SECONDS)
    end_descendants(LEFTOVER_SECONDS if first is None and not interrupts.at_once else FLUSH_SECONDS)
    left = descendants(os.getpid())
    if left:
        say(f"left behind, since SIGKILL doesn't end them: {left}; they wait in the kernel, for a device or a file system")
    if interrupts.at_once:
        say("ended at once; the last checkpoint is whole")
        return INTERRUPTED
    if first is None:
        return PREEMPTED if any(rank.preempted for rank in ranks) and not interrupts.by_a_person else 0
    # A Ctrl-C may have ended every rank before the launcher heard of it.
    failed = [rank for rank in ranks if rank.failed]
    if (told or len(failed) == len(ranks)) and all(_was_interrupted(rank.status) for rank in failed):
        say("interrupted before training had begun; nothing was saved")
        return INTERRUPTED
    code = os.WEXITSTATUS(first.status) if os.WIFEXITED(first.status) else 128 + os.WTERMSIG(first.status)
    if not (code == USER_ERROR and ranks[0].status == first.status):  # then rank 0 has said on the console what is wrong
        _report(first, [rank for rank in failed if rank is not first])
    return code


@dataclass
class _Patience:
    """How long the ranks may still run, and why no longer: the nearest of several limits."""

    end: float = float("inf")
    reason: str = ""

    def at_most(self, seconds: float, since: str) -> None:
        end = time.monotonic() + seconds
        if end < self.end:
            self.end, self.reason = end, f"{seconds:.0f} s after {since}"


def _ended(ranks: Sequence[RankProcess]) -> list[RankProcess]:
    """The ranks that ended since the last call; those that a signal ended come first, as the others' failures follow from it."""
    ended = []
    for rank in ranks:
        if rank.status is None:
            pid, status = os.waitpid(rank.pid, os.WNOHANG)
            if pid:
                rank.status = status
                ended.append(rank)
    return sorted(ended, key=lambda rank: not os.WIFSIGNALED(rank.status))


def _signal_all(ranks: Sequence[RankProcess], number: int) -> None:
    for rank in ranks:
        if rank.status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.pid, number)


def _kill(ranks: Sequence[RankProcess]) -> None:
    """SIGKILL every rank that still runs, and wait for its end; one that the kernel keeps counts as ended by that."""
    _signal_all(ranks, signal.SIGKILL)
    deadline = time.monotonic() + process.KILL_SECONDS
    while any(rank.status is None for rank in ranks) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        _ended(ranks)
    for rank in ranks:
        if rank.status is None:
            rank.status = int(signal.SIGKILL)


def _was_interrupted(status: int) -> bool:
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status) in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    return os.WEXITSTATUS(status) == INTERRUPTED


def _report(first: RankProcess, others: Sequence[RankProcess]) -> None:
    lines = [f"{first} failed: {describe_status(first.status)}; the job has ended. The end of {first.log}:"]
    lines += [f"  | {line}" for line in output.tail(first.log, TAIL_LINES)]
    if others:
        lines.append(f"  (then {', '.join(f'rank {rank.rank}: {describe_status(rank.status)}' for rank in others)})")
    say("\n".join(lines))

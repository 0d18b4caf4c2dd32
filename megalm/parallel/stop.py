"""Stopping together: a signal to any rank becomes a decision of all of them at the end of a step.

SIGINT, SIGHUP (a lost terminal, which torchrun passes on), SIGTERM and SIGUSR1 (a cluster that takes its machines back: Slurm's
--signal) ask for a polite stop: save, then leave. Two seconds or more after the first, a second SIGINT ends the process at once,
and a SIGTERM or SIGUSR1 says that the cluster won't wait for what the next run can do; sooner, they change nothing, because
launchers send several. A signal that the process was started to ignore (nohup) stays ignored.
"""

from __future__ import annotations

import os
import signal
import time

from megalm.parallel.process import SIGNALS

PREEMPTED = 75
"""The exit code of a job that its cluster stopped and that would go on: sysexits.h's EX_TEMPFAIL, "try again later"."""
GOING_ON, POLITE, PREEMPTION = range(3)
"""What ranks were asked, the highest of all of them counting: nothing, to stop by a person, to stop by the cluster."""
SECOND_SIGNAL_SECONDS = 2.0  # terminals, launchers and impatient fingers repeat a signal; only a later one means more


class StopSignal:
    """Installed by `with`; the previous handlers come back afterwards."""

    def __init__(self) -> None:
        self._first: float | None = None
        self._kind, self._insisted = GOING_ON, False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._received)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _received(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = now
            self._kind = PREEMPTION if preempts(number) else POLITE
        elif now - self._first >= SECOND_SIGNAL_SECONDS:
            if number == signal.SIGINT:
                os._exit(128 + number)  # the user insists: no atexit, no collective that might wait for others
            self._insisted |= preempts(number)

    @property
    def asked(self) -> bool:
        """Whether this rank was asked to stop."""
        return self._first is not None

    @property
    def kind(self) -> int:
        """What this rank was asked first."""
        return self._kind

    @property
    def insisted(self) -> bool:
        """Whether the cluster asked later, too."""
        return self._insisted


def preempts(number: int) -> bool:
    """Whether the signal is how a cluster takes its machines back, and not a person at a terminal."""
    return number in (signal.SIGTERM, signal.SIGUSR1)

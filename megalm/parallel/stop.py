"""Stopping together: a signal to any rank becomes a decision of all of them at the end of a step.

SIGINT, SIGTERM and SIGHUP (a lost terminal, which torchrun passes on) ask for a polite stop: save, then leave. A second SIGINT
two seconds or more after the first ends the process at once; a SIGTERM after the first signal changes nothing, because
DeepSpeed's launcher sends both. A signal that the process was started to ignore (nohup) stays ignored.
"""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it imports torch, and the launcher, which doesn't, takes the number below
    from megalm.parallel.groups import Groups

SECOND_SIGINT_SECONDS = 2.0  # terminals and impatient fingers repeat a Ctrl-C; only a later one means "at once"


class StopSignal:
    """Installed by `with`; the previous handlers come back afterwards."""

    def __init__(self) -> None:
        self._first: float | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
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
        elif number == signal.SIGINT and now - self._first >= SECOND_SIGINT_SECONDS:
            os._exit(128 + number)  # the user insists: no atexit, no collective that might wait for others

    @property
    def asked(self) -> bool:
        """Whether this rank was asked to stop."""
        return self._first is not None

    def agreed(self, groups: Groups) -> bool:
        """True on every rank once any rank was asked to stop. Collective, once a step."""
        return groups.any(self.asked)

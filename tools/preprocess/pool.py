"""Parts made by several processes, which end when this one does, however it ends."""
from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from megalm.data.errors import DataError

from .inputs import Unit
from .job import Job, Worker

PR_SET_PDEATHSIG = 1  # prctl(2)
AHEAD = 3  # units a worker that may be done before the one that is waited for


class _InWorker:
    """The worker of a process, made by the pool's initializer."""

    worker: Worker

    @classmethod
    def start(cls, job: Job, parent: int) -> None:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before: nobody would send the signal
            os._exit(1)
        cls.worker = Worker(job)

    @classmethod
    def make(cls, number: int, unit: Unit) -> None:
        cls.worker(number, unit)


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """A process started inside never hears a Ctrl-C, which a terminal sends to workers too: they end when this one does. This one
    hears it afterwards: the mask alone would let another thread take it, and a worker would be left half-started."""
    heard: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if heard:
        signal.raise_signal(signal.SIGINT)


def make_parts(units: Iterable[tuple[int, Unit, bool]], job: Job, workers: int, own: Worker) -> Iterator[int]:
    """Make the part of every (number, unit, made already); yields the numbers in order, each when its part is there.

    A single worker is this process, with `own`. Raises what a worker raised, DataError if one dies.
    """
    if workers <= 1:
        for number, unit, made in units:
            if not made:
                own(number, unit)
            yield number
        return
    context = multiprocessing.get_context("spawn")  # the tokenizers' own threads don't survive a fork
    with ProcessPoolExecutor(workers, context, _InWorker.start, (job, os.getpid())) as pool:
        pending: deque = deque()
        try:
            for number, unit, made in units:
                with _without_interrupts():
                    pending.append((number, None if made else pool.submit(_InWorker.make, number, unit)))
                while len(pending) >= AHEAD * workers:
                    yield finished(*pending.popleft())
            while pending:
                yield finished(*pending.popleft())
        except BrokenProcessPool as error:
            raise DataError("a worker process died, perhaps for want of memory; the same command goes on, with fewer --workers "
                            "if you like") from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def finished(number: int, future) -> int:
    """The number of a part, when it is there."""
    if future is not None:
        future.result()
    return number

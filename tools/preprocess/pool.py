"""Parts made by several processes, which end when this one does, however it ends."""
from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace

from megalm.data.errors import DataError
from megalm.data.tokenizer import Tokenizer, load_tokenizer

from .job import Job, Worker
from .tasks import Task

PR_SET_PDEATHSIG = 1  # prctl(2)
AHEAD = 3  # tasks a worker that may be done before the one that is waited for
MOMENT = 0.5  # seconds between looks at the parts that are there


class _InWorker:
    """What a process works with, made by the pool's initializer."""

    job: Job
    tokenizer: Tokenizer
    worker: Worker | None = None

    @classmethod
    def start(cls, job: Job, parent: int) -> None:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before: nobody would send the signal
            os._exit(1)
        cls.job, cls.tokenizer = job, load_tokenizer(job.tokenizer)

    @classmethod
    def ready(cls) -> None:
        """Nothing: a process starts when there is something to do."""

    @classmethod
    def make(cls, task: Task, fast: bool, short: bool) -> None:
        if cls.worker is None:
            cls.worker = Worker(replace(cls.job, fast=fast, short=short), cls.tokenizer)
        for _ in cls.worker(task):
            pass


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


class Pool:
    """So many processes for the parts of a job, of which `fast` and `short` needn't be known yet: they start while that is found
    out. A single one is this process. Used as a context."""

    def __init__(self, job: Job, workers: int):
        self.job, self.workers = job, workers
        self.executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> Pool:
        if self.workers > 1:
            context = multiprocessing.get_context("spawn")  # the tokenizers' own threads don't survive a fork
            self.executor = ProcessPoolExecutor(self.workers, context, _InWorker.start, (self.job, os.getpid()))
            try:
                for _ in range(self.workers):
                    self._submit(_InWorker.ready)
            except BaseException:  # a Ctrl-C: this context is never left
                self.__exit__()
                raise
        return self

    def __exit__(self, *_) -> None:
        if self.executor is not None:
            self.executor.shutdown(wait=True, cancel_futures=True)

    def _submit(self, *call) -> Future:
        with _without_interrupts():
            return self.executor.submit(*call)

    def make(self, tasks: Iterable[Task], own: Worker) -> Iterator[None]:
        """Do all tasks; comes back when there may be new parts, the last time when all are there.

        `own` has the whole job, and does the tasks if this process is the only one. Raises what a worker raised, DataError if
        one dies.
        """
        if self.executor is None:
            for task in tasks:
                yield from own(task)
        else:
            yield from self._make(tasks, own.job.fast, own.job.short)
        yield

    def _make(self, tasks: Iterable[Task], fast: bool, short: bool) -> Iterator[None]:
        pending: deque[Future] = deque()
        try:
            for task in tasks:
                pending.append(self._submit(_InWorker.make, task, fast, short))
                while len(pending) >= AHEAD * self.workers:
                    await_first(pending)
                    yield
            while pending:
                await_first(pending)
                yield
        except BrokenProcessPool as error:
            raise DataError("a worker process died, perhaps for want of memory; the same command goes on, with fewer --workers "
                            "if you like") from error


def await_first(pending: deque[Future]) -> None:
    """Wait a moment for the first, which goes when it is done. Raises what it raised."""
    if wait([pending[0]], MOMENT).done:
        pending.popleft().result()

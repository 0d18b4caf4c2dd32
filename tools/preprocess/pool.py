"""Parts made by several processes, which end when this one does, however it ends."""
from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from megalm.data.errors import DataError
from megalm.data.tokenizer import Tokenizer

from .checking import Sample, in_shares
from .job import Job, Worker
from .tasks import Task

PR_SET_PDEATHSIG = 1  # prctl(2)
AHEAD = 3  # tasks a worker that may be done before the one that is waited for
SHARES = 8  # a worker, of the check's samples: some take longer than others
MOMENT = 0.5  # seconds between looks at the parts that are there
FOR_THE_PARENT = {signal.SIGINT, signal.SIGTERM}


class _InWorker:
    """What a process works with, made by the pool's initializer."""

    worker: Worker

    @classmethod
    def start(cls, job: Job, tokenizer: Tokenizer, parent: int) -> None:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before: nobody would send the signal
            os._exit(1)
        cls.worker = Worker(job, tokenizer)

    @classmethod
    def fast_one(cls) -> tuple[str, str]:
        return cls.worker.fast_one()

    @classmethod
    def compare(cls, samples: Sequence[Sample], short: bool) -> str | None:
        return cls.worker.compare(samples, short)

    @classmethod
    def make(cls, task: Task, fast: bool, short: bool) -> None:
        cls.worker.use(fast, short)
        for _ in cls.worker(task):
            pass


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """A process started inside never hears a Ctrl-C, which a terminal sends to workers too, nor a scheduler's SIGTERM: it ends
    when this one does. This one hears it afterwards: the mask alone would let another thread take it, and a worker would be left
    half-started."""
    heard: list[int] = []
    handlers = {number: signal.signal(number, lambda number, _: heard.append(number)) for number in FOR_THE_PARENT}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, FOR_THE_PARENT)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if heard:
        signal.raise_signal(heard[0])


@contextlib.contextmanager
def _naming_the_dead() -> Iterator[None]:
    """Raises DataError where a worker died."""
    try:
        yield
    except BrokenProcessPool as error:
        raise DataError("a worker process died, perhaps for want of memory; the same command goes on, with fewer --workers "
                        "if you like") from error


class Pool:
    """So many processes for the check and for the parts of a job; a single one is this process. Used as a context.

    They are forked, as long as this process has but one thread, from the tokenizer that is loaded here; the fast one each makes
    for itself, while this process looks for samples.
    """

    def __init__(self, job: Job, tokenizer: Tokenizer, workers: int):
        self.job, self.tokenizer, self.workers = job, tokenizer, workers
        self.own: Worker | None = None
        self.executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> Pool:
        if self.workers == 1:
            self.own = Worker(self.job, self.tokenizer)
            return self
        self.executor = ProcessPoolExecutor(self.workers, multiprocessing.get_context("fork"), _InWorker.start,
                                            (self.job, self.tokenizer, os.getpid()))
        try:
            with _without_interrupts():
                others = multiprocessing.active_children()
                self._fast_one = self.executor.submit(_InWorker.fast_one)  # the first task starts all processes
                self.processes = [child for child in multiprocessing.active_children() if child not in others]
        except KeyboardInterrupt as stop:  # this context is never left
            self.__exit__(type(stop))
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None = None, *_) -> None:
        """Waits for the parts that are in work, but not where somebody wants an end."""
        if self.executor is None:
            return
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            for process in self.processes:
                process.kill()
        self.executor.shutdown(wait=True, cancel_futures=True)

    def fast_one(self) -> tuple[str, str]:
        """The name of the fast tokenizer, or "" and why there is none. Raises DataError where a worker died."""
        if self.own is not None:
            return self.own.fast_one()
        with _naming_the_dead():
            return self._fast_one.result()

    def first_difference(self, samples: Sequence[Sample], short: bool) -> str | None:
        """The first of the samples of which the fast tokenizer gives other ids than the reference, in words, or how it fails;
        None for none. `short` as in Worker.use. Raises DataError where a worker died."""
        shares = in_shares(samples, SHARES * self.workers)
        if self.own is not None:
            return next(filter(None, (self.own.compare(share, short) for share in shares)), None)
        with _naming_the_dead():
            found = [self.executor.submit(_InWorker.compare, share, short) for share in shares]
            return next(filter(None, [future.result() for future in found]), None)

    def make(self, tasks: Iterable[Task], fast: bool, short: bool) -> Iterator[None]:
        """Do all tasks; comes back when there may be new parts, the last time when all are there.

        `fast`: the check has allowed the fast tokenizer. Raises what a worker raised, DataError if one dies.
        """
        if self.own is not None:
            self.own.use(fast, short)
            for task in tasks:
                yield from self.own(task)
        else:
            yield from self._make(tasks, fast, short)
        yield

    def _make(self, tasks: Iterable[Task], fast: bool, short: bool) -> Iterator[None]:
        pending: deque[Future] = deque()
        with _naming_the_dead():
            for task in tasks:
                pending.append(self.executor.submit(_InWorker.make, task, fast, short))
                while len(pending) >= AHEAD * self.workers:
                    await_first(pending)
                    yield
            while pending:
                await_first(pending)
                yield


def await_first(pending: deque[Future]) -> None:
    """Wait a moment for the first, which goes when it is done. Raises what it raised."""
    if wait([pending[0]], MOMENT).done:
        pending.popleft().result()

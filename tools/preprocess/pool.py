"""Parts made by several processes, which end when this one does, however it ends."""
from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from megalm.data.errors import DataError
from megalm.data.tokenizer import Tokenizer

from .checking import Sample, corpus_samples, in_shares
from .inputs import Unit
from .job import Job, Worker
from .tasks import Task

PR_SET_PDEATHSIG = 1  # prctl(2)
AHEAD = 3  # tasks a worker that may be done before the one that is waited for
SHARES = 8  # a worker, of the check's samples: some take longer than others
MOMENT = 0.5  # seconds between looks at the parts that are there
FOR_THE_PARENT = {signal.SIGINT, signal.SIGTERM}


class _InWorker:
    """What a process works with, as the pool's initializer has it."""

    worker: Worker

    @classmethod
    def start(cls, worker: Worker, parent: int) -> None:
        end_with(parent)
        cls.worker = worker

    @classmethod
    def compare(cls, samples: Sequence[Sample], short: bool) -> str | None:
        return cls.worker.compare(samples, short)

    @classmethod
    def make(cls, task: Task, fast: bool, short: bool) -> None:
        cls.worker.use(fast, short)
        for _ in cls.worker(task):
            pass


def end_with(parent: int) -> None:
    """Let the kernel end this process when its parent ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before: nobody would send the signal
        os._exit(1)


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


class Forked:
    """So many processes, forked at once: as long as this process has but one thread. Used as a context."""

    def __init__(self, count: int, initializer: Callable, arguments: tuple):
        self.executor = ProcessPoolExecutor(count, multiprocessing.get_context("fork"), initializer, arguments)

    def __enter__(self) -> Forked:
        try:
            with _without_interrupts():
                others = multiprocessing.active_children()
                self.executor.submit(os.getpid)  # the first task starts them all
                self.processes = [child for child in multiprocessing.active_children() if child not in others]
        except KeyboardInterrupt as stop:  # this context is never left
            self.__exit__(type(stop))
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None = None, *_) -> None:
        """Waits for the tasks that are in work, but not where somebody wants an end."""
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            for process in self.processes:
                process.kill()
        self.executor.shutdown(wait=True, cancel_futures=True)


def with_samples(job: Job, tokenizer: Tokenizer, units: Sequence[Unit], documents: int,
                 workers: int) -> tuple[Worker, list[Sample]]:
    """(what makes the parts, samples of so many documents); with several workers one looks for these while the other is made."""
    if workers == 1 or not documents:
        return Worker(job, tokenizer), corpus_samples(job.sources, units, job.policy, documents) if documents else []
    with _naming_the_dead(), Forked(1, end_with, (os.getpid(),)) as one:
        samples = one.executor.submit(corpus_samples, job.sources, units, job.policy, documents)
        return Worker(job, tokenizer), samples.result()


class Pool:
    """So many processes, with all that a worker has, for the check and for the parts; a single one is this process. Used as a
    context."""

    def __init__(self, worker: Worker, workers: int):
        self.worker, self.workers = worker, workers
        self.forked = Forked(workers, _InWorker.start, (worker, os.getpid())) if workers > 1 else None

    def __enter__(self) -> Pool:
        if self.forked is not None:
            self.forked.__enter__()
        return self

    def __exit__(self, *error) -> None:
        if self.forked is not None:
            self.forked.__exit__(*error)

    def first_difference(self, samples: Sequence[Sample], short: bool) -> str | None:
        """The first of the samples of which the fast tokenizer gives other ids than the reference, in words, or how it fails;
        None for none. `short` as in Worker.use. Raises DataError where a worker died."""
        shares = in_shares(samples, SHARES * self.workers)
        if self.forked is None:
            return next(filter(None, (self.worker.compare(share, short) for share in shares)), None)
        with _naming_the_dead():
            found = [self.forked.executor.submit(_InWorker.compare, share, short) for share in shares]
            return next(filter(None, [future.result() for future in found]), None)

    def make(self, tasks: Iterable[Task], fast: bool, short: bool) -> Iterator[None]:
        """Do all tasks; comes back when there may be new parts, the last time when all are there.

        `fast`: the check has allowed the fast tokenizer. Raises what a worker raised, DataError if one dies.
        """
        if self.forked is None:
            self.worker.use(fast, short)
            for task in tasks:
                yield from self.worker(task)
        else:
            yield from self._make(tasks, fast, short)
        yield

    def _make(self, tasks: Iterable[Task], fast: bool, short: bool) -> Iterator[None]:
        pending: deque[Future] = deque()
        with _naming_the_dead():
            for task in tasks:
                pending.append(self.forked.executor.submit(_InWorker.make, task, fast, short))
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

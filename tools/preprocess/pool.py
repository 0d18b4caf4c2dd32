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

from .checking import Sample, corpus_samples, in_shares
from .inputs import Unit
from .job import Job, Worker
from .tasks import Task

PR_SET_PDEATHSIG = 1  # prctl(2)
AHEAD_BYTES, MOST_AHEAD = 192 << 20, 12  # of text, and tasks, a worker, that may be done before the one that is waited for
SHARES = 8  # a worker, of the check's samples: some take longer than others
MOMENT = 0.5  # seconds between looks at the parts that are there
DIED = "a worker process died, perhaps for want of memory; the same command goes on, with fewer --workers if you like"
FORK = multiprocessing.get_context("fork")
FOR_THE_PARENT = {signal.SIGINT, signal.SIGTERM}


class _Ended(FORK.Process):
    """A process that ends at once when it is told to: it may wait for a lock that a dead one holds, and blocks SIGTERM."""

    def terminate(self) -> None:
        self.kill()


class _Context(type(FORK)):
    """What the executor starts its processes with; where one of them dies, it terminates the others and waits for them."""

    Process = _Ended


class _InWorker:
    """What a process works with, as the pool's initializer has it."""

    worker: Worker
    shares: Sequence[list[Sample]]

    @classmethod
    def start(cls, worker: Worker, shares: Sequence[list[Sample]], parent: int) -> None:
        end_with(parent)
        cls.worker, cls.shares = worker, shares

    @classmethod
    def compare(cls, share: int, short: bool) -> str | None:
        return cls.worker.compare(cls.shares[share], short)

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
        raise DataError(DIED) from error


def with_samples(job: Job, tokenizer: Tokenizer, units: Sequence[Unit], documents: int,
                 workers: int) -> tuple[Worker, list[Sample]]:
    """(what makes the parts, samples of so many documents); with several workers, a process looks for these meanwhile.

    Raises DataError where that process died, and what it raised.
    """
    if workers == 1 or not documents:
        return Worker(job, tokenizer), corpus_samples(job.sources, units, job.policy, documents) if documents else []
    receiver, sender = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_send_samples, args=(sender, os.getpid(), job, units, documents))
    try:
        with _without_interrupts():
            process.start()
        sender.close()
        worker, found = Worker(job, tokenizer), receiver.recv()
        if isinstance(found, Exception):
            raise found
        return worker, found
    except EOFError as error:
        raise DataError(DIED) from error
    finally:
        if process.is_alive():
            process.kill()
            process.join()
        receiver.close()


def _send_samples(sender, parent: int, job: Job, units: Sequence[Unit], documents: int) -> None:
    end_with(parent)
    try:
        found = corpus_samples(job.sources, units, job.policy, documents)
    except Exception as error:
        found = error
    sender.send(found)


class Pool:
    """So many processes for the check and for the parts; a single one is this process. Used as a context.

    They are forked at once, before this program starts a thread, and so have all that this process has: the tokenizers, and the
    samples, which nobody sends them. A library's thread may be there (the allocator's of pyarrow, for .parquet): that library
    has to bear a fork.
    """

    def __init__(self, worker: Worker, samples: Sequence[Sample], workers: int):
        """`samples`: what `first_difference` compares the fast tokenizer on."""
        self.worker, self.workers = worker, workers
        self.shares = list(in_shares(samples, SHARES * workers))
        self.executor: ProcessPoolExecutor | None = None
        self.processes: list[multiprocessing.Process] = []

    def __enter__(self) -> Pool:
        if self.workers == 1:
            return self
        self.executor = ProcessPoolExecutor(self.workers, _Context(), _InWorker.start, (self.worker, self.shares, os.getpid()))
        others = multiprocessing.active_children()
        try:
            with _without_interrupts():
                try:
                    self.executor.submit(os.getpid)  # the first task starts them all
                finally:  # or some, where the machine has no more
                    self.processes = [child for child in multiprocessing.active_children() if child not in others]
        except BaseException:  # this context is never left
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None = None, *_) -> None:
        """After an error waits for the parts that are in work; not where somebody wants an end, also while it waits."""
        if self.executor is None:
            return
        try:
            if kind is not None and not issubclass(kind, KeyboardInterrupt):
                self.executor.shutdown(wait=True, cancel_futures=True)
        finally:
            self._end()

    def _end(self) -> None:
        """No process stays, whatever it does."""
        try:
            with _without_interrupts():
                for process in self.processes:
                    process.kill()
        finally:
            self.executor.shutdown(wait=True, cancel_futures=True)
            for process in self.processes:
                process.join()

    def first_difference(self, short: bool) -> str | None:
        """The first of the samples of which the fast tokenizer gives other ids than the reference, in words, or how it fails;
        None for none. `short` as in Worker.use. Raises DataError where a worker died."""
        if self.executor is None:
            return next(filter(None, (self.worker.compare(share, short) for share in self.shares)), None)
        with _naming_the_dead():
            found = [self.executor.submit(_InWorker.compare, number, short) for number in range(len(self.shares))]
            return next(filter(None, [future.result() for future in found]), None)

    def make(self, tasks: Iterable[Task], fast: bool, short: bool) -> Iterator[None]:
        """Do all tasks; comes back when there may be new parts, the last time when all are there.

        `fast`: the check has allowed the fast tokenizer. Raises what a worker raised, DataError if one dies.
        """
        if self.executor is None:
            self.worker.use(fast, short)
            for task in tasks:
                yield from self.worker(task)
        else:
            yield from self._make(tasks, fast, short)
        yield

    def _make(self, tasks: Iterable[Task], fast: bool, short: bool) -> Iterator[None]:
        pending: deque[Future] = deque()
        ahead = max(3, min(MOST_AHEAD, AHEAD_BYTES // self.worker.job.unit_bytes))  # while this process waits for the disk
        with _naming_the_dead():
            for task in tasks:
                pending.append(self.executor.submit(_InWorker.make, task, fast, short))
                while len(pending) >= ahead * self.workers:
                    await_first(pending)
                    yield
            while pending:
                await_first(pending)
                yield


def await_first(pending: deque[Future]) -> None:
    """Wait a moment for the first, which goes when it is done. Raises what it raised."""
    if wait([pending[0]], MOMENT).done:
        pending.popleft().result()

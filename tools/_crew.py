"""A job's ranks as threads of one process: all that saving and loading ask of the process groups."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

WAIT_SECONDS = 20.0
"""After which a rank that waits for the others, or for its turn, waits in vain."""
CHANGE, FAVOUR = 0.1, 0.9
"""How often another rank becomes the one that may go first, and how often it does."""


class Killed(BaseException):
    """The end of a process: no handler may stop it."""


class Crew:
    """The process groups of `world_size` ranks that are threads of this process."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._said: list[Any] = [None] * world_size
        self._barrier = threading.Barrier(world_size, timeout=WAIT_SECONDS)

    def gather(self, rank: int, value: Any) -> list[Any]:
        self._said[rank] = value
        self.meet(rank)
        heard = list(self._said)
        self.meet(rank)
        return heard

    def member(self, rank: int) -> Groups:
        return Groups(rank, self)

    def run(self, work: Callable[[Groups], Any]) -> list[Any]:
        """work(groups) on every rank at once; each rank's result, or the exception that ended it."""
        results: list[Any] = [None] * self.world_size

        def one(rank: int) -> None:
            self.enter(rank)
            try:
                results[rank] = work(Groups(rank, self))
            except BaseException as error:  # a planted death is a result too
                results[rank] = error
            self.leave(rank, results[rank])

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    def meet(self, rank: int) -> None:
        """Return once every rank has come here."""
        self._barrier.wait()

    def enter(self, rank: int) -> None:
        """Before a rank's work."""

    def leave(self, rank: int, result: Any) -> None:
        """After it: those who would wait for a rank that has died needn't."""
        if isinstance(result, BaseException) and not isinstance(result, Exception):
            self._barrier.abort()


class Turns(Crew):
    """The same, one rank at a time: which goes on after each meeting, and wherever `turn` is called, `chance` draws, so that a
    seed repeats what happens. One is favoured for a while, so that any may be far ahead of the others.

    Where a rank has died, the others die when they should meet it, and at the latest after `grace` calls of `turn`, as they would
    by the hands of a launcher.
    """

    def __init__(self, world_size: int, chance: random.Random, grace: int | None = None) -> None:
        super().__init__(world_size)
        self._chance, self._grace, self._missed, self._favourite = chance, grace, False, 0
        self._alive, self._waiting = set(range(world_size)), set[int]()
        self._go = [threading.Semaphore(0) for _ in range(world_size)]
        self._wake()

    def turn(self, rank: int) -> None:
        """Let others go first, or not."""
        self._wake()
        self._sleep(rank)
        if self._missed and self._grace is not None:
            self._grace -= 1
            if self._grace < 0:
                raise Killed

    def meet(self, rank: int) -> None:
        self._waiting.add(rank)
        if len(self._waiting) == self.world_size:
            self._waiting.clear()
        self._wake()
        self._sleep(rank)
        if rank in self._waiting:
            raise Killed  # nobody is left to come

    def enter(self, rank: int) -> None:
        self._sleep(rank)

    def leave(self, rank: int, result: Any) -> None:
        self._missed |= isinstance(result, Killed)
        self._alive.remove(rank)
        self._waiting.discard(rank)
        self._wake()

    def _wake(self) -> None:
        """One of those that can go on; when none can, one of those that wait."""
        ready, chance = sorted(self._alive - self._waiting) or sorted(self._alive), self._chance
        if chance.random() < CHANGE:
            self._favourite = chance.randrange(self.world_size)
        if ready:
            is_favoured = self._favourite in ready and chance.random() < FAVOUR
            self._go[self._favourite if is_favoured else chance.choice(ready)].release()

    def _sleep(self, rank: int) -> None:
        if not self._go[rank].acquire(timeout=WAIT_SECONDS):
            raise Killed


@dataclass
class Groups:
    """One rank's side."""

    rank: int
    crew: Crew

    @property
    def world_size(self) -> int:
        return self.crew.world_size

    def gather(self, value: Any) -> list[Any]:
        return self.crew.gather(self.rank, value)

    def agree(self, problem: str | None) -> list[tuple[int, str]]:
        return [(index, text) for index, text in enumerate(self.gather(problem)) if text]

    def broadcast(self, value: Any) -> Any:
        return self.gather(value)[0]

    def highest(self, *values: int) -> list[int]:
        return [max(column) for column in zip(*self.gather(values), strict=True)]

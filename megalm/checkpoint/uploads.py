"""Copying whole checkpoints to checkpoint.remote beside training and saving, which never wait for it.

Each rank has one more process for it, of the kind that writes (writer.py). One checkpoint is on its way at most, and one may
wait, the newest: where the storage is slower than checkpoint.every, those between are left out, each with a line. How far the
copying is travels with the all-reduce that ranks make after every step. What fails, or gives no sign of life for long, is a
line, and its process is killed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from megalm.checkpoint.find import Report
from megalm.checkpoint.format import CHECKPOINTS, step_name
from megalm.checkpoint.jobs import Answer
from megalm.checkpoint.writer import COPIES, Writer

DONE, BUSY, FAILED = range(3)
"""How far a rank's process is, such that the highest of all ranks says what to do."""
SILENT_SECONDS = 900.0
"""A process that has moved no byte for so long hangs."""
LOOK_SECONDS, TELL_SECONDS = 1.0, 10.0
WITHDRAW, UPLOAD, COMPLETE = "withdraw", "upload", "complete"
"""Rank 0 takes back what is there under that name, every rank copies its files, rank 0 makes a checkpoint of them."""
AFTER = {WITHDRAW: UPLOAD, UPLOAD: COMPLETE, COMPLETE: None}


class Ranks(Protocol):
    """What copying needs of the process groups."""

    rank: int

    @property
    def world_size(self) -> int: ...

    def agree(self, problem: str | None) -> list[tuple[int, str]]: ...

    def highest(self, *values: int) -> list[int]: ...


def retention_of(config: Any) -> dict[str, int]:
    """Which checkpoints a Config keeps, as retain.Retention takes it."""
    rule = config.checkpoint
    return {"keep": rule.keep, "every": rule.keep_every, "best": rule.keep_best}


def uploads_of(run_folder: str | Path, groups: Ranks, config: Any, report: Report) -> Uploads:
    """The copies of a run's checkpoints, as its Config has them."""
    return Uploads(Path(run_folder) / CHECKPOINTS, groups, config.checkpoint.remote, retention_of(config), report)


class Uploads:
    """The copies of one run's checkpoints below `root` at `url` (None: none). Every method but `state`, `steps` and `close` is
    collective: all ranks call it together."""

    def __init__(self, root: Path, groups: Ranks, url: str | None, retention: Mapping[str, int], report: Report) -> None:
        self._root, self._groups, self._url, self._retention, self._report = root, groups, url, retention, report
        self._step: int | None = None
        self._waiting: int | None = None
        self._earlier: int | None = None
        self._phase: str | None = None
        self._answer: Answer | None = None
        self._process: Writer | None = None
        self._sent = 0.0

    @property
    def steps(self) -> list[int]:
        """Of the checkpoints that are still needed here: the one on its way and the one that waits."""
        return [step for step in (self._step, self._waiting) if step is not None]

    @property
    def state(self) -> int:
        """DONE, BUSY or FAILED: this rank's own, for the ranks to find the highest of."""
        if self._phase is None:
            return DONE
        if self._look() is None:
            return BUSY
        return FAILED if self._answer.problem else DONE

    def offer(self, step: int, earlier: bool = False) -> None:
        """Copy this whole checkpoint, once the one on its way is there; one that waits gives way. `earlier`: an earlier run
        saved it, and may have copied it."""
        if self._url is None:
            return
        if earlier or step == self._earlier:
            self._earlier = step if earlier else None
        if self._phase is None:
            self._step = step
            self._begin(WITHDRAW)
            return
        if self._waiting is not None:
            self._report(f"{step_name(self._waiting)} isn't copied to {self._url}, which is behind: {step_name(step)} will be")
        self._waiting = step

    def progress(self, highest: int) -> None:
        """Go on as the `highest` state of all ranks allows, without waiting."""
        if self._phase is None or highest == BUSY:
            return
        for note in self._answer.notes if self._answer else ():
            self._report(note)
        if highest == FAILED:
            problems = self._groups.agree(self._answer.problem if self._answer else None)
            self._stop("; ".join(f"rank {rank} failed {text}" for rank, text in problems))
        elif AFTER[self._phase] is not None:
            self._begin(AFTER[self._phase])
            return
        self._step, self._waiting, self._phase = self._waiting, None, None
        if self._step is not None:
            self._begin(WITHDRAW)

    def finish(self, must_leave: Callable[[], bool] = lambda: False) -> None:
        """Wait until nothing is on its way any more, or any rank must leave. A long wait is told."""
        tell_at: float | None = time.monotonic() + TELL_SECONDS
        while self._phase is not None:
            if tell_at is not None and time.monotonic() > tell_at:
                self._report(f"waiting until {step_name(self._step)} is in {self._url}; it is whole in {self._root}")
                tell_at = None
            if self._answer is None:
                self._answer = self._process.answer(LOOK_SECONDS)
            highest, leaving = self._groups.highest(self.state, int(must_leave()))
            if leaving:
                self.give_up("the run had to leave; the next one copies it")
            else:
                self.progress(highest)

    def drop(self, step: int) -> None:
        """This step is about to be saved again."""
        if step == self._step:
            self.give_up("it is saved again")
        elif step == self._waiting:
            self._waiting = None

    def give_up(self, why: str) -> None:
        """What is on its way, and what waits, isn't copied."""
        if self._phase is not None:
            self._stop(why)
            if self._waiting is not None:
                self._report(self._left(self._waiting, why))
        self._step = self._waiting = self._phase = None

    def close(self) -> None:
        """End this rank's process; what `finish` hasn't waited for isn't there."""
        if self._process is not None:
            self._process.close()
        self._process = None

    def _begin(self, phase: str) -> None:
        """All ranks are done with the phase before."""
        self._phase, self._answer, self._sent = phase, None, time.monotonic()
        groups = self._groups
        if groups.rank != 0 and phase != UPLOAD:
            self._answer = Answer()
            return
        jobs: dict[str, dict[str, Any]] = {
            WITHDRAW: {"again": self._step != self._earlier}, UPLOAD: {"rank": groups.rank, "ranks": groups.world_size},
            COMPLETE: {"retention": self._retention}}
        try:
            self._process = self._process or Writer(self._root, 0, COPIES)
        except OSError as error:
            self._answer = Answer(f"starting a process to copy it: {error}")
            return
        self._process.send(phase, url=self._url, step=self._step, **jobs[phase])

    def _look(self) -> Answer | None:
        """The answer of this rank's process, if there is one by now; a process that hangs is one."""
        if self._answer is None:
            self._answer = self._process.answer()
            silent = time.monotonic() - max(self._sent, self._process.heard)
            if self._answer is None and silent > SILENT_SECONDS:
                self._answer = Answer(f"copying it: nothing has moved for {silent:.0f} s")
        return self._answer

    def _stop(self, why: str) -> None:
        self._report(self._left(self._step, why))
        self.close()  # also one that has answered: it would keep credentials that have expired

    def _left(self, step: int, why: str) -> str:
        return f"{step_name(step)} isn't in {self._url}, only in {self._root}: {why}"

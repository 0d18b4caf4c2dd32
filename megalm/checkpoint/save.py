"""Save so that a checkpoint is either whole or invisible, while the training goes on.

Each rank copies what it owns and hands the copy to its writer (writer.py), or writes it itself where the training waits
anyway. How the writers fare travels with the one small all-reduce that ranks make after every step: once all parts are on
the disk, rank 0's writer describes the whole, checkpoint.json last, renames the folder and replaces `latest`. A failure
anywhere is known to every rank before anything of the previous checkpoint is touched. At most one checkpoint is on its way.
"""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from megalm.checkpoint import memory, snapshot, uploads
from megalm.checkpoint.disk import Disk
from megalm.checkpoint.find import Report, fault
from megalm.checkpoint.format import CHECKPOINTS, FORMAT, MANIFEST, TEMPORARY_PREFIX, VERSION, rank_file, step_name
from megalm.checkpoint.fragment import Fragment
from megalm.checkpoint.jobs import Answer, Performer
from megalm.checkpoint.sealed import CheckpointError, seal_of
from megalm.checkpoint.uploads import BUSY, DONE, FAILED, retention_of, uploads_of
from megalm.checkpoint.writer import Writer

LIBRARIES = ("megalm", "torch", "deepspeed", "safetensors", "numpy")
LAYOUT = ("tp", "pp", "dp", "zero_stage", "sequence_parallel")
WAIT_SECONDS = 1500.0
"""A job that takes longer has failed; the other ranks wait for this one 1800 s."""
TOLD_SECONDS = 0.1
"""A shorter wait is no news."""
PART, WHOLE = "part", "whole"
"""What is being written: every rank's part, then by rank 0 what makes a checkpoint of them."""


class Engine(Protocol):
    """What a checkpoint needs of an engine."""

    def fragments(self) -> list[Fragment]: ...

    def counters(self) -> dict[str, Any]: ...

    def refresh(self, counters: Mapping[str, Any]) -> None: ...


class Ranks(uploads.Ranks, Protocol):
    """What a checkpoint needs of the process groups."""

    def broadcast(self, value: Any) -> Any: ...

    def gather(self, value: Any) -> list[Any]: ...


def save(run_folder: str | Path, step: int, consumed_samples: int, engine: Engine, groups: Ranks, config: Any, plan: Any,
         tokenizer_files: Sequence[Path] = (), *, disk: Disk | None = None, report: Report | None = None,
         eval_loss: float | None = None) -> Path:
    """Save the state after `step` optimizer steps as run_folder/checkpoints/step_XXXXXXXX; all ranks call it together, and
    wait until it is on the disk.

    `consumed_samples`: how many training samples these steps have drawn. `eval_loss`: the validation loss at that step, where
    it was measured. Checkpoints that config.checkpoint doesn't keep are deleted at the end; one that can't be is only reported.
    Raises CheckpointError on every rank when any rank failed: nothing of the new checkpoint is left, and the previous one
    and `latest` are as they were; or, where only `latest` couldn't be replaced, that the new one is whole.
    """
    with Saver(run_folder, engine, groups, config, plan, tokenizer_files, disk=disk, report=report) as saver:
        saver.save(step, consumed_samples, eval_loss)
        saver.finish()
        saver.copies.finish()
    return Path(run_folder) / CHECKPOINTS / step_name(step)


class Saver:
    """Saves one run's checkpoints. Every method but `state` and `close` is collective: all ranks call it together.

    `saved`: the step of the newest checkpoint of this run that is whole, None before the first. `copies`: of them, at
    checkpoint.remote. A save that fails is reported, and what it left removed; the next one is a new attempt. When
    config.checkpoint.max_failures have failed in a row, whatever method meets the last one raises CheckpointError on all ranks.
    """

    def __init__(self, run_folder: str | Path, engine: Engine, groups: Ranks, config: Any, plan: Any,
                 tokenizer_files: Sequence[Path] = (), *, disk: Disk | None = None, report: Report | None = None) -> None:
        """Removes what runs that were killed have left."""
        self.root = Path(run_folder) / CHECKPOINTS
        self.saved: int | None = None
        self._engine, self._groups, self._report = engine, groups, report or (lambda line: None)
        self._performer = Performer(self.root, disk or Disk())
        self._writer: Writer | None = None
        self._snapshot: snapshot.Snapshot | None = None
        self._step, self._phase = 0, None
        self._answer: Answer | None = None
        self._manifest: dict[str, Any] = {}
        self._fixed = {"world_size": groups.world_size, "layout": {name: getattr(plan, name) for name in LAYOUT},
                       "versions": versions()}
        self._whole = {"documents": {"config.json": config.model_dump(mode="json"), "plan.json": plan.to_dict()},
                       "tokenizer_files": [str(path) for path in tokenizer_files],
                       "retention": retention_of(config)}
        self.copies = uploads_of(run_folder, groups, config, self._report)
        self._failures, self._allowed = 0, config.checkpoint.max_failures
        self._before: str | None = None
        self._token = groups.broadcast(secrets.token_hex(4))
        if groups.rank == 0:
            untidy = self._performer.clean().problem
            if untidy:
                self._report(untidy)
        groups.agree(None)  # before anyone writes there

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def write_in_background(self, device: torch.device) -> None:
        """Start this rank's writer, so that from now on `save` waits for a copy in memory only.

        The copy takes as much memory as the rank's state, which lies on `device`. Where half of a machine's free memory
        can't hold those of its ranks, they go on writing by themselves, and say so.
        """
        size = snapshot.places(snapshot.owned(self._engine.fragments()))[1]
        if self._room(size):
            self._start_writer(device, size)

    def _room(self, size: int | None) -> bool:
        """Whether this machine has room for the copies of those of its ranks that are to get a writer, `size` bytes of this one
        (None: it gets none)."""
        own = memory.machine()
        told = self._groups.gather((own, size or 0, memory.available_bytes()))
        for name in dict.fromkeys(name for name, _, _ in told):
            short, ranks = memory.shortage(name, told), [i for i, (of, need, _) in enumerate(told) if of == name and need]
            if short:
                self._report(f"checkpoints are written while the training waits: copies of rank{'s' * (len(ranks) > 1)} "
                             f"{', '.join(map(str, ranks))} on one machine need {short[0]:,} bytes, {short[1]:,} are free")
        return size is not None and memory.shortage(own, told) is None

    def _start_writer(self, device: torch.device, size: int) -> None:
        self._writer = Writer(self.root, size)
        self._snapshot = snapshot.Snapshot(self._writer.memory, device)

    @property
    def writer_pid(self) -> int | None:
        """The process that writes beside this rank; None where there is none."""
        return self._writer.pid if self._writer is not None else None

    @property
    def state(self) -> int:
        """DONE, BUSY or FAILED: this rank's own, for the ranks to find the highest of."""
        if self._phase is None or self._look() is None:
            return DONE if self._phase is None else BUSY
        return FAILED if self._answer.problem else DONE

    def progress(self, highest: int) -> None:
        """Go on as the `highest` state of all ranks allows, without waiting."""
        if self._phase is not None and highest == FAILED:
            self._bear(self._agree)
        elif self._phase is not None and highest == DONE:
            self._advance()

    def save(self, step: int, consumed_samples: int, eval_loss: float | None = None) -> None:
        """Begin to save the state as it is now; it may change as soon as this returns. Waits for the checkpoint before."""
        if self._phase is not None:
            before, start = self._step, time.monotonic()
            self._bear(self.finish)
            seconds, end = time.monotonic() - start, " to be on the disk" if self.saved == before else ", which failed"
            if seconds >= TOLD_SECONDS:
                self._report(f"waited {seconds:.1f} s for the checkpoint of step {before}{end}")
        self.copies.drop(step)
        self._step, self._phase, self._answer = step, PART, None
        self._before = self._seal()
        self._manifest = {"format": FORMAT, "version": VERSION, "step": step, "consumed_samples": consumed_samples,
                          "eval_loss": eval_loss, **self._fixed, "counters": self._engine.counters()}
        try:
            self._begin()
        except Exception as error:  # whatever it is, the others wait for an answer
            self._answer = Answer(f"writing its part: {type(error).__name__}: {error}")

    def finish(self) -> None:
        """Wait until the checkpoint that is on its way is whole and `latest` names it.

        Raises CheckpointError on all ranks when one has failed, however many before it: see the function `save`.
        """
        while self._phase is not None:
            if self._look(WAIT_SECONDS) is None:
                self._answer = Answer(f"writing: its writer hasn't answered for {WAIT_SECONDS:.0f} s")
            self._agree()
            self._advance()

    def close(self) -> None:
        """Stop this rank's processes; what wasn't waited for is lost."""
        self.copies.close()
        self._close_writer()

    def _close_writer(self) -> None:
        if self._snapshot is not None:
            self._snapshot.close()
        if self._writer is not None:
            self._writer.close()
        self._snapshot = self._writer = None

    @property
    def _folder(self) -> str:
        """Of this attempt. The token tells it from those of a run that died on another machine, and may not be quite dead."""
        return f"{TEMPORARY_PREFIX}{step_name(self._step)}.{self._token}"

    def _begin(self) -> None:
        """Write this rank's part, or let it be written."""
        held, rank = snapshot.owned(self._engine.fragments()), self._groups.rank
        entries = snapshot.describe(held, rank_file(rank))
        where, size = snapshot.places(held)
        if self._writer is None or self._snapshot is None or size > self._writer.size:
            self._answer = self._performer.part(self._folder, rank, entries, lambda number: snapshot.content(held[number].tensor))
            return
        self._snapshot.take(held, where)
        self._writer.send_part(self._folder, rank, entries, where)

    def _look(self, seconds: float = 0.0) -> Answer | None:
        """The answer to what this rank is doing, if there is one by now."""
        if self._answer is None and self._writer is not None:
            self._answer = self._writer.answer(seconds)
        return self._answer

    def _advance(self) -> None:
        """All ranks are done with this phase: the next one."""
        for note in self._answer.notes if self._answer else ():
            self._report(note)
        if self._phase == WHOLE:
            self.saved, self._failures, self._phase = self._step, 0, None
            self.copies.offer(self._step)
            return
        self._phase, self._answer = WHOLE, None
        job = {"folder": self._folder, "manifest": self._manifest, "needed": self.copies.steps, **self._whole}
        if self._groups.rank != 0:
            self._answer = Answer()
        elif self._writer is not None:
            self._writer.send(WHOLE, **job)
        else:
            self._answer = self._performer.whole(**job)

    def _agree(self) -> None:
        """Raise on all ranks what any of them has met, once what it left is gone."""
        problems = self._groups.agree(self._answer.problem if self._answer else None)
        if not problems:
            return
        self._phase = None
        ended = self._end_writer()
        self._groups.agree(None)  # from here on nobody writes there
        whole, untidy = None, None
        if self._groups.rank == 0:
            untidy = self._performer.clean().problem
            whole = self._seal() not in (None, self._before) and fault(self.root / step_name(self._step), read=False) is None
        whole, untidy, self._token = self._groups.broadcast((whole, untidy, secrets.token_hex(4)))
        self._succeed_writer(ended)
        lines = "; ".join(f"rank {rank} failed {text}" for rank, text in problems)
        name, after = self.root / step_name(self._step), f"; then {untidy}" if untidy else ""
        if whole:
            self.saved, self._failures = self._step, 0
            self.copies.offer(self._step)
            raise CheckpointError(f"{name} is saved and whole, but {lines}{after}")
        self._failures += 1
        raise CheckpointError(f"{name} wasn't saved: {lines}{after}. Earlier checkpoints are as they were")

    def _bear(self, work: Callable[[], None]) -> None:
        """A failure is told and the run goes on, unless too many came in a row."""
        try:
            work()
        except CheckpointError as error:
            if self._failures >= self._allowed:
                raise
            count = f"; {self._failures} failed in a row, {self._allowed} end the run" if self._failures else ""
            self._report(f"{error}{count}")

    def _end_writer(self) -> tuple[torch.device, int] | None:
        """After a failure anywhere: a writer that is dead, or still busy with what is to be removed, makes way for another, whose
        device and bytes are returned."""
        if self._writer is None or not self._writer.busy or self._snapshot is None:
            return None
        device, size = self._snapshot.device, self._writer.size
        self._close_writer()
        return device, size

    def _succeed_writer(self, ended: tuple[torch.device, int] | None) -> None:
        """Start another in place of what has ended, if it was not for lack of memory that it did."""
        if not self._room(None if ended is None else ended[1]):
            return
        try:
            self._start_writer(*ended)
        except OSError as error:
            self._report(f"checkpoints are written while the training waits: no new writer could be started: {error}")

    def _seal(self) -> str | None:
        """Of what has this step's name now."""
        try:
            return seal_of((self.root / step_name(self._step) / MANIFEST).read_bytes())
        except OSError:
            return None


@functools.cache
def versions() -> Mapping[str, str]:
    """Of Python and the libraries that shape the state; one that isn't installed is left out."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found

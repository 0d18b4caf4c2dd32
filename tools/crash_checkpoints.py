"""Kill, fill and cut the power of a disk while checkpoints are saved: none is ever lost or torn.

    python -m megalm.tools.crash_checkpoints [--trials 2000 --seed 0]

Every case saves a second checkpoint after a first (the first ever; the next; one that deletes the first; the same step again):

    deaths     the process ends before, after or within each operation on the disk: every create, write, sync, rename, unlink
    errors     each operation fails with ENOSPC, EIO or EROFS, once or from then on
    power      the power is cut after any operation; what wasn't synced may be on the disk, or not, or in part, in any order
    kills      SIGKILL to the rank or to its writer at a random time

After each trial a run is resumed, in another layout: it must load a checkpoint that was saved, bit for bit, the newer one if
its save had returned. Then it saves again, and that must be found, with nothing left of what failed.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megalm.checkpoint import CheckpointError
from megalm.checkpoint.disk import Disk
from megalm.checkpoint.format import CHECKPOINTS
from megalm.tools._command import Parser, positive, run
from megalm.tools._crash_disk import Dying, Failing, Killed, Noting, PowerCut
from megalm.tools._trials import Held, resume, same, saver, store, values

KINDS = ("deaths", "errors", "power", "kills")
CODES = (errno.ENOSPC, errno.EIO, errno.EROFS)
KILL_SECONDS = 0.25
"""Within which a kill comes: the writer's start and some saves."""
CHILD_SECONDS = 60
"""After which a process that should have been killed, or have ended, is."""


@dataclass(frozen=True)
class Case:
    """Saving `new` where `old` (None: nothing) is."""

    name: str
    old: Held | None
    new: Held
    keep: int = 3

    def prepare(self, folder: Path) -> Path:
        folder.mkdir()
        if self.old is not None:
            store(folder, self.old)
        return folder


CASES = (Case("first", None, Held(values(2), step=2)), Case("next", Held(values(1), step=1), Held(values(2), step=2)),
         Case("deleting", Held(values(1), step=1), Held(values(2), step=2), keep=1),
         Case("again", Held(values(1), step=2), Held(values(2), step=2)))


def judge(folder: Path, case: Case, returned: bool) -> str | None:
    """What is wrong with what a run finds in the folder, or with what it saves there next; None when all is well."""
    try:
        found, _ = resume(folder)
    except CheckpointError as error:
        if returned or case.old is not None:
            return f"lost: {error}"
        found = None
    if found is not None and not same(found, case.new) and (returned or case.old is None or not same(found, case.old)):
        return "the old one was found though the new one's save had returned" if returned else "found what nobody had saved"
    third = Held(values(3), step=3)
    store(folder, third)
    if not same(resume(folder)[0], third):
        return "the next save wasn't found"
    left = [path.name for path in (folder / CHECKPOINTS).iterdir() if path.name.startswith(".")]
    return f"left behind: {left}" if left else None


def deaths(case: Case, folder: Path, chance: random.Random) -> Iterator[str | None]:
    """Every operation of the save, before and after it, and within it where it writes; in a random order."""
    moments = _moments(case, folder)
    for number, name, when in chance.sample(moments, len(moments)):
        with _trial(case, folder) as run_folder:
            with contextlib.suppress(Killed):
                store(run_folder, case.new, Dying(run_folder, number, when), case.keep)
            problem = judge(run_folder, case, False)
            yield problem and f"{case.name}, killed {when} operation {number}, {name}: {problem}"


def errors(case: Case, folder: Path, chance: random.Random) -> Iterator[str | None]:
    """Every operation fails, with each error, once and for good; in a random order."""
    plans = _plans(case, folder)
    for number, name, code, lasting in chance.sample(plans, len(plans)):
        with _trial(case, folder) as run_folder:
            try:
                store(run_folder, case.new, Failing(run_folder, number, code, lasting), case.keep)
                returned = True
            except CheckpointError as error:
                returned = "is saved and whole" in str(error)
            problem = judge(run_folder, case, returned)
            yield problem and f"{case.name}, {errno.errorcode[code]} at operation {number}, {name}: {problem}"


def power(case: Case, folder: Path, chance: random.Random) -> Iterator[str | None]:
    """Without end: the power is cut after a random operation, more often than not before the next sync."""
    with _trial(case, folder) as run_folder:
        disk = Noting(run_folder)
        initial = folder / "initial"
        shutil.copytree(run_folder, initial)
        store(run_folder, case.new, disk, case.keep)
    # From here on the save may be said to have returned: the name `latest` is on the disk.
    done = max(number for number, (name, *more) in enumerate(disk.log) if name == "rename" and more[-1].name == "latest")
    done = next(number for number in range(done, len(disk.log)) if disk.log[number][0] == "sync")
    while True:
        cut = chance.randrange(len(disk.log) + 1)
        state, after = PowerCut(initial), folder / "after"
        state.apply(disk.log[:cut])
        state.write(after, chance)
        problem = judge(after, case, cut > done)
        shutil.rmtree(after)
        yield problem and f"{case.name}, power cut after {cut} of {len(disk.log)} operations: {problem}"


def kills(case: Case, folder: Path, chance: random.Random) -> Iterator[str | None]:
    """Without end: a process that saves through its writer, and a SIGKILL to either."""
    while True:
        with _trial(case, folder) as run_folder:
            victim, wait = chance.choice(("rank", "writer")), chance.uniform(0, KILL_SECONDS)
            returned = _killed(run_folder, case, victim, wait)
            problem = judge(run_folder, case, returned)
            yield problem and f"{case.name}, {victim} killed after {wait:.3f} s: {problem}"


def _killed(folder: Path, case: Case, victim: str, wait: float) -> bool:
    """Save in a forked process, and kill it or its writer after `wait` seconds; whether the save had returned."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(CHILD_SECONDS)
        code = 1
        with contextlib.suppress(BaseException), saver(folder, case.new, Disk(), case.keep) as saves:
            saves.write_in_background(torch.device("cpu"))
            os.write(writing, f"{saves.writer_pid}\n".encode())
            saves.save(case.new.step, 8 * case.new.step)
            saves.finish()
            os.write(writing, b"saved\n")
            code = 0
        os._exit(code)
    os.close(writing)
    with open(reading, "rb") as said:
        line = said.readline()
        if not line:
            os.waitpid(child, 0)
            raise OSError("the process to kill ended by itself")
        writer = int(line)
        time.sleep(wait)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child if victim == "rank" else writer, signal.SIGKILL)
        os.waitpid(child, 0)
        return said.readline() == b"saved\n"


@contextlib.contextmanager
def _trial(case: Case, folder: Path) -> Iterator[Path]:
    run_folder = case.prepare(folder / "run")
    try:
        yield run_folder
    finally:
        shutil.rmtree(run_folder, ignore_errors=True)


def _operations(case: Case, folder: Path) -> list[tuple]:
    with _trial(case, folder) as run_folder:
        disk = Noting(run_folder)
        store(run_folder, case.new, disk, case.keep)
        return disk.log


def _moments(case: Case, folder: Path) -> list[tuple[int, str, str]]:
    """Every (operation, its name, when) to die at."""
    return [(number, name, when) for number, (name, *_) in enumerate(_operations(case, folder))
            for when in ("before", "after", *(("within",) if name == "append" else ()))]


def _plans(case: Case, folder: Path) -> list[tuple[int, str, int, bool]]:
    """Every (operation, its name, error, whether it lasts)."""
    return [(number, name, code, lasting) for number, (name, *_) in enumerate(_operations(case, folder))
            for code in CODES for lasting in (False, True)]


def possible(folder: Path, kind: str) -> int | None:
    """How many different trials of a kind there are, over all cases; None: without end."""
    listed = {"deaths": _moments, "errors": _plans}.get(kind)
    return None if listed is None else sum(len(listed(case, folder)) for case in CASES)


def trials(folder: Path, count: int, seed: int = 0, kinds: Sequence[str] = KINDS) -> dict[str, tuple[int, list[str]]]:
    """At most `count` trials, spread over kinds and cases: how many of each kind, and what went wrong."""
    chance = random.Random(seed)
    programs: dict[str, Callable[[Case, Path, random.Random], Iterator[str | None]]] = {
        "deaths": deaths, "errors": errors, "power": power, "kills": kills}
    shares = {"deaths": 0.2, "errors": 0.25, "power": 0.5, "kills": 0.05}
    found = {}
    for kind in kinds:
        share, done, wrong = max(1, int(count * shares[kind] / len(CASES))), 0, []
        for case in CASES:
            place = Path(tempfile.mkdtemp(dir=folder))
            trial = programs[kind](case, place, chance)
            for problem in itertools.islice(trial, share):
                done += 1
                wrong += [problem] if problem else []
            shutil.rmtree(place)
        found[kind] = (done, wrong)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the trials; 1 when a checkpoint was lost or torn."""
    parser = Parser(prog="crash_checkpoints", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=positive, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    return run(parser, _work, argv)


def _work(arguments: argparse.Namespace) -> int:
    folder = Path(tempfile.mkdtemp(prefix="megalm-crashes-"))
    try:
        found = trials(folder, arguments.trials, arguments.seed)
        all_of = {kind: possible(folder, kind) for kind in found}
    finally:
        shutil.rmtree(folder)
    wrong = [line for _, lines in found.values() for line in lines]
    for line in wrong:
        print(line)
    for kind, (count, lines) in found.items():
        of = f" of {all_of[kind]:,} possible" if all_of[kind] else ""
        print(f"{kind:<7} {count:>6,} trials{of}, {len(lines)} with a checkpoint lost or torn, or rubbish left")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

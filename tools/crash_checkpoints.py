"""Kill, fill and cut the power of a disk while checkpoints are saved: none is ever lost or torn.

    python -m megalm.tools.crash_checkpoints [--trials 2000 --seed 0 --ranks 2]

Every case saves a checkpoint where another may be (the first ever; the next; one that deletes the first; the same step again;
again after a save that died), by one rank and by two, or by as many as --ranks says. Who goes on after each operation on the
disk is drawn, so that every order may come up.

    deaths     a rank ends before, after or within any of its operations: create, write, sync, rename, unlink; sometimes a second
               one too. The others go on until they miss it, or die a little later, or at once
    errors     an operation of a rank fails with ENOSPC, EIO or EROFS, once or from then on, or its writer dies there: all ranks
               hear of it, nothing of it can be seen, and the run ends or goes on and saves again
    power      the power is cut after any operation, of all machines that share the disk or of some: what they hadn't synced may
               be there, or not, or in part, in any order
    kills      SIGKILL at a random time to a rank that is a process, to all of them, or to a writer beside one

After each trial a run is resumed, by one to three ranks: it must load the newest checkpoint that is whole, bit for bit, the one
whose save had returned if it had. None that can be seen may be torn. Then it saves again, as any number of ranks, and that must
be found, with nothing left of what failed.
"""

from __future__ import annotations

import argparse
import errno
import itertools
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from megalm.checkpoint import CheckpointError
from megalm.tools._command import counted, positive
from megalm.tools._crash_disk import Dying, Failing, Noting, PowerCut
from megalm.tools._crash_kills import kill
from megalm.tools._crash_scene import CASES, THIRD, Scene, hidden, judge, train_on, visible
from megalm.tools._trials import program

CODES = (errno.ENOSPC, errno.EIO, errno.EROFS)
WRITER = "its writer killed"
REPEATS = 10
"""Power cuts of one save."""
RANKS = (1, 2)
TROUBLE = ("failed", "couldn't", "cleaning up")
"""One of these is in every line about an error."""


class Moment(NamedTuple):
    """Operation `number` of a rank, called `name`, and what is to happen then."""

    rank: int
    number: int
    name: str
    what: str
    lasting: bool = False

    def __str__(self) -> str:
        return f"rank {self.rank}, {self.what}{' for good' if self.lasting else ''} at its operation {self.number}, {self.name}"


class WriterDied(Exception):
    """What a rank finds in place of an answer."""


def moments(scene: Scene) -> list[Moment]:
    """Every operation of an undisturbed save, before and after it, and within it where it writes."""
    counts = [itertools.count() for _ in range(scene.ranks)]
    return [Moment(rank, number, name, when) for rank, name, *_ in scene.journal() for number in [next(counts[rank])]
            for when in ("before", "after", *(("within",) if name == "append" else ()))]


def faults(scene: Scene) -> list[Moment]:
    """Every operation with every error, once and for good, and the end of a writer at it."""
    found = moments(scene)
    failing = [(errno.errorcode[code], lasting) for code in CODES for lasting in (False, True)]
    return [moment._replace(what=f"{WRITER} {moment.what}") for moment in found] + [
        moment._replace(what=what, lasting=lasting) for moment in found if moment.what == "before" for what, lasting in failing]


def dying(moment: Moment) -> Callable[..., Noting]:
    return partial(Dying, number=moment.number, when=moment.what)


def deaths(scene: Scene) -> Iterator[str | None]:
    """Every moment of every rank, in a random order."""
    chance, all_of_them = scene.chance, moments(scene)
    for first in chance.sample(all_of_them, len(all_of_them)):
        planned = [first, *([chance.choice(all_of_them)] if chance.random() < 0.3 else [])]
        grace = chance.choice((None, 0, chance.randrange(1, 12)))
        with scene.trial() as folder:
            _, ends = scene.save(folder, {moment.rank: dying(moment) for moment in reversed(planned)}, grace)
            failed = [str(end) for end in ends if isinstance(end, CheckpointError)]
            problem = f"nothing failed, but {failed[0]}" if failed else judge(folder, scene, all(end is None for end in ends))
            yield problem and f"{'; '.join(map(str, planned))}: {problem}"


def errors(scene: Scene) -> Iterator[str | None]:
    """Every fault, in a random order."""
    all_of_them = faults(scene)
    for moment in scene.chance.sample(all_of_them, len(all_of_them)):
        if moment.what.startswith(WRITER):
            fault = partial(Dying, number=moment.number, when=moment.what.removeprefix(f"{WRITER} "), end=WriterDied)
        else:
            fault = partial(Failing, number=moment.number, code=getattr(errno, moment.what), lasting=moment.lasting)
        with scene.trial() as folder:
            problem = _one_error(scene, folder, moment, fault)
            yield problem and f"{moment}: {problem}"


def _one_error(scene: Scene, folder: Path, moment: Moment, fault: Callable[..., Noting]) -> str | None:
    allowed, before = scene.chance.choice((1, 2)), visible(folder)
    site = scene.site(folder)
    disks = [fault(site, rank) if rank == moment.rank else Noting(site, rank) for rank in range(scene.ranks)]
    heard = train_on(scene, site, disks, allowed)
    strange = [one.raised for one in heard if one.raised is not None and not isinstance(one.raised, CheckpointError)]
    if strange:
        return f"{type(strange[0]).__name__}: {strange[0]}"
    raised, saved = {str(one.raised) if one.raised else None for one in heard}, {one.saved for one in heard}
    if len(raised) > 1 or len(saved) > 1:
        return f"the ranks don't agree: {raised}, saved {saved}"
    [end], [saved] = raised, saved
    told = [any(word in line for line in one.lines for word in TROUBLE) for one in heard]
    if end is None and (disks[moment.rank].hit and not any(told) or saved is None and not all(told)):
        return f"saved {saved}, and only these ranks heard of it: {told}"
    if end is None:
        return judge(folder, scene, True, THIRD)
    if "is saved and whole" in end:
        return judge(folder, scene, True)
    # On a disk that fails for good, rubbish stays, and a checkpoint that had stepped aside stands in under its hidden name.
    if visible(folder) != before if not moment.lasting else not set(visible(folder)) <= set(before):
        return f"it failed, and can be seen: {visible(folder)}, not {before}"
    if hidden(folder) and not moment.lasting:
        return f"it failed, and has left {hidden(folder)}"
    return judge(folder, scene, False)


def power(scene: Scene) -> Iterator[str | None]:
    """Without end: of all machines after a random operation of one save, or of some while the others go on."""
    all_of_them = moments(scene)
    while True:
        journal = scene.journal()
        for _ in range(REPEATS):
            if scene.ranks > 1 and scene.chance.random() < 0.5:
                yield _some_machines(scene, all_of_them)
            else:
                yield _all_machines(scene, journal)


def _all_machines(scene: Scene, journal: Sequence[tuple]) -> str | None:
    # The save may be said to have returned once the name `latest` is on the disk.
    done = max(number for number, (_, name, _, *more) in enumerate(journal) if name == "rename" and more[0].name == "latest")
    done = next(number for number in range(done, len(journal)) if journal[number][1] == "sync")
    cut = scene.chance.randrange(len(journal) + 1)
    problem = _after(scene, scene.before, journal[:cut], range(scene.ranks), cut > done)
    return problem and f"power cut after {cut} of {len(journal)} operations: {problem}"


def _some_machines(scene: Scene, all_of_them: Sequence[Moment]) -> str | None:
    chance = scene.chance
    ranks = chance.sample(range(scene.ranks), chance.randrange(1, scene.ranks))
    planned = [chance.choice([moment for moment in all_of_them if moment.rank == rank]) for rank in ranks]
    with scene.trial() as folder:
        shutil.copytree(folder, scene.place / "before")
        try:
            site, ends = scene.save(folder, {moment.rank: dying(moment) for moment in planned}, chance.choice((None, 3)))
            problem = _after(scene, scene.place / "before", site.journal, ranks, all(end is None for end in ends))
        finally:
            shutil.rmtree(scene.place / "before")
    return problem and f"power cut, {'; '.join(map(str, planned))}: {problem}"


def _after(scene: Scene, before: Path, journal: Sequence[tuple], cut: Sequence[int], returned: bool) -> str | None:
    """What is wrong with a state of the disk after these operations, where the power was cut of those ranks' machines."""
    disk, after = PowerCut(before), scene.place / "after"
    disk.apply(journal)
    try:
        disk.write(after, scene.chance, cut)
        return judge(after, scene, returned)
    finally:
        shutil.rmtree(after)


def kills(scene: Scene) -> Iterator[str | None]:
    """Without end: ranks that are processes and save through their writers."""
    while True:
        with scene.trial() as folder:
            what, returned, problem = kill(scene, folder)
            problem = problem or judge(folder, scene, returned)
            yield problem and f"{what}: {problem}"


KINDS: dict[str, Callable[[Scene], Iterator[str | None]]] = {"deaths": deaths, "errors": errors, "power": power, "kills": kills}
SHARES = {"deaths": 0.2, "errors": 0.25, "power": 0.5, "kills": 0.05}
LISTED = {"deaths": moments, "errors": faults}


def possible(folder: Path, kind: str, ranks: int) -> int | None:
    """How many different trials of a kind there are, over all cases; None: without end."""
    if kind not in LISTED:
        return None
    return sum(len(LISTED[kind](Scene(case, ranks, Path(tempfile.mkdtemp(dir=folder)), random.Random(0)))) for case in CASES)


def attempts(folder: Path, count: int, kind: str, ranks: int, seed: int = 0) -> Iterator[str | None]:
    """At most `count` trials of a kind by so many ranks, spread over the cases: for each what went wrong, or None."""
    chance = random.Random(f"{kind}, {ranks}, {seed}")
    for case in CASES:
        place = Path(tempfile.mkdtemp(dir=folder))
        try:
            for problem in itertools.islice(KINDS[kind](Scene(case, ranks, place, chance)), max(1, count // len(CASES))):
                yield problem and f"{case.name}, {problem}"
        except CheckpointError as error:
            yield f"{case.name}: a save that nothing disturbed has failed: {error}"
        finally:
            shutil.rmtree(place)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the trials; 1 when a checkpoint was lost or torn."""
    return program("crash_checkpoints", __doc__, _work, argv, lambda parser: parser.add_argument(
        "--ranks", type=positive, help="so many, instead of one and then two; --trials of each"))


def _work(folder: Path, arguments: argparse.Namespace) -> tuple[list[str], list[str]]:
    wrong, told = [], []
    for ranks in (arguments.ranks,) if arguments.ranks else RANKS:
        for kind, share in SHARES.items():
            done = list(attempts(folder, int(arguments.trials * share), kind, ranks, arguments.seed))
            lines = [problem for problem in done if problem]
            wrong += [f"{counted(ranks, 'rank')}, {line}" for line in lines]
            there = possible(folder, kind, ranks)
            of, name = f" of {there:,} possible" if there else "", f"{counted(ranks, 'rank')}, {kind}"
            told.append(f"{name:<16} {len(done):>6,} trials{of}, {len(lines)} with a checkpoint lost or torn, or rubbish left")
    return wrong, told


if __name__ == "__main__":
    sys.exit(main())

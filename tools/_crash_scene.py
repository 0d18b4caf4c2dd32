"""What crash_checkpoints.py tries: saves of a state by several ranks in a prepared folder, and what a run finds there after."""

from __future__ import annotations

import contextlib
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from megalm.checkpoint import CheckpointError
from megalm.checkpoint.format import CHECKPOINTS, step_of
from megalm.checkpoint.save import Ranks
from megalm.checkpoint.verify import verify
from megalm.tools._crash_disk import Dying, Noting, Operation, Site
from megalm.tools._crew import Turns
from megalm.tools._trials import Share, State, resume, same, save_all, saver, state, store

LAYOUTS = (1, 2, 3)
"""Of how many ranks the runs are that go on."""
THIRD, FOURTH = state(3), state(4)
Faults = Mapping[int, Callable[[Site, int], Noting]]
"""The disk of a rank, where it isn't one that works."""


@dataclass(frozen=True)
class Case:
    """Saving `new` where `old` (None: nothing) is. `interrupted`: and where a save of `new` has died before."""

    name: str
    old: State | None
    new: State = state(2)
    keep: int = 3
    interrupted: bool = False


CASES = (Case("first", None), Case("next", state(1)), Case("deleting", state(1), keep=1), Case("again", state(2, seed=1)),
         Case("after a crash", state(1), interrupted=True))


class Scene:
    """One case, by `ranks` ranks, below the folder `place`: tried again and again. `before`: how a trial's folder begins."""

    def __init__(self, case: Case, ranks: int, place: Path, chance: random.Random) -> None:
        self.case, self.ranks, self.place, self.chance = case, ranks, place, chance
        self.before = place / "initial"
        self.before.mkdir()
        if case.old is not None:
            store(self.before, case.old, ranks)

    @contextlib.contextmanager
    def trial(self) -> Iterator[Path]:
        """A folder as it is before the save."""
        folder = self.place / "run"
        shutil.copytree(self.before, folder)
        try:
            if self.case.interrupted:
                rank, number = self.chance.randrange(self.ranks), self.chance.randrange(25)
                self.save(folder, {rank: partial(Dying, number=number, when=self.chance.choice(("before", "after")))})
            yield folder
        finally:
            shutil.rmtree(folder)

    def site(self, folder: Path, grace: int | None = None) -> Site:
        return Site(folder, Turns(self.ranks, self.chance, grace))

    def save(self, folder: Path, faults: Faults | None = None,
             grace: int | None = None) -> tuple[Site, list[BaseException | None]]:
        """Save the new state; what was done to the disk, and how each rank ended."""
        site = self.site(folder, grace)
        disks = [(faults or {}).get(rank, Noting)(site, rank) for rank in range(self.ranks)]
        return site, save_all(folder, self.case.new, site.crew, disks, self.case.keep)

    def journal(self) -> list[Operation]:
        """What a save does that nothing disturbs, in the order of one draw. Raises CheckpointError."""
        folder = self.place / "undisturbed"
        shutil.copytree(self.before, folder)
        try:
            site, ends = self.save(folder)
        finally:
            shutil.rmtree(folder)
        for end in ends:
            if end is not None:
                raise end
        return site.journal


def visible(folder: Path) -> list[str]:
    """The checkpoints that have a name."""
    return sorted(path.name for path in (folder / CHECKPOINTS).glob("step_*"))


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / CHECKPOINTS).glob(".*"))


def judge(folder: Path, scene: Scene, returned: bool, saved: State | None = None) -> str | None:
    """What is wrong with what a run finds in the folder, or with what it saves there next; None when all is well. `returned`:
    the save had. `saved`: the last state that it saved, the case's by default."""
    case, chance = scene.case, scene.chance
    new = saved or case.new
    may = [new] if returned or case.old is None else [new, case.old]
    for name in visible(folder):
        problems = verify(folder / CHECKPOINTS / name).problems
        if problems:
            return f"{name} can be seen, and is torn: {problems[0]}"
    try:
        found, _ = resume(folder, chance.choice(LAYOUTS))
    except CheckpointError as error:
        if returned or case.old is not None:
            return f"lost: {error}"
        found = None
    if found is not None and not any(same(found, one) for one in may):
        return "the old one was found though the new one's save had returned" if returned else "found what nobody had saved"
    newer = [name for name in visible(folder) if found is None or step_of(name) > found.step]
    if newer:
        return f"{newer} is whole and wasn't taken"
    store(folder, FOURTH, chance.choice(LAYOUTS))
    if not same(resume(folder, chance.choice(LAYOUTS))[0], FOURTH):
        return "the next save wasn't found"
    return f"left behind: {hidden(folder)}" if hidden(folder) else None


@dataclass
class Heard:
    """What one rank of a run that went on has reported, what ended it, and the step that was saved after the first save."""

    lines: list[str] = field(default_factory=list)
    raised: BaseException | None = None
    saved: int | None = None


def train_on(scene: Scene, site: Site, disks: Sequence[Noting], allowed: int) -> list[Heard]:
    """Save the case's state and then another as a training run does, which ends when `allowed` saves in a row have failed; a
    disk that failed is healed between the two."""
    heard = [Heard() for _ in range(scene.ranks)]
    states = [(held, held.shares(scene.ranks)) for held in (scene.case.new, THIRD)]

    def work(groups: Ranks) -> None:
        rank, engine = groups.rank, Share()
        with saver(site.folder, engine, groups, disks[rank], keep=scene.case.keep, max_failures=allowed,
                   report=heard[rank].lines.append) as saves:
            for held, shares in states:
                engine.held, engine.step = shares[rank].held, held.step
                saves.save(held.step, 8 * held.step)
                for _ in range(2):  # every part, then the whole
                    saves.progress(*groups.highest(saves.state))
                if held is not THIRD:
                    heard[rank].saved, disks[rank].healed = saves.saved, True

    for rank, end in enumerate(site.crew.run(work)):
        heard[rank].raised = end
    return heard

"""Disks that note every operation, die or fail at one, and what a real one may hold after the power is cut.

POSIX promises little: bytes are there once their file was synced, names once their folder was. Before that each write and
each change of a name may be on the disk or not, in any order; a write may be there in part, or as zeros. On a shared file
system a machine's sync brings its own writes to the disk, and names are everybody's.
"""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megalm.tools._crew import Killed, Turns
from megalm.tools._trials import Hasty

Operation = tuple
"""(rank, name, path, ...more): more is the bytes of an append and the target of a rename. Paths are relative to the run's
folder."""


@dataclass
class Site:
    """What the ranks of a trial share: the run's folder, their turns, and what has been done to the disk so far."""

    folder: Path
    crew: Turns
    journal: list[Operation] = field(default_factory=list)


class Noting(Hasty):
    """One rank's: notes every operation that changes the disk, each in its turn. `before` and `after` are called around the
    n-th of this rank (from 0). `hit`: what was planted has happened. `healed`: it doesn't any more."""

    def __init__(self, site: Site, rank: int) -> None:
        self.site, self.rank, self.count = site, rank, 0
        self.hit = self.healed = False
        self._paths: dict[int, Path] = {}

    def before(self, number: int, operation: Operation) -> None:
        """About to do operation `number`."""

    def after(self, number: int) -> None:
        """It is done."""

    def do(self, work: Callable[[], object], name: str, path: Path, *more: object) -> object:
        operation, number = (self.rank, name, path.relative_to(self.site.folder), *more), self.count
        self.site.crew.turn(self.rank)
        if not self.healed:
            self.before(number, operation)
        result = work()  # one that fails by itself, as removing what isn't there does, hasn't happened
        self.site.journal.append(operation)
        self.count += 1
        if not self.healed:
            self.after(number)
        return result

    def make_folder(self, path: Path) -> None:
        for folder in [*reversed(path.parents), path]:
            if folder.is_relative_to(self.site.folder) and not folder.exists():
                self.do(lambda folder=folder: folder.mkdir(exist_ok=True), "mkdir", folder)

    def create(self, path: Path) -> int:
        handle = self.do(lambda: super(Noting, self).create(path), "create", path)
        self._paths[handle] = path
        return handle

    def append(self, handle: int, chunk: bytes | memoryview) -> int:
        content = bytes(chunk)
        return self.do(lambda: super(Noting, self).append(handle, content), "append", self._paths[handle], content)

    def sync(self, handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        self.do(lambda: None, "sync", path)

    def rename(self, source: Path, target: Path) -> None:
        renamed = target.relative_to(self.site.folder)
        self.do(lambda: super(Noting, self).rename(source, target), "rename", source, renamed)

    def unlink(self, path: Path) -> None:
        self.do(lambda: super(Noting, self).unlink(path), "unlink", path)

    def remove_folder(self, path: Path) -> None:
        self.do(lambda: super(Noting, self).remove_folder(path), "rmdir", path)


class Dying(Noting):
    """Ends before or after the n-th operation, or within it, where that is an append, with half of it done: with `end`, the end
    of the whole process or the error that a rank sees where its writer has died."""

    def __init__(self, site: Site, rank: int, number: int, when: str, end: type[BaseException] = Killed) -> None:
        super().__init__(site, rank)
        self.number, self.when, self.end = number, when, end

    def before(self, number: int, operation: Operation) -> None:
        if self.hit or number != self.number or self.when == "after":
            return
        if self.when == "within" and operation[1] == "append":
            *what, path, content = operation
            half = content[: len(content) // 2]
            with open(self.site.folder / path, "ab") as file:
                file.write(half)
            self.site.journal.append((*what, path, half))
        self.hit = True
        raise self.end

    def after(self, number: int) -> None:
        if number == self.number and self.when == "after":
            self.hit = True
            raise self.end


class Failing(Noting):
    """Answers the n-th operation with an error of the file system, and, if it lasts, every one after it."""

    def __init__(self, site: Site, rank: int, number: int, code: int, lasting: bool) -> None:
        super().__init__(site, rank)
        self.number, self.code, self.lasting = number, code, lasting

    def before(self, number: int, operation: Operation) -> None:
        if self.lasting if self.hit else number == self.number:
            self.hit = True
            raise OSError(self.code, os.strerror(self.code), str(self.site.folder / operation[2]))


@dataclass
class _File:
    writes: list[tuple[int | None, bytes]] = field(default_factory=list)
    """(whose it is until that machine syncs, then None; the bytes)"""
    changed: int = 0
    """When it was last written, in ns."""


@dataclass
class _Folder:
    synced: dict[str, _File | _Folder] = field(default_factory=dict)
    live: dict[str, _File | _Folder] = field(default_factory=dict)
    pending: list[tuple[int, Callable[[dict], None]]] = field(default_factory=list)

    def change(self, rank: int, work: Callable[[dict], None]) -> None:
        work(self.live)
        self.pending.append((rank, work))


def _stored(folder: Path) -> _Folder:
    """A folder as it is, all of it on the disk."""
    entries = {path.name: _stored(path) if path.is_dir() else _File([(None, path.read_bytes())], path.stat().st_mtime_ns)
               for path in folder.iterdir()}
    return _Folder(entries, dict(entries))


class PowerCut:
    """What may be on a disk that held `folder` when the operations that follow were cut short."""

    def __init__(self, folder: Path) -> None:
        self.top, self.now = _stored(folder), time.time_ns()

    def apply(self, operations: Sequence[Operation]) -> None:
        for rank, name, path, *more in operations:
            self.now += 1_000_000
            parent = self._at(path.parent) if path != Path(".") else None
            if name == "mkdir":
                if path.name not in parent.live:  # another rank was faster
                    parent.change(rank, _link(path.name, _Folder()))
            elif name == "create":
                parent.change(rank, _link(path.name, _File(changed=self.now)))
            elif name == "append":
                self._at(path).writes.append((rank, more[0]))
                self._at(path).changed = self.now
            elif name == "sync":
                _sync(self._at(path), rank)
            elif name == "rename":
                parent.change(rank, _rename(path.name, more[0].name, parent.live[path.name]))
            else:
                parent.change(rank, _unlink(path.name))

    def _at(self, path: Path) -> _File | _Folder:
        found = self.top
        for name in path.parts:
            found = found.live[name]
        return found

    def write(self, target: Path, chance: random.Random, cut: Collection[int]) -> None:
        """Make one of the states that the disk may be in, as a new folder. `cut`: the ranks whose machines have lost what they
        hadn't synced; of the others, all is there."""
        _write(self.top, target, _Loss(cut, chance.choice([0.0, 0.2, 0.5, 0.8, 1.0]), chance))


@dataclass(frozen=True)
class _Loss:
    """Of what ranks hadn't synced: each thing is kept with the probability `keep`."""

    ranks: Collection[int]
    keep: float
    chance: random.Random

    def spares(self, rank: int | None) -> bool:
        return rank not in self.ranks or self.chance.random() < self.keep


def _link(name: str, entry: _File | _Folder) -> Callable[[dict], None]:
    return lambda entries: entries.__setitem__(name, entry)


def _unlink(name: str) -> Callable[[dict], None]:
    return lambda entries: entries.pop(name, None)


def _rename(source: str, target: str, entry: _File | _Folder) -> Callable[[dict], None]:
    def work(entries: dict) -> None:
        if entries.get(source) is entry:
            del entries[source]
        entries[target] = entry
    return work


def _sync(entry: _File | _Folder, rank: int) -> None:
    if isinstance(entry, _Folder):
        entry.synced = dict(entry.live)
        entry.pending.clear()
    else:
        entry.writes = [(None if owner == rank else owner, chunk) for owner, chunk in entry.writes]


def _write(entry: _File | _Folder, target: Path, loss: _Loss) -> None:
    if isinstance(entry, _File):
        target.write_bytes(_content(entry, loss))
        os.utime(target, ns=(entry.changed, entry.changed))
        return
    entries = dict(entry.synced)
    for rank, work in entry.pending:
        if loss.spares(rank):
            work(entries)
    target.mkdir()
    for name, child in entries.items():
        _write(child, target / name, loss)


def _content(file: _File, loss: _Loss) -> bytes:
    """What was synced, and of each write after that all, nothing (zeros where a later one is there), or a beginning."""
    there = [loss.spares(owner) for owner, _ in file.writes]
    last = max(itertools.chain([-1], (number for number, is_there in enumerate(there) if is_there)))
    parts = []
    for number, (owner, chunk) in enumerate(file.writes[: last + 1]):
        if not there[number]:
            parts.append(bytes(len(chunk)))
        elif number == last and owner in loss.ranks and loss.chance.random() < 0.5:
            parts.append(chunk[: loss.chance.randrange(len(chunk) + 1)])
        else:
            parts.append(chunk)
    return b"".join(parts)

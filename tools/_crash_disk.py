"""Disks that note every operation, die or fail at one, and what a real one may hold after the power is cut.

POSIX promises little: bytes are there once their file was synced, names once their folder was. Before that each write and
each change of a name may be on the disk or not, in any order; a write may be there in part, or as zeros.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megalm.tools._trials import Hasty

Operation = tuple
"""(name, path, ...more): more is the bytes of an append and the target of a rename. Paths are relative to the run's folder."""


class Killed(BaseException):
    """The end of a process: no handler may stop it."""


class Noting(Hasty):
    """Notes every operation that changes the disk. `before` and `after` are called around the n-th (from 0)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log: list[Operation] = []
        self._paths: dict[int, Path] = {}

    def before(self, number: int, path: Path) -> None:
        """About to do operation `number`."""

    def after(self, number: int) -> None:
        """It is done."""

    def do(self, work: Callable[[], object], name: str, path: Path, *more: object) -> object:
        number = len(self.log)
        self.log.append((name, path.relative_to(self.folder), *more))
        self.before(number, path)
        result = work()
        self.after(number)
        return result

    def make_folder(self, path: Path) -> None:
        for folder in [*reversed(path.parents), path]:
            if folder.is_relative_to(self.folder) and not folder.exists():
                self.do(folder.mkdir, "mkdir", folder)

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
        renamed = target.relative_to(self.folder)
        self.do(lambda: super(Noting, self).rename(source, target), "rename", source, renamed)

    def unlink(self, path: Path) -> None:
        self.do(lambda: super(Noting, self).unlink(path), "unlink", path)

    def remove_folder(self, path: Path) -> None:
        self.do(lambda: super(Noting, self).remove_folder(path), "rmdir", path)


class Dying(Noting):
    """Kills its process before or after the n-th operation, or within it, which is an append, with half of it done."""

    def __init__(self, folder: Path, number: int, when: str) -> None:
        super().__init__(folder)
        self.number, self.when = number, when

    def before(self, number: int, path: Path) -> None:
        if number == self.number and self.when == "within":
            content = self.log[number][2]
            with open(path, "ab") as file:
                file.write(content[: len(content) // 2])
        if number == self.number and self.when != "after":
            raise Killed

    def after(self, number: int) -> None:
        if number == self.number:
            raise Killed


class Failing(Noting):
    """Answers the n-th operation with an error of the file system, and, if it lasts, every one after it."""

    def __init__(self, folder: Path, number: int, code: int, lasting: bool) -> None:
        super().__init__(folder)
        self.number, self.code, self.lasting = number, code, lasting

    def before(self, number: int, path: Path) -> None:
        if number == self.number or (self.lasting and number > self.number):
            raise OSError(self.code, os.strerror(self.code), str(path))


@dataclass
class _File:
    synced: bytes = b""
    pending: list[bytes] = field(default_factory=list)


@dataclass
class _Folder:
    synced: dict[str, _File | _Folder] = field(default_factory=dict)
    live: dict[str, _File | _Folder] = field(default_factory=dict)
    pending: list[Callable[[dict], None]] = field(default_factory=list)

    def change(self, work: Callable[[dict], None]) -> None:
        work(self.live)
        self.pending.append(work)


def _stored(folder: Path) -> _Folder:
    """A folder as it is, all of it on the disk."""
    entries = {path.name: _stored(path) if path.is_dir() else _File(path.read_bytes()) for path in folder.iterdir()}
    return _Folder(entries, dict(entries))


class PowerCut:
    """What may be on a disk that held `folder` when the operations that follow were cut short."""

    def __init__(self, folder: Path) -> None:
        self.top = _stored(folder)

    def apply(self, operations: Sequence[Operation]) -> None:
        for name, path, *more in operations:
            parent = self._at(path.parent) if path != Path(".") else None
            if name == "mkdir":
                parent.change(_link(path.name, _Folder()))
            elif name == "create":
                parent.change(_link(path.name, _File()))
            elif name == "append":
                self._at(path).pending.append(more[0])
            elif name == "sync":
                _sync(self._at(path))
            elif name == "rename":
                parent.change(_rename(path.name, more[0].name, parent.live[path.name]))
            else:
                parent.change(_unlink(path.name))

    def _at(self, path: Path) -> _File | _Folder:
        found = self.top
        for name in path.parts:
            found = found.live[name]
        return found

    def write(self, target: Path, chance: random.Random) -> None:
        """Make one of the states that the disk may be in, as a new folder."""
        keep = chance.choice([0.0, 0.2, 0.5, 0.8, 1.0])
        _write(self.top, target, chance, keep)


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


def _sync(entry: _File | _Folder) -> None:
    entry.synced = dict(entry.live) if isinstance(entry, _Folder) else b"".join([entry.synced, *entry.pending])
    entry.pending.clear()


def _write(entry: _File | _Folder, target: Path, chance: random.Random, keep: float) -> None:
    if isinstance(entry, _File):
        target.write_bytes(_content(entry, chance, keep))
        return
    entries = dict(entry.synced)
    for work in entry.pending:
        if chance.random() < keep:
            work(entries)
    target.mkdir()
    for name, child in entries.items():
        _write(child, target / name, chance, keep)


def _content(file: _File, chance: random.Random, keep: float) -> bytes:
    """What was synced, and of each write after that all, nothing (zeros where a later one is there), or a beginning."""
    parts = [file.synced]
    kept = [chance.random() < keep for _ in file.pending]
    last = max(itertools.chain([-1], (number for number, is_kept in enumerate(kept) if is_kept)))
    for number, chunk in enumerate(file.pending[: last + 1]):
        if not kept[number]:
            parts.append(bytes(len(chunk)))
        elif number == last and chance.random() < 0.5:
            parts.append(chunk[: chance.randrange(len(chunk) + 1)])
        else:
            parts.append(chunk)
    return b"".join(parts)

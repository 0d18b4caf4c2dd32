"""Disks that fail, die or remember."""
from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megalm.tools._crew import Killed
from megalm.tools._trials import Hasty

CALLS = ("make_folder", "write", "sync_folder", "rename", "remove")


class Remembering(Hasty):
    """Notes every operation as (name, file names)."""

    def __init__(self) -> None:
        self.log: list[tuple[str, ...]] = []

    def happen(self, name: str, *paths: Path) -> None:
        self.log.append((name, *(path.name for path in paths)))

    def after(self, name: str) -> None:
        return

    def make_folder(self, path: Path) -> None:
        self.happen("make_folder", path)
        super().make_folder(path)
        self.after("make_folder")

    def write(self, path: Path, chunks: Iterable[bytes | memoryview]) -> int:
        self.happen("write", path)
        written = super().write(path, self.torn(chunks))
        self.after("write")
        return written

    def torn(self, chunks: Iterable[bytes | memoryview]) -> Iterable[bytes | memoryview]:
        return chunks

    def sync_folder(self, path: Path) -> None:
        self.happen("sync_folder", path)
        super().sync_folder(path)
        self.after("sync_folder")

    def rename(self, source: Path, target: Path) -> None:
        self.happen("rename", source, target)
        super().rename(source, target)
        self.after("rename")

    def remove(self, path: Path) -> None:
        self.happen("remove", path)
        super().remove(path)
        self.after("remove")


class Dying(Remembering):
    """Kills its process at the n-th operation (from 0): just before it, just after it, or in the middle of a write."""

    def __init__(self, last: int, when: str) -> None:
        super().__init__()
        self.last, self.when = last, when

    def happen(self, name: str, *paths: Path) -> None:
        super().happen(name, *paths)
        if len(self.log) == self.last + 1 and self.when == "before":
            raise Killed

    def after(self, name: str) -> None:
        if len(self.log) == self.last + 1 and self.when == "after":
            raise Killed

    def torn(self, chunks: Iterable[bytes | memoryview]) -> Iterable[bytes | memoryview]:
        for chunk in chunks:
            if len(self.log) == self.last + 1 and self.when == "within":
                yield chunk[: len(chunk) // 2]
                raise Killed
            yield chunk


class Failing(Remembering):
    """Answers an operation with an error of the file system; a write fails with half of its bytes on the disk.

    `name`: the operation; `number`: from its which occurrence (0 is the first) on it fails.
    """

    def __init__(self, code: int = errno.ENOSPC, name: str = "write", number: int = 0) -> None:
        super().__init__()
        self.code, self.name, self.number = code, name, number

    def happen(self, name: str, *paths: Path) -> None:
        super().happen(name, *paths)
        if name == self.name and self._due() and name != "write":
            raise OSError(self.code, os.strerror(self.code), str(paths[0]))

    def _due(self) -> bool:
        return sum(entry[0] == self.name for entry in self.log) > self.number

    def torn(self, chunks: Iterable[bytes | memoryview]) -> Iterable[bytes | memoryview]:
        for chunk in chunks:
            if self.name == "write" and self._due():
                yield chunk[: len(chunk) // 2]
                raise OSError(self.code, os.strerror(self.code))
            yield chunk


@contextlib.contextmanager
def mounted(folder: Path, size: str) -> Iterator[Path]:
    """A small file system; the test is skipped where none can be mounted."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting a tmpfs isn't allowed here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def tree(folder: Path) -> dict[str, Any]:
    """Every file below the folder, hidden ones included, with its content."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}

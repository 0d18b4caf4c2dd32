"""The few file operations a checkpoint is made of, behind one object: tests hand in one that fails or dies at any of them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from megalm.data.publish import sync_folder


class Disk:
    """POSIX files. A file's bytes are on the disk when `write` returns, a name's when `sync_folder` of its folder has.

    Every method raises OSError (full disk, I/O error, no permission, read-only file system). All that changes a disk goes
    through `make_folder`, `create`, `append`, `sync`, `sync_folder`, `rename`, `unlink` and `remove_folder`.
    """

    def make_folder(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)

    def write(self, path: Path, chunks: Iterable[bytes | memoryview]) -> int:
        """Write a new file, which must not exist; returns its size in bytes."""
        written = 0
        handle = self.create(path)
        try:
            for chunk in chunks:
                written += self.append(handle, chunk)
            self.sync(handle)
        finally:
            os.close(handle)
        return written

    def create(self, path: Path) -> int:
        """Open a new file for writing."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def append(self, handle: int, chunk: bytes | memoryview) -> int:
        """Write all of the chunk; returns its length."""
        rest = memoryview(chunk)
        while rest:
            rest = rest[os.write(handle, rest):]
        return len(chunk)

    def sync_folder(self, path: Path) -> None:
        """Put the folder's names, new, renamed or gone, on the disk."""
        sync_folder(path, self.sync)

    def sync(self, handle: int) -> None:
        """Wait until an open file's, or folder's, content is on the disk."""
        os.fsync(handle)

    def rename(self, source: Path, target: Path) -> None:
        """Rename a file or folder, atomically; a file at `target` is replaced, a folder with content isn't."""
        os.rename(source, target)

    def remove(self, path: Path) -> None:
        """Remove a file or a folder with all that is in it; one that is gone already is fine."""
        with contextlib.suppress(FileNotFoundError):
            self._clear(path)

    def _clear(self, path: Path) -> None:
        if not path.is_dir() or path.is_symlink():
            return self.unlink(path)
        for entry in sorted(path.iterdir()):
            self._clear(entry)
        self.remove_folder(path)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def remove_folder(self, path: Path) -> None:
        """Remove an empty folder."""
        os.rmdir(path)

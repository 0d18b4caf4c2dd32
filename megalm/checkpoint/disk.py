"""The few file operations a checkpoint is made of, behind one object: tests hand in one that fails or dies at any of them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from megalm.data.publish import sync_folder

COPY_BYTES = 1 << 20


class Disk:
    """POSIX files. A file's bytes are on the disk when `write` returns, a name's when `sync_folder` of its folder has.

    Every method raises OSError (full disk, I/O error, no permission, read-only file system).
    """

    def make_folder(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)

    def write(self, path: Path, chunks: Iterable[bytes | memoryview]) -> int:
        """Write a new file, which must not exist; returns its size in bytes."""
        written = 0
        with open(path, "xb") as file:
            for chunk in chunks:
                written += file.write(chunk)
            file.flush()
            self.sync(file.fileno())
        return written

    def copy(self, source: Path, path: Path) -> int:
        """Copy one file's content; returns its size in bytes."""
        with open(source, "rb") as file:
            return self.write(path, iter(lambda: file.read(COPY_BYTES), b""))

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
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

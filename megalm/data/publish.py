"""Files that appear whole or not at all: written under another name in the same folder, synced, renamed."""
from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from .errors import DataError

PARTIAL = ".partial"


def sync_folder(folder: Path, sync: Callable[[int], None] | None = None) -> None:
    """Make renames in the folder survive a power cut; file systems that can't sync a folder are left alone."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        (sync or os.fsync)(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(handle)


def write_atomically(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Write a file that several processes may write at once with the same content: the last rename wins, nobody sees a part."""
    handle, temporary = tempfile.mkstemp(prefix=path.name + ".", suffix=PARTIAL, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fchmod(file.fileno(), 0o644)  # mkstemp's 0600 would hide the cache from the next user
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    sync_folder(path.parent)


class PartialFile:
    """A file under construction at `<path>.partial`, locked against a second writer of the same path.

    The fixed name means that what a killed writer left behind is overwritten by the next one, not piled up. `publish`
    renames it into place, `discard` removes it; one of them must be called.
    """

    def __init__(self, path: Path):
        """Raises DataError if another process is writing the same path, OSError if it can't be written."""
        self.path = path
        self.partial = path.with_name(path.name + PARTIAL)
        self.file = self._open_locked()

    def _open_locked(self):
        while True:
            handle = os.open(self.partial, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(handle)
                raise DataError(f"{self.path}: another process is writing it now") from None
            except OSError:
                pass  # a file system without locks: two writers at once aren't noticed there
            if self._is_current(handle):
                os.ftruncate(handle, 0)
                return os.fdopen(handle, "wb", buffering=1 << 20)
            os.close(handle)  # its last owner published or removed it between our open and our lock

    def _is_current(self, handle: int) -> bool:
        try:
            return os.stat(self.partial).st_ino == os.fstat(handle).st_ino
        except FileNotFoundError:
            return False

    def sync(self) -> None:
        """Bring everything written so far to the disk: a full disk is noticed here and not after the rename."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def publish(self) -> None:
        """Rename into place; the lock is released."""
        self.sync()
        os.replace(self.partial, self.path)
        self.file.close()

    def discard(self) -> None:
        """Remove what was written, unless it was published. A full disk can't take the buffered rest: it isn't needed."""
        if self.file.closed:
            return
        with contextlib.suppress(FileNotFoundError):
            self.partial.unlink()
        with contextlib.suppress(OSError):
            self.file.close()

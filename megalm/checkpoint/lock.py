"""One job at a time in a run's folder: two would delete each other's half-written checkpoints and cut each other's metrics."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
from io import FileIO
from pathlib import Path

from megalm.checkpoint.format import CheckpointError

LOCK = ".lock"
UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # what file systems without locks answer, Lustre and some NFS


def hold(run_folder: str | Path) -> FileIO:
    """Take the folder, which exists, until the file returned is closed or this process ends, in whatever way.

    Reading (`megalm generate`, plots) needs no lock. On a file system without locks nobody is kept out.
    Raises CheckpointError when another job has the folder.
    """
    path = Path(run_folder) / LOCK
    file = FileIO(path, "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in UNSUPPORTED:
            return file
        file.seek(0)
        holder = file.read(200).decode(errors="replace").strip() or "unknown"
        file.close()
        if not isinstance(error, BlockingIOError):
            raise
        # On NFS the lock of a node that was lost can outlive it.
        raise CheckpointError(f"train.dir {run_folder} is in use by another job ({holder}); if that one ended with its machine, "
                              f"delete {path}") from error
    with contextlib.suppress(OSError):  # for the message above; a full disk is for those to name who have to write
        file.truncate(0)
        file.write(f"{socket.gethostname()}, pid {os.getpid()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode())
    return file

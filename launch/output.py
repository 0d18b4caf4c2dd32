"""Where output goes: one log file a rank, rank 0's on the console too, and the launcher's own lines on standard error."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from megalm.config import ConfigError


def log_path(run_folder: str | Path, rank: int) -> Path:
    """train.dir/logs/rank_00003.log"""
    return Path(run_folder) / "logs" / f"rank_{rank:05d}.log"


def prepare(run_folder: str | Path) -> None:
    """Make the folder of the logs. Raises ConfigError where it can't be written."""
    folder = log_path(run_folder, 0).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError([f"train.dir: {run_folder} can't be written: {error.strerror}"]) from error


class Lasting(io.TextIOWrapper):
    """Text to a file descriptor, line by line. What it doesn't take (a lost ssh, a full disk) is dropped: training goes on."""

    def __init__(self, fd: int):
        file = io.BufferedWriter(io.FileIO(fd, "w", closefd=False))
        super().__init__(file, encoding="utf-8", errors="backslashreplace", line_buffering=True)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()


def redirect(log: Path, console: bool) -> None:
    """Send file descriptors 1 and 2 of this process to the end of `log`; with `console` also to where they went before.

    The copy is made by a `tee` of its own session, so that the last words of a killed process still arrive, and
    neither Ctrl-C nor a console that goes away (`| head`, a lost ssh) cuts the log or the training off. `sys.stdout` gets
    two attributes for progress displays: `terminal`, a stream straight to the terminal that the console is (None if it is
    none), and `log`, a stream to the log file alone. All these streams are Lasting.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
    to_log = Lasting(file)
    to_log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} pid {os.getpid()}\n")
    terminal = Lasting(os.dup(1)) if console and os.isatty(1) else None
    if console:
        command = ["tee", "-ai", "--output-error=warn-nopipe", str(log)]
        tee = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
        target = tee.stdin.fileno()
    else:
        target = file
    os.dup2(target, 1)
    os.dup2(target, 2)
    if console:
        tee.stdin.close()
    sys.stdout, sys.stderr = Lasting(1), Lasting(2)
    sys.stdout.terminal, sys.stdout.log = terminal, to_log


def say(text: str) -> None:
    """A line, or several, from the launcher itself, on standard error.

    Where nobody reads it any more (the same Ctrl-C ended `| tee`, ssh was lost), it is dropped: the ranks die with the
    launcher, which therefore may not fail before they have saved.
    """
    try:
        print(f"megalm: {text}", file=sys.stderr, flush=True)
    except OSError:
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), sys.stderr.fileno())


def mistake(error: Exception) -> None:
    """What the user did wrong, a line each, on standard error."""
    print("\n".join(f"error: {problem}" for problem in getattr(error, "problems", [error])), file=sys.stderr, flush=True)


def tail(log: Path, lines: int = 20) -> list[str]:
    """The last lines of a log file, read from its last 64 KiB; empty if there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 65536))
            return file.read().decode(errors="replace").splitlines()[-lines:]
    except OSError:
        return []

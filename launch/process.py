"""Processes that cannot be left behind: Linux primitives that the local launcher and the tests' rank runner share."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from pathlib import Path

from megalm.parallel.process import prctl

PR_SET_CHILD_SUBREAPER = 36  # prctl(2)
KILL_SECONDS = 60.0  # from SIGKILL to the end: the kernel takes a while for a large memory, or a GPU's


def ignored(number: int) -> bool:
    """Was this process started to ignore the signal, as nohup does with SIGHUP and a shell with SIGINT in the background?"""
    return signal.getsignal(number) == signal.SIG_IGN


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends, so that `descendants` still finds it."""
    prctl(PR_SET_CHILD_SUBREAPER, 1)


def deepspeed_of(launcher: int) -> int | None:
    """The `deepspeed` command that started DeepSpeed's launcher of one machine; None where that is no such launcher, or the
    command ran on another machine."""
    with contextlib.suppress(OSError, ValueError):
        parent = int(Path(f"/proc/{launcher}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
        names = [[os.path.basename(word) for word in Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")[:4]]
                 for pid in (launcher, parent)]
        if "deepspeed.launcher.launch" in names[0] and {"deepspeed", "ds", "deepspeed.launcher.runner"} & {*names[1]}:
            return parent
    return None


def leave_after(pid: int) -> None:
    """When that process ends, this one, which isn't its child, gets a SIGTERM: save and leave. Raises OSError where it has ended,
    or the kernel can't tell (before Linux 5.3)."""
    handle = os.pidfd_open(pid)

    def wait() -> None:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        poll.poll()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def descendants(root: int) -> list[int]:
    """The pids of all processes below `root`, parents before children. Zombies count until they are reaped."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                # After the command name, which is in parentheses and may hold anything: state, then ppid.
                fields = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
                children.setdefault(int(fields[1]), []).append(int(entry.name))
    found: list[int] = []
    level = [root]
    while level:
        level = [child for pid in level for child in children.get(pid, [])]
        found += level
    return found


def end_descendants(patience: float) -> list[int]:
    """Reap every descendant of this process; after `patience` seconds SIGKILL those that remain and return their pids.

    One that waits in the kernel, for a device or a file system that hangs, doesn't end: after KILL_SECONDS it is left behind.
    Needs `adopt_orphans` for grandchildren to be reaped here.
    """
    deadline = time.monotonic() + patience
    give_up = deadline + KILL_SECONDS
    killed: list[int] = []
    while True:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        left = descendants(os.getpid())
        if not left or time.monotonic() >= give_up:
            return killed
        if time.monotonic() >= deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            killed += [pid for pid in left if pid not in killed]
        time.sleep(0.01)


def describe_status(status: int) -> str:
    """What `os.waitpid` reported, in words: "exit code 3", "signal 9 (SIGKILL)"."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        with contextlib.suppress(ValueError):
            return f"signal {number} ({signal.Signals(number).name})"
        return f"signal {number}"
    return f"exit code {os.WEXITSTATUS(status)}"

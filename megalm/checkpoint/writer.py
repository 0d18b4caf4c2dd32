"""The process that writes one rank's checkpoints while the rank trains, and the rank's end of the line to it.

The rank copies its state into memory that both share, says what it is, and trains on; the writer hashes, writes, syncs and
renames. It is a process and not a thread because Python runs one thread at a time, a fresh one because a CUDA context
doesn't survive a fork, and it imports no torch: it is there in a twentieth of a second and takes 15 MB. The kernel kills it
with its rank.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import mmap
import operator
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megalm.checkpoint.disk import Disk
from megalm.checkpoint.format import StoredFragment
from megalm.checkpoint.jobs import Answer, Performer
from megalm.parallel.process import SIGNALS, die_with_parent

# Without megalm.checkpoint's own __init__, which imports torch.
PROGRAM = """
import json, sys, types
sys.path[:], package, arguments = json.loads(sys.argv[1])
module = sys.modules["megalm.checkpoint"] = types.ModuleType("megalm.checkpoint")
module.__path__ = [package]
from megalm.checkpoint.writer import main
main(**arguments)
"""
NICE = 5
"""Where ranks take every core, training goes before writing."""
LINE_SECONDS = 60.0
"""A job is a message of some kilobytes to a process that does nothing but wait for it."""
LEAVE_SECONDS = 5.0
SIGN = b"\n"
WRITES = "writing: the process that writes its checkpoints"
COPIES = "copying it: the process that copies its files"
LAYOUT = operator.attrgetter(*(field.name for field in dataclasses.fields(StoredFragment) if field.name != "step"))
"""All of an entry that stays the same from save to save."""


def main(parent: int, line: int, memory: int, size: int, root: str) -> None:
    """Do the jobs that come over the socket `line`, until it closes. `memory`: a file of `size` bytes, shared with the rank."""
    die_with_parent(parent)
    for number in SIGNALS:  # a Ctrl-C reaches a terminal's whole process group; when to stop is the ranks' decision
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    with contextlib.suppress(OSError):
        os.nice(NICE)
    performer = Performer(Path(root), Disk())
    with mmap.mmap(memory, size, prot=mmap.PROT_READ) as shared, socket.socket(fileno=line) as ours:
        remembered: list = []
        performer.moved = lambda: _sign_of_life(ours)
        # Its rank may be gone for a moment before the kernel ends it too.
        with memoryview(shared) as view, contextlib.suppress(ConnectionError):
            for job in ours.makefile("rb"):
                answer = perform(performer, json.loads(job), view, remembered)
                if answer is not None:
                    ours.sendall(json.dumps(dataclasses.asdict(answer)).encode() + b"\n")


def _sign_of_life(line: socket.socket) -> None:
    """An empty line; left out where the rank hasn't read those before it, and so needs none."""
    with contextlib.suppress(BlockingIOError):
        line.send(SIGN, socket.MSG_DONTWAIT)


def perform(performer: Performer, job: dict[str, Any], memory: memoryview, remembered: list) -> Answer | None:
    """One job: {"do": the method's name, ...its arguments}; a part's contents are (first byte, bytes) in the shared memory."""
    if job["do"] == "remember":
        remembered[:] = [[StoredFragment(**entry) for entry in job["entries"]], job["places"]]
        return None
    name = job.pop("do")
    if name == "part":
        entries, places = remembered
        steps = job.pop("steps")
        job["entries"] = [dataclasses.replace(entry, step=step) for entry, step in zip(entries, steps, strict=True)]
        job["content"] = lambda number: memory[places[number][0]: sum(places[number])]
    return getattr(performer, name)(**job)


class Writer:
    """A rank's end: one job at a time. `memory` is what the writer will read, `size` bytes. `busy`: a job has no answer yet.
    `heard`: when it last gave a sign of life, by time.monotonic."""

    def __init__(self, root: Path, size: int, name: str = WRITES) -> None:
        """Start the process. `name`: what it is, as WRITES and COPIES have it. Raises OSError."""
        self.size, self._name = max(size, 1), name
        self._file = os.memfd_create("megalm-checkpoint", os.MFD_CLOEXEC)
        os.ftruncate(self._file, self.size)
        # Populated: the first snapshot must not pay for the first touch of every page.
        self.memory = mmap.mmap(self._file, self.size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        ours, theirs = socket.socketpair()
        self._line, self._received = ours, b""
        self.busy, self.heard = False, time.monotonic()
        self._line.settimeout(LINE_SECONDS)
        self._poll = select.poll()  # select.select takes no descriptor above 1023
        self._poll.register(ours, select.POLLIN)
        self._told: list[tuple] | None = None  # a rank may own nothing, and tells that once too
        arguments = {"parent": os.getpid(), "line": theirs.fileno(), "memory": self._file, "size": self.size, "root": str(root)}
        package = Path(__file__).resolve().parent
        path = [str(package.parent.parent), *sys.path]
        command = [sys.executable, "-S", "-c", PROGRAM, json.dumps([path, str(package), arguments])]
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until it ignores them
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(), self._file))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            theirs.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, do: str, **arguments: Any) -> None:
        """Hand over a job; what comes of it, or of the writer, `answer` tells."""
        self.busy = True
        with contextlib.suppress(OSError):  # a writer that is gone
            self._line.sendall(json.dumps({"do": do, **arguments}).encode() + b"\n")

    def send_part(self, folder: str, rank: int, entries: Sequence[StoredFragment], places: Sequence[tuple[int, int]]) -> None:
        """Hand over this rank's part; places[i]: the (first byte, bytes) of entries[i] in the memory.

        All but the steps is the same each time and told once: telling it is what would take the longest of a small save.
        """
        layout = [LAYOUT(entry) for entry in entries]
        if layout != self._told:
            self.send("remember", entries=[vars(entry) for entry in entries], places=places)
            self._told = layout
        self.send("part", folder=folder, rank=rank, steps=[entry.step for entry in entries])

    def answer(self, seconds: float = 0.0) -> Answer | None:
        """The answer to the job, as soon as it is there; None when it isn't within so many seconds."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self._received:
            if not self._poll.poll(1000 * max(0.0, deadline - time.monotonic())):
                return None
            received = self._receive()
            if not received:
                return self._gone()
            self.heard = time.monotonic()
            self._received = (self._received + received).lstrip(SIGN)
        line, _, self._received = self._received.partition(b"\n")
        self.busy = False
        return Answer(**json.loads(line))

    def _receive(self) -> bytes:
        try:
            return self._line.recv(1 << 16)
        except ConnectionError:
            return b""

    def _gone(self) -> Answer:
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = self._process.wait(LEAVE_SECONDS)
            end = f"exit code {status}" if status >= 0 else f"signal {-status} ({signal.Signals(-status).name})"
            return Answer(f"{self._name} has ended: {end}")
        return Answer(f"{self._name} doesn't answer any more")

    def close(self) -> None:
        """End the process; a job that it hasn't finished stays under a hidden name."""
        self._line.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0 if self.busy else LEAVE_SECONDS)
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # one that waits in the kernel, for a file system, dies when it can
            self._process.wait(LEAVE_SECONDS)
        os.close(self._file)

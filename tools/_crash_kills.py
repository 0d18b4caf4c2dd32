"""Ranks that are processes, each with its writer, and a SIGKILL to any of them."""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megalm.checkpoint.disk import Disk
from megalm.tools._crash_scene import Scene
from megalm.tools._crew import Crew
from megalm.tools._trials import saver

KILL_SECONDS = 0.25
"""Within which a kill comes: the writers' start and some saves."""
GRACE_SECONDS = 0.1
"""Within which the others of a killed rank are killed too, as by a launcher."""
TRIAL_SECONDS = 60
"""After which a process that should have been killed, or have ended, is."""
STEP_SECONDS = 0.003
ATTEMPTS = 3
LENGTH = struct.Struct("!I")
GATHER, WRITER, SAVED = range(3)
"""What a rank says: a value to gather, its writer's pid, that the checkpoint is whole."""


def _send(line: socket.socket, value: Any) -> None:
    content = pickle.dumps(value)
    line.sendall(LENGTH.pack(len(content)) + content)


def _receive(line: socket.socket) -> Any:
    """Raises EOFError when the other side is gone."""
    content = b""
    needed = LENGTH.size
    while len(content) < needed:
        chunk = line.recv(needed - len(content))
        if not chunk:
            raise EOFError
        content += chunk
        if needed == LENGTH.size and len(content) == needed:
            needed += LENGTH.unpack(content)[0]
    return pickle.loads(content[LENGTH.size:])


class _Line(Crew):
    """One rank's end of its line to the parent, which gathers for all."""

    def __init__(self, world_size: int, line: socket.socket) -> None:
        super().__init__(world_size)
        self._line = line

    def gather(self, rank: int, value: Any) -> list[Any]:
        _send(self._line, (GATHER, value))
        return _receive(self._line)


def _rank(scene: Scene, folder: Path, rank: int, line: socket.socket) -> None:
    """Save the case's state as a training run does, again where that failed, and say when it is whole."""
    share = scene.case.new.shares(scene.ranks)[rank]
    groups = _Line(scene.ranks, line).member(rank)
    with saver(folder, share, groups, Disk(), keep=scene.case.keep, max_failures=ATTEMPTS) as saves:
        saves.write_in_background(torch.device("cpu"))
        _send(line, (WRITER, saves.writer_pid))
        while saves.saved is None:
            saves.save(share.step, 8 * share.step)
            idle = 0
            while saves.saved is None and idle < 2:  # twice in a row nothing to do: it has failed
                [busy] = groups.highest(saves.state)
                saves.progress(busy)
                idle = 0 if busy else idle + 1
                time.sleep(STEP_SECONDS)
    _send(line, (SAVED, None))


class Job:
    """The processes of one trial. Every wait is bounded, and none is left when `with` ends."""

    def __init__(self, scene: Scene, folder: Path) -> None:
        self.ranks: list[int] = []
        self.writers: dict[int, int] = {}
        self.saved: set[int] = set()
        self._lines: list[socket.socket] = []
        self._said: dict[int, Any] = {}
        for rank in range(scene.ranks):
            ours, theirs = socket.socketpair()
            pid = os.fork()
            if pid == 0:
                signal.alarm(TRIAL_SECONDS)
                for other in (*self._lines, ours):
                    other.close()
                with contextlib.suppress(BaseException):
                    _rank(scene, folder, rank, theirs)
                os._exit(0)
            theirs.close()
            self.ranks.append(pid)
            self._lines.append(ours)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        for pid, line in zip(self.ranks, self._lines, strict=True):
            kill_process(pid)
            os.waitpid(pid, 0)
            line.close()
        deadline = time.monotonic() + TRIAL_SECONDS
        while any(map(_runs, self.writers.values())) and time.monotonic() < deadline:
            time.sleep(STEP_SECONDS)

    def go_on(self, seconds: float, until: Callable[[], bool] = lambda: False) -> None:
        """Gather for the ranks for so long, or until all have ended."""
        deadline = time.monotonic() + seconds
        while not until():
            open_lines = [line for line in self._lines if line.fileno() >= 0]
            left = deadline - time.monotonic()
            if not open_lines or left <= 0:
                return
            for line in select.select(open_lines, [], [], left)[0]:
                self._hear(self._lines.index(line), line)

    def _hear(self, rank: int, line: socket.socket) -> None:
        try:
            kind, value = _receive(line)
        except (EOFError, ConnectionError):
            line.close()
            return
        if kind == SAVED:
            self.saved.add(rank)
        elif kind == WRITER:
            self.writers[rank] = value
        else:
            self._said[rank] = value
        if len(self._said) == len(self._lines):
            values = [self._said[rank] for rank in range(len(self._lines))]
            self._said.clear()
            for other in self._lines:
                with contextlib.suppress(OSError):
                    _send(other, values)


def kill_process(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _runs(pid: int) -> bool:
    """Whether the process is there, and no zombie."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def kill(scene: Scene, folder: Path) -> tuple[str, bool, str | None]:
    """Save in processes, and kill one; what was done, whether the save had returned, and what is wrong with how they went on."""
    chance = scene.chance
    victim = chance.choice(("a rank", "all ranks", "a writer"))
    number, wait, grace = chance.randrange(scene.ranks), chance.uniform(0, KILL_SECONDS), chance.uniform(0, GRACE_SECONDS)
    what = f"{victim} ({number}) killed after {wait:.3f} s"
    with Job(scene, folder) as job:
        job.go_on(TRIAL_SECONDS, lambda: len(job.writers) == scene.ranks)
        if len(job.writers) < scene.ranks:
            return what, False, "the ranks ended by themselves"
        job.go_on(wait)
        kill_process(job.writers[number] if victim == "a writer" else job.ranks[number])
        if victim == "a writer":
            job.go_on(TRIAL_SECONDS)
        elif victim == "a rank":
            job.go_on(grace)
    # What a rank has said may still be unread: a save that had returned unheard isn't counted, which only asks for less.
    if victim == "a writer" and len(job.saved) < scene.ranks:
        return what, bool(job.saved), f"only the ranks {sorted(job.saved)} saved in the end"
    return what, bool(job.saved), None

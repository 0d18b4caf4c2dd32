"""The launcher as a process that a test can signal, wait for and look into, and that never outlives the test."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megalm.launch import run, supervise
from tests import dist

ROOT = dist.ROOT


def warm(test: Callable[[WarmLauncher], None]) -> Callable:
    """Run `test(launcher)` in a forked process that has everything imported, where starting a launcher takes no time."""

    @functools.wraps(test)
    def wrapper(tmp_path: Path, config_file: Path) -> None:
        dist.run(wrapper.inside, 1, tmp_path, config_file, group=False)

    def inside(_rank: int, _world_size: int, folder: Path, config_file: Path) -> None:
        with WarmLauncher(folder, config_file) as launcher:
            test(launcher)

    inside.__module__, inside.__qualname__ = test.__module__, f"{test.__qualname__}.inside"
    wrapper.inside = inside
    del wrapper.__wrapped__  # pytest would read the test's own signature
    return wrapper


def exists(pid: int) -> bool:
    """True for a live process (a zombie is not)."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Poll until `condition()` is true; fails the test after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def two_ranks(program: str) -> list[str]:
    """launch/run.py on two ranks under torchrun or deepspeed, as a command whose arguments are to follow."""
    if program == "torchrun":
        start = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            start = ["deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(free.getsockname()[1])]
    return [sys.executable, "-m", *start, str(ROOT / "launch/run.py")]


class Launcher:
    """`megalm train` on a job of jobs.py ("": training), output in files, in a session of its own as under a terminal."""

    def __init__(self, folder: Path, config: Path):
        self.folder, self.config = folder, config
        self.pids: list[int] = []

    def __enter__(self) -> Launcher:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self.pids:
            for kill in (os.killpg, os.kill):  # the group too: a shell's pipeline doesn't end with the shell
                with contextlib.suppress(ProcessLookupError):
                    kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    def start(self, job: str, *overrides: str, command: list[str] | None = None) -> int:
        """Start and return the pid. `command` replaces `megalm train CONFIG`."""
        ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS")
        clean = {name: value for name, value in os.environ.items() if name not in ours}
        clean.update(CUDA_VISIBLE_DEVICES="", PYTHONPATH=str(ROOT))
        command = command or [sys.executable, "-m", "megalm.cli", "train", str(self.config)]
        with (self.folder / "stdout").open("w") as out, (self.folder / "stderr").open("w") as err:
            arguments = [*command, *(["--job", f"tests.launch.jobs:{job}"] if job else []), *overrides]
            process = subprocess.Popen(arguments, cwd=ROOT, env=clean, stdout=out, stderr=err, start_new_session=True)
        process.returncode = 0  # reaped below, by pid
        self.pids.append(process.pid)
        return process.pid

    def wait(self, pid: int, seconds: float = 120.0) -> int:
        """The exit code (negative: the signal). Fails the test when it takes longer."""
        wait_until(lambda: not exists(pid), seconds)
        self.pids.remove(pid)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def run(self, job: str, *overrides: str, command: list[str] | None = None) -> int:
        return self.wait(self.start(job, *overrides, command=command))

    def start_all(self, job: str, **options) -> int:
        """Start, and wait until all four ranks have noted their pid."""
        pid = self.start(job, **options)
        wait_until(lambda: len(self.notes("pid")) == 4)
        return pid

    def notes(self, name: str) -> dict[int, object]:
        """What the ranks noted under `name`, by rank."""
        found = (self.folder / "run").glob(f"{name}_*")
        return {int(path.name.rpartition("_")[2]): json.loads(path.read_text()) for path in found if path.suffix != ".part"}

    def left(self) -> list[int]:
        """The noted processes that still run."""
        return [pid for name in ("pid", "child") for pid in self.notes(name).values() if exists(pid)]

    @property
    def stdout(self) -> str:
        return (self.folder / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text()

    def log(self, rank: int) -> str:
        return (self.folder / f"run/logs/rank_{rank:05d}.log").read_text()


class WarmLauncher(Launcher):
    """The same, forked from this process.

    `settings` replaces attributes in the launcher, by (owner, name); the grace after a failure is short unless told otherwise.
    """

    closed_console = False  # stdout is a pipe that nobody reads
    settings: dict[tuple[Any, str], Any] = {(supervise, "GRACE_SECONDS"): 1.0}
    ignored: tuple[int, ...] = ()  # signals that are ignored from the start, as by nohup
    terminal: int | None = None  # the other side of the pseudo-terminal that a job of start_on_terminal runs on

    def start_on_terminal(self, job: str, *overrides: str) -> int:
        """`start`, with all three streams on a terminal of its own; closing `terminal` hangs it up."""
        self.terminal, slave = pty.openpty()
        os.set_blocking(self.terminal, False)
        pid = self.start(job, *overrides, terminal=slave)
        os.close(slave)
        return pid

    def shown(self) -> str:
        """What the terminal has shown since the last call. Has to be called now and then: a full terminal stops who writes."""
        text = b""
        with contextlib.suppress(BlockingIOError):
            while True:
                text += os.read(self.terminal, 1 << 16)
        return text.decode(errors="replace")

    def start(self, job: str, *overrides: str, command: None = None, terminal: int | None = None) -> int:
        pid = os.fork()
        if pid == 0:
            os.setsid()
            for name, fd in (("stdout", 1), ("stderr", 2)):
                os.dup2(os.open(self.folder / name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_APPEND), fd)
            if terminal is not None:
                os.close(self.terminal)
                fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
                for fd in range(3):
                    os.dup2(terminal, fd)
                os.close(terminal)
                os.environ["TERM"] = "xterm"
            if self.closed_console:
                reader, writer = os.pipe()
                os.close(reader)
                os.dup2(writer, 1)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # which the rank server ignores
            for number in self.ignored:
                signal.signal(number, signal.SIG_IGN)
            for (owner, name), value in self.settings.items():
                setattr(owner, name, value)
            code = run.main([str(self.config), *(["--job", f"tests.launch.jobs:{job}"] if job else []), *overrides])
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        self.pids.append(pid)
        return pid

"""The process that tests/dist.py forks ranks from. See there.

    server   imports everything, one thread, computes nothing; a loop of requests
    leader   one a request: imports the test module, forks and watches the ranks, sends the answer
    rank     joins the process group, runs the job, sends its result through a pipe
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import importlib
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

from megalm.launch.process import adopt_orphans, describe_status, end_descendants
from megalm.parallel.process import die_with_parent

GRACE_SECONDS = 0.5  # after the first failure: time for the others' own errors, which are shown after it
TAIL_LINES = 30


def main() -> None:
    fd, parent = int(sys.argv[1]), int(sys.argv[2])
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest; its end ends us
    from megalm.engine.warm import warm

    importlib.import_module("pytest")
    with contextlib.suppress(Exception):  # what can't be imported shows its error in the job that needs it
        importlib.import_module("megalm.train")
    warm()
    connection = Connection(fd)
    connection.send(("ready", None))
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        server = os.getpid()
        pid = os.fork()
        if pid == 0:
            _lead(connection, server, _Request(*request))
        _, status = os.waitpid(pid, 0)
        if status != 0:
            connection.send(("failed", f"the leader of the ranks ended with {describe_status(status)}"))


@dataclass(frozen=True)
class _Request:
    name: str  # module:function
    world_size: int
    payload: bytes  # pickled (args, kwargs)
    timeout: float
    threads: int
    group: bool

    def job(self) -> Any:
        module, _, function = self.name.partition(":")
        return functools.reduce(getattr, function.split("."), importlib.import_module(module))


def _lead(connection: Connection, server: int, request: _Request) -> None:
    """The leader: one answer, ("results", pickles) or ("failed", text), then exit."""
    die_with_parent(server)
    os.setsid()
    adopt_orphans()
    folder = Path(tempfile.mkdtemp(prefix="megalm-ranks-"))
    try:
        request.job()  # imports its module once for all ranks
        ranks = [_start(request, rank, folder) for rank in range(request.world_size)]
        answer = _watch(ranks, time.monotonic() + request.timeout, request.timeout)
    except Exception:
        answer = ("failed", traceback.format_exc())
    end_descendants(patience=0)
    shutil.rmtree(folder, ignore_errors=True)
    connection.send(answer)
    os._exit(0)


@dataclass
class _Rank:
    rank: int
    pid: int
    pipe: Connection
    output: Path
    answer: tuple[str, Any] | None = None  # ("result", pickle), ("error", traceback) or ("died", how)
    when: float = 0.0  # of its error; a rank that died without a word comes first: the others' errors follow from it


def _start(request: _Request, rank: int, folder: Path) -> _Rank:
    reader, writer = Pipe(duplex=False)
    output = folder / f"rank_{rank}.log"
    leader = os.getpid()
    pid = os.fork()
    if pid == 0:
        reader.close()
        _rank(request, rank, folder, output, writer, leader)
    writer.close()
    return _Rank(rank, pid, reader, output)


def _rank(request: _Request, rank: int, folder: Path, output: Path, writer: Connection, leader: int) -> None:
    """One rank, from the fork to its end; never returns."""
    die_with_parent(leader)
    file = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
    try:
        value = _join_and_run(request, rank, folder)
        answer = ("result", pickle.dumps(value))
    except BaseException:
        answer = ("error", traceback.format_exc())
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(OSError):
        writer.send((answer, time.monotonic()))
    os._exit(0)  # no destructors: a process group that others have left may not go down quietly


def _join_and_run(request: _Request, rank: int, folder: Path) -> Any:
    import torch
    import torch.distributed

    torch.set_num_threads(request.threads)
    args, kwargs = pickle.loads(request.payload)
    if not request.group:
        return request.job()(rank, request.world_size, *args, **kwargs)
    size = str(request.world_size)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size, LOCAL_SIZE=size)
    torch.distributed.init_process_group(
        "gloo",
        store=torch.distributed.FileStore(str(folder / "store"), request.world_size),
        rank=rank,
        world_size=request.world_size,
        timeout=timedelta(seconds=request.timeout),
    )
    value = request.job()(rank, request.world_size, *args, **kwargs)
    torch.distributed.barrier()  # nobody leaves while another still talks to it
    return value


def _watch(ranks: list[_Rank], deadline: float, timeout: float) -> tuple[str, Any]:
    """Collect every rank's answer until all are in, one has failed, or the deadline has passed."""
    failed = False
    while any(rank.answer is None for rank in ranks):
        waiting = [rank for rank in ranks if rank.answer is None]
        ready = wait([rank.pipe for rank in waiting], max(0.0, deadline - time.monotonic()))
        for rank in waiting:
            if rank.pipe in ready:
                rank.answer, rank.when = _hear(rank)
        if not failed and any(rank.answer and rank.answer[0] != "result" for rank in ranks):
            failed, deadline = True, min(deadline, time.monotonic() + GRACE_SECONDS)
        elif time.monotonic() >= deadline:
            break
    if all(rank.answer and rank.answer[0] == "result" for rank in ranks):
        return "results", [rank.answer[1] for rank in ranks]
    return "failed", _report(ranks, timeout)


def _hear(rank: _Rank) -> tuple[tuple[str, Any], float]:
    try:
        return rank.pipe.recv()
    except EOFError:  # it ended without a word
        _, status = os.waitpid(rank.pid, 0)
        return ("died", describe_status(status)), 0.0


def _report(ranks: list[_Rank], timeout: float) -> str:
    """The first rank that failed in full, the others in a line; those that hang with their stacks."""
    hung = [rank for rank in ranks if rank.answer is None]
    bad = sorted((rank for rank in ranks if rank.answer and rank.answer[0] != "result"), key=lambda rank: rank.when)
    lines = []
    if bad:
        first, *others = bad
        lines += [f"rank {first.rank}: {first.answer[0]}: {first.answer[1].rstrip()}", *_tail(first)]
        lines += [f"afterwards rank {rank.rank}: {rank.answer[1].strip().splitlines()[-1]}" for rank in others]
        lines += [f"rank {rank.rank} was waiting" for rank in hung]
        return "\n".join(lines)
    for rank in hung:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank.pid, signal.SIGUSR1)
    time.sleep(0.2)  # for faulthandler to write
    for rank in hung:
        lines += [f"rank {rank.rank} did not finish within {timeout:.0f} s", *_tail(rank)]
    return "\n".join(lines)


def _tail(rank: _Rank) -> list[str]:
    text = rank.output.read_text(errors="replace") if rank.output.exists() else ""
    return [f"    | {line}" for line in text.splitlines()[-TAIL_LINES:]]


if __name__ == "__main__":
    main()

"""Run a test function on N gloo ranks that start in hundredths of a second.

    from tests import dist

    def job(rank, world_size, x):          # a module-level function of the test module; runs in every rank
        ...torch.distributed is initialised...
        return value                        # anything picklable

    def test_something():
        first, second = dist.run(job, 2, x)

How: one server process a pytest session (tests/dist_server.py) imports torch and deepspeed, computes nothing, and forks a
leader for each `run`; the leader imports the test module and forks the ranks. So pytest's own process may use torch
freely: nothing is ever forked from it. Ranks run with one thread (`threads=` for more), see no console (their output is
shown when a rank fails), and are SIGKILLed with their leader, their leader with the server, the server with pytest.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
START_SECONDS = 300  # importing everything, once a session, on a busy machine
MARGIN_SECONDS = 15  # the leader keeps the deadline; this is for a leader that doesn't


class RankFailed(AssertionError):
    """A rank raised, died or hung; the message has its traceback or signal, and the end of its output."""


def run(
    job: Callable[..., Any], world_size: int, *args: Any, timeout: float = 180, threads: int = 1, group: bool = True,
    **kwargs: Any,
) -> list[Any]:
    """`[job(rank, world_size, *args, **kwargs) for rank in range(world_size)]`, each on its own process.

    `job` must be importable by name. `group=False` leaves torch.distributed alone: plain warm processes.
    Raises RankFailed as soon as one rank fails, or after `timeout` seconds, which are many by default: cores may be shared.
    """
    name = f"{job.__module__}:{job.__qualname__}"
    assert "<locals>" not in name, f"{name}: a job must be a function at the top of its module"
    payload = pickle.dumps((args, kwargs))
    server = _server()
    try:
        kind, value = server.ask((name, world_size, payload, timeout, threads, group), timeout + MARGIN_SECONDS)
    except (TimeoutError, EOFError, ConnectionError) as error:
        server.kill()
        _server.cache_clear()
        raise RankFailed(f"{name}: the rank server {type(error).__name__}: {error}") from None
    if kind == "failed":
        raise RankFailed(f"{name} on {world_size} ranks: {value}")
    return [pickle.loads(item) for item in value]


class _Server:
    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            "GLOO_SOCKET_IFNAME": "lo",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.dist_server", str(theirs.fileno()), str(os.getpid())],
            cwd=ROOT,
            env=environment,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        self.connection = Connection(ours.detach())
        atexit.register(self.kill)
        answer = self.receive(START_SECONDS)
        assert answer == ("ready", None), answer

    def ask(self, request: Any, seconds: float) -> Any:
        self.connection.send(request)
        return self.receive(seconds)

    def receive(self, seconds: float) -> Any:
        if not self.connection.poll(seconds):
            raise TimeoutError(f"no answer within {seconds:.0f} s")
        return self.connection.recv()

    def kill(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.close()
        self.process.kill()
        self.process.wait()


@functools.cache
def _server() -> _Server:
    return _Server()

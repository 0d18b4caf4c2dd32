"""Starting all ranks on this machine: validated first, forked warm on CPU, fresh processes on GPUs."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from megalm.config import Config, ConfigError, load
from megalm.data.errors import DataError
from megalm.data.tokenizer import load_tokenizer  # imports no torch
from megalm.launch import output, rank
from megalm.launch.gpus import visible_gpus
from megalm.launch.output import say
from megalm.launch.process import adopt_orphans, ignored
from megalm.launch.supervise import Interrupts, RankProcess, supervise
from megalm.parallel.process import die_with_parent
from megalm.plan import Plan, PlanError, make_plan

LAUNCHER_PID = "MEGALM_LAUNCHER_PID"  # tells a fresh rank process who its parent must be
STORE = "MEGALM_STORE"  # the file through which the ranks of this machine meet


def start(config_path: str, overrides: Sequence[str], job: str = rank.TRAIN) -> int:
    """Run the job on every rank of the config and return its exit code; 2, with one line a problem, for a bad config."""
    gpus = visible_gpus()
    try:
        config = load(config_path, overrides)
        output.prepare(config.train.dir)
        plan = make_plan(config, world_size(config, gpus), load_tokenizer(config.tokenizer).vocab_size)
    except (ConfigError, PlanError, DataError) as error:
        output.mistake(error)
        return rank.USER_ERROR
    adopt_orphans()
    arguments = (job, config_path, list(overrides), config.train.dir)
    with _meeting_place(plan) as environment:
        if gpus:
            start_ranks = _spawn
        else:
            start_ranks = _fork
            _import_everything(environment, job)
        with Interrupts() as interrupts:
            what = f"rank{'s' * (plan.world_size > 1)} on {'GPUs' if gpus else 'the CPU'}"
            say(f"starting {plan.world_size} {what}: tp {plan.tp} x pp {plan.pp} x dp {plan.dp}")
            return supervise(start_ranks(plan, environment, arguments), interrupts)


def world_size(config: Config, gpus: int) -> int:
    """tp x pp x dp; dp "auto" takes all `gpus`, or is 1 without any.

    Raises PlanError when the GPUs are too few, or can't be divided into replicas.
    """
    parallel = config.parallel
    model_ranks = parallel.tp * parallel.pp
    replicas = 1 if parallel.dp == "auto" else parallel.dp
    least = model_ranks * replicas
    shape = f"tp {parallel.tp} x pp {parallel.pp}"
    if gpus and least > gpus:
        are = "is" if gpus == 1 else "are"
        raise PlanError([f"{shape} x dp {replicas} needs {least} GPUs but {gpus} {are} visible here; "
                         "with CUDA_VISIBLE_DEVICES= (empty) before the command it runs on the CPU"])
    if parallel.dp != "auto" or not gpus:
        return least
    if gpus % model_ranks:
        raise PlanError([f"{shape} = {model_ranks} ranks a replica don't divide the {gpus} visible GPUs: set parallel.dp"])
    return gpus


@contextlib.contextmanager
def _meeting_place(plan: Plan) -> Iterator[dict[str, str]]:
    """The environment that all ranks share. They meet at a file in a private folder: unlike a port, nobody can take it."""
    folder = Path(tempfile.mkdtemp(prefix="megalm-"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = str(plan.world_size)
    cores = len(os.sched_getaffinity(0))
    environment = {
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": world,
        "LOCAL_SIZE": world,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),  # for libraries that want one; the ranks themselves meet at STORE
        "GLOO_SOCKET_IFNAME": "lo",
        STORE: str(folder / "store"),
        LAUNCHER_PID: str(os.getpid()),
    }
    defaults = {
        "OMP_NUM_THREADS": str(max(1, cores // plan.world_size)),
        "OPENBLAS_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    try:
        yield {**{name: value for name, value in defaults.items() if name not in os.environ}, **environment}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _of_rank(number: int) -> dict[str, str]:
    return {"RANK": str(number), "LOCAL_RANK": str(number)}


def _process(plan: Plan, number: int, pid: int, run_folder: str) -> RankProcess:
    place = plan.place(number)
    return RankProcess(number, pid, f"pp {place.pp}, dp {place.dp}, tp {place.tp}", output.log_path(run_folder, number).resolve())


def _import_everything(environment: dict[str, str], job: str) -> None:
    """Import once what every rank needs, before they are forked; nothing is computed here."""
    os.environ.update(environment, DS_ACCELERATOR="cpu")  # before torch is imported: it reads the thread count then
    from megalm.engine.warm import warm

    rank.resolve(job)
    warm()


def _fork(plan: Plan, environment: dict[str, str], arguments: tuple) -> list[RankProcess]:
    """Fork every rank from this process, which has imported everything and computed nothing."""
    launcher = os.getpid()
    null = os.open(os.devnull, os.O_RDONLY)
    sys.stdout.flush()
    sys.stderr.flush()
    ranks = []
    for number in range(plan.world_size):
        # Signals wait until the child has its own handlers: the launcher's would swallow them.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, Interrupts.SIGNALS)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                die_with_parent(launcher)
                os.dup2(null, 0)
                os.environ.update(_of_rank(number))
                signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the launcher passes it on as SIGTERM
                for stop in (signal.SIGTERM, signal.SIGUSR1):
                    signal.signal(stop, signal.SIG_DFL)
                if not ignored(signal.SIGINT):
                    signal.signal(signal.SIGINT, signal.SIG_DFL)
                signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
                code = rank.run(*arguments, number)
            finally:
                os._exit(code)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        ranks.append(_process(plan, number, pid, arguments[3]))
    os.close(null)
    return ranks


def _spawn(plan: Plan, environment: dict[str, str], arguments: tuple) -> list[RankProcess]:
    """Start every rank as a fresh process: a CUDA context doesn't survive a fork."""
    job, config_path, overrides, run_folder = arguments
    command = [sys.executable, "-m", "megalm.launch.run", "--job", job, "--config", config_path, *overrides]
    ranks = []
    for number in range(plan.world_size):
        variables = {**os.environ, **environment, **_of_rank(number)}
        process = subprocess.Popen(command, env=variables, stdin=subprocess.DEVNULL)
        process.returncode = 0  # supervise reaps by pid; Popen must not
        ranks.append(_process(plan, number, process.pid, run_folder))
    return ranks

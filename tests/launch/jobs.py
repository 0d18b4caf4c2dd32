"""What the ranks of the launch tests run in place of training: each is (config path, overrides) -> exit code."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from megalm.config import load


def _place(config_path, overrides):
    return Path(load(config_path, overrides).train.dir), int(os.environ["RANK"])


def _note(folder, rank, name, value):
    path = folder / f"{name}_{rank}"
    path.with_suffix(".part").write_text(json.dumps(value))
    path.with_suffix(".part").rename(path)


def report(config_path, overrides):
    """Write what this rank sees; say a line on both streams."""
    folder, rank = _place(config_path, overrides)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", "MEGALM_STORE")
    _note(folder, rank, "seen", {"pid": os.getpid(), "overrides": overrides, **{name: os.environ.get(name) for name in names}})
    print(f"hello from rank {rank}")
    print(f"and a warning of rank {rank}", file=sys.stderr)
    os.system(f"echo a child of rank {rank}")
    return 0


def meet(config_path, overrides):
    """Start torch.distributed as training does and add up the ranks."""
    import torch

    from megalm.parallel.groups import start
    from megalm.plan import make_plan

    folder, rank = _place(config_path, overrides)
    config = load(config_path, overrides)
    groups = start(make_plan(config, int(os.environ["WORLD_SIZE"]), 257))
    total = sum(groups.gather(rank))
    _note(folder, rank, "total", total)
    groups.barrier()
    torch.distributed.destroy_process_group()
    return 0


def raise_on_last(config_path, overrides):
    folder, rank = _place(config_path, overrides)
    _note(folder, rank, "pid", os.getpid())
    if rank == int(os.environ["WORLD_SIZE"]) - 1:
        for number in range(30):
            print("line", number)
        raise RuntimeError("the planted failure")
    time.sleep(1000)


def user_error(config_path, overrides):
    from megalm.data import DataError

    raise DataError("data/wiki.idx: the planted user error")


def wait_for_signal(config_path, overrides):
    """Training's manners: the first signal is noted, the "checkpoint" written a little later, exit code 0."""
    folder, rank = _place(config_path, overrides)
    signals = []
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, _: signals.append(number))
    _note(folder, rank, "pid", os.getpid())
    while not signals:
        time.sleep(0.02)
    time.sleep(0.3)
    _note(folder, rank, "saved", signals)
    return 0


def wait_until_the_cluster_insists(config_path, overrides):
    """As a run whose last copy elsewhere takes long."""
    from megalm.parallel.stop import PREEMPTED, StopSignal

    folder, rank = _place(config_path, overrides)
    with StopSignal() as stop:
        _note(folder, rank, "pid", os.getpid())
        while not stop.insisted:
            time.sleep(0.02)
    return PREEMPTED


def never_leave(config_path, overrides):
    """Ignores every polite signal; leaves a grandchild in a session of its own."""
    folder, rank = _place(config_path, overrides)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    child = os.fork()
    if child == 0:
        os.setsid()
        time.sleep(1000)
        os._exit(0)
    _note(folder, rank, "child", child)
    _note(folder, rank, "pid", os.getpid())
    time.sleep(1000)


def wait_unprepared(config_path, overrides):
    """Hasn't installed any handler yet."""
    folder, rank = _place(config_path, overrides)
    _note(folder, rank, "pid", os.getpid())
    time.sleep(1000)


def one_leaves(config_path, overrides):
    """Rank 1 ends well; the others would go on for ever."""
    folder, rank = _place(config_path, overrides)
    _note(folder, rank, "pid", os.getpid())
    if rank != 1:
        time.sleep(1000)
    return 0

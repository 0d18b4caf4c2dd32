"""The rank runner itself: results, speed, and every way a rank can fail: the test ends within seconds and leaves nothing."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from tests import dist


def add_ranks(rank, world_size, base):
    total = torch.tensor([float(rank + base)])
    torch.distributed.all_reduce(total)
    return rank, total, os.getpid()


def raise_on_one(rank, world_size):
    if rank == 1:
        print("some output of rank 1")
        raise ValueError("the planted error")
    torch.distributed.barrier()


def killed_on_one(rank, world_size):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    torch.distributed.barrier()


def hang_on_one(rank, world_size, folder):
    Path(folder, str(os.getpid())).touch()
    if rank == 1:
        hang_here()
    torch.distributed.barrier()


def hang_here():
    time.sleep(1000)


def leave_a_child(rank, world_size):
    pid = os.fork()
    if pid == 0:
        os.setsid()
        time.sleep(1000)
    return pid


def count_threads(rank, world_size):
    return len(os.listdir("/proc/self/task")), torch.get_num_threads()


def exists(pid):
    return Path(f"/proc/{pid}").exists()


def test_ranks_talk_and_answer_in_order():
    torch.ones(1 << 16).sum()  # torch at work in this process must not matter to the forks
    results = dist.run(add_ranks, 4, 10)
    assert [rank for rank, _, _ in results] == [0, 1, 2, 3]
    assert all(total.item() == 46.0 for _, total, _ in results)
    assert len({pid for _, _, pid in results}) == 4
    assert not any(exists(pid) for _, _, pid in results)


def test_a_trivial_job_is_quick():
    dist.run(add_ranks, 2, 0)
    seconds = []
    for _ in range(5):
        start = time.monotonic()
        dist.run(add_ranks, 2, 0)
        seconds.append(time.monotonic() - start)
    assert min(seconds) < 3, seconds  # 0.1 on an idle machine; importing anew takes 5 there


def test_threads():
    assert dist.run(count_threads, 1, threads=3)[0][1] == 3
    assert dist.run(count_threads, 1)[0][1] == 1


def test_a_rank_that_raises_shows_its_traceback():
    start = time.monotonic()
    with pytest.raises(dist.RankFailed) as failure:
        dist.run(raise_on_one, 2)
    assert time.monotonic() - start < 10
    text = str(failure.value)
    assert text.index("rank 1: error") < text.index("in raise_on_one") < text.index("ValueError: the planted error")
    assert "some output of rank 1" in text


def test_a_rank_that_is_killed_is_named():
    start = time.monotonic()
    with pytest.raises(dist.RankFailed, match=r"rank 1: died: signal 9 \(SIGKILL\)"):
        dist.run(killed_on_one, 4)
    assert time.monotonic() - start < 10


def test_a_rank_that_hangs_is_ended_with_its_stack(tmp_path):
    start = time.monotonic()
    with pytest.raises(dist.RankFailed, match="rank 1 did not finish within 2 s") as failure:
        dist.run(hang_on_one, 2, str(tmp_path), timeout=2)
    assert time.monotonic() - start < 12
    assert "hang_here" in str(failure.value)
    pids = [int(entry.name) for entry in tmp_path.iterdir()]
    assert len(pids) == 2 and not any(exists(pid) for pid in pids)


def test_what_a_rank_left_running_is_ended():
    assert not any(exists(pid) for pid in dist.run(leave_a_child, 2))


def test_it_works_again_after_failures():
    assert len(dist.run(add_ranks, 2, 0)) == 2


def test_the_server_has_one_thread():
    assert len(os.listdir(f"/proc/{dist._server().process.pid}/task")) == 1

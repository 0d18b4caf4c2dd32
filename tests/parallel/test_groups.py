"""Groups of a 2 x 2 x 2 grid, and the questions asked of all ranks."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from megalm.parallel.groups import TensorParallel, start
from megalm.parallel.handshake import shake_hands
from megalm.parallel.stop import StopSignal
from megalm.parallel.world import LaunchError, World
from megalm.plan.topology import Topology
from tests import dist as ranks


def _plan(tp: int, pp: int, dp: int) -> SimpleNamespace:
    """As much of a plan as the groups need."""
    grid = Topology(pp=pp, dp=dp, tp=tp)
    return SimpleNamespace(tp=tp, pp=pp, dp=dp, world_size=tp * pp * dp, sequence_parallel=True, place=grid.place,
                           tp_groups=grid.tp_groups, dp_groups=grid.dp_groups)


def run_grid(rank: int, world: int, folder) -> dict:
    groups = start(_plan(2, 2, 2))
    value = torch.tensor([2.0 ** rank])
    own = torch.distributed.get_process_group_ranks(groups.tp.group)
    work = []
    groups.once_per_filesystem(lambda: work.append(rank), folder)
    with pytest.raises(LaunchError, match="no space"):
        groups.once_per_filesystem(lambda: (_ for _ in ()).throw(OSError("no space")), folder)
    return {"tp": own, "dp_sum": groups.sum_over_dp(value).item(), "any": groups.any(rank == 5), "none": groups.any(False),
            "problems": groups.agree(f"disk of {rank}" if rank in (1, 6) else None), "did": work,
            "agreed": groups.agreed(lambda: f"by {rank}"),
            "first": groups.from_first(lambda: f"by {rank}"), "left": list(folder.iterdir())}


def test_grid_and_agreement(tmp_path):
    found = ranks.run(run_grid, 8, tmp_path / "shared")
    assert [one["tp"] for one in found] == [[0, 1], [0, 1], [2, 3], [2, 3], [4, 5], [4, 5], [6, 7], [6, 7]]
    pairs = ((0, 2), (1, 3), (0, 2), (1, 3), (4, 6), (5, 7), (4, 6), (5, 7))
    assert [one["dp_sum"] for one in found] == [2.0 ** a + 2.0 ** b for a, b in pairs]
    assert all(one["any"] and not one["none"] for one in found)
    assert all(one["problems"] == [(1, "disk of 1"), (6, "disk of 6")] for one in found)
    assert [one["did"] for one in found] == [[0]] + [[]] * 7
    assert [one["agreed"] for one in found] == [f"by {rank}" for rank in range(8)]
    assert {one["first"] for one in found} == {"by 0"}
    assert list((tmp_path / "shared").iterdir()) == []


def run_long_work(rank: int, world: int) -> str:
    control = torch.distributed.new_group(timeout=timedelta(seconds=1))
    groups = World(rank, world, torch.device("cpu"), control)

    def work() -> str:
        time.sleep(2.5)
        return f"by {rank}"

    with mock.patch("megalm.parallel.world.MEETING_SECONDS", 0.2):
        with pytest.raises(ValueError, match="nothing there"):
            groups.from_first(lambda: (_ for _ in ()).throw(ValueError("nothing there")))
        return groups.from_first(work)


def test_rank_0_may_work_for_longer_than_a_collective_waits():
    assert ranks.run(run_long_work, 2) == ["by 0"] * 2


def run_unshared(rank: int, world: int, folder) -> str:
    groups = start(_plan(2, 1, 1))
    groups.require_shared(folder, "train.dir")
    try:
        groups.require_shared(folder / str(rank), "train.dir")
    except LaunchError as error:
        return str(error)
    return "shared"


def test_a_folder_that_is_not_shared_is_named(tmp_path):
    for said in ranks.run(run_unshared, 2, tmp_path):
        assert "train.dir" in said and "must be on a file system that all ranks share" in said


def run_bad_agreement(rank: int, world: int) -> str:
    groups = start(_plan(2, 1, 1))

    def work() -> int:
        if rank == 1:
            raise ValueError("no such file here")
        return 3

    try:
        groups.agreed(work)
    except ValueError as error:
        return str(error)
    return "passed"


def test_a_problem_of_one_rank_is_everybodys():
    assert ranks.run(run_bad_agreement, 2) == ["rank 1: no such file here", "no such file here"]


def run_wrong_world(rank: int, world: int) -> str:
    with pytest.raises(LaunchError) as caught:
        start(_plan(2, 2, 1))
    return str(caught.value)


def test_wrong_world_size_says_both_numbers():
    assert ranks.run(run_wrong_world, 2)[0] == "the launcher started 2 ranks but the plan needs 4 (tp 2 x pp 2 x dp 1)"


def run_handshake(rank: int, world: int, odd: int) -> str:
    groups = start(_plan(2, 1, 1))
    try:
        shake_hands(groups, {"optimizer.lr": 0.1 + (rank == odd), "train.seed": 3})
    except LaunchError as error:
        return str(error)
    return "agreed"


def test_handshake_names_the_difference():
    assert ranks.run(run_handshake, 2, -1) == ["agreed", "agreed"]
    message = "the ranks were not started alike: config optimizer.lr: 0.1 on rank 0, 1.1 on rank 1"
    assert ranks.run(run_handshake, 2, 1) == [message, message]


def run_leave(rank: int, world: int, folder: Path) -> tuple[bool, bool]:
    """(is the process group gone after `leave`, had every rank come when this one left) where `connect` started it."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                      MEGALM_STORE=str(folder / "store"))
    groups = start(_plan(2, 1, 1))
    time.sleep(0.5 * rank)
    (folder / str(rank)).touch()
    groups.leave()
    return not torch.distributed.is_initialized(), all((folder / str(other)).exists() for other in range(world))


def run_leave_adopted(rank: int, world: int) -> bool:
    start(_plan(2, 1, 1)).leave()
    return torch.distributed.is_initialized()


def test_ranks_leave_together_and_take_down_what_they_started(tmp_path):
    assert ranks.run(run_leave, 2, tmp_path, group=False) == [(True, True)] * 2
    assert ranks.run(run_leave_adopted, 2) == [True, True]


def test_share_is_a_partition():
    shares = [TensorParallel(rank, 4).share(12) for rank in range(4)]
    assert shares == [(0, 3), (3, 6), (6, 9), (9, 12)]
    with pytest.raises(AssertionError):
        TensorParallel(0, 4).share(10)


def _signalled(*sent: tuple[int, float], ignored: tuple[int, ...] = (), answers: bool = False) -> tuple[int, bool]:
    """(exit status, still running when asked) of a child that gets these signals after these waits.

    It was started to ignore some, and exits with 7 once it is asked to stop if it `answers`, with 8 once the cluster insists.
    """
    child = os.fork()
    if child == 0:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)
        with StopSignal() as stop:
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline:
                time.sleep(0.05)
                if answers and stop.asked:
                    os._exit(7)
                if stop.insisted:
                    os._exit(8)
        os._exit(0)
    time.sleep(0.3)
    for number, wait in sent:
        time.sleep(wait)
        os.kill(child, number)
    time.sleep(0.3)
    pid, status = os.waitpid(child, os.WNOHANG)
    if pid == 0:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return 0, True
    return os.waitstatus_to_exitcode(status), False


def test_one_signal_is_polite_and_a_late_second_sigint_is_final():
    assert _signalled((signal.SIGINT, 0)) == (0, True)
    assert _signalled((signal.SIGINT, 0), (signal.SIGINT, 0.2)) == (0, True)
    assert _signalled((signal.SIGINT, 0), (signal.SIGTERM, 0.2)) == (0, True)
    assert _signalled((signal.SIGINT, 0), (signal.SIGTERM, 2.2)) == (8, False)
    assert _signalled((signal.SIGINT, 0), (signal.SIGINT, 2.2)) == (130, False)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_asks_for_a_stop_unless_it_is_ignored_from_the_start(number):
    assert _signalled((number, 0), answers=True) == (7, False)
    assert _signalled((number, 0), answers=True, ignored=(number,)) == (0, True)

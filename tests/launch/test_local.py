"""The local launcher end to end: what ranks see, where their output goes, and every way a job can end."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from megalm.launch import supervise
from tests.launch.launcher import exists, two_ranks, wait_until, warm


def test_ranks_see_their_place_and_log(launcher):
    assert launcher.run("report", "train.seed=7") == 0, launcher.stderr
    seen = launcher.notes("seen")
    assert sorted(seen) == [0, 1, 2, 3]
    for rank, facts in seen.items():
        assert facts["overrides"] == ["train.seed=7"]
        assert (facts["RANK"], facts["LOCAL_RANK"], facts["WORLD_SIZE"]) == (str(rank), str(rank), "4")
        assert int(facts["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // 4)
        for line in (f"hello from rank {rank}", f"and a warning of rank {rank}", f"a child of rank {rank}"):
            assert line in launcher.log(rank).splitlines()
        assert not Path(facts["MEGALM_STORE"]).exists()
    console = launcher.stdout
    assert "hello from rank 0" in console and "a child of rank 0" in console
    assert "rank 1" not in console + launcher.stderr
    assert not any(exists(facts["pid"]) for facts in seen.values())


@warm
def test_ranks_meet(launcher):
    assert launcher.run("meet") == 0, launcher.stderr + launcher.log(0)
    assert launcher.notes("total") == {0: 6, 1: 6, 2: 6, 3: 6}


@warm
def test_a_bad_config_is_lines_and_exit_code_2(launcher):
    assert launcher.run("report", "parallel.tpp=2", "batch.micro=x") == 2
    assert [line.partition(":")[0] for line in launcher.stderr.splitlines()] == ["error"] * 2  # as every program says it
    assert "error: parallel.tpp" in launcher.stderr and "error: batch.micro" in launcher.stderr
    assert not (launcher.folder / "run").exists()


@warm
def test_a_batch_that_does_not_fit_is_a_line_and_exit_code_2(launcher):
    assert launcher.run("report", "batch.global=5", "batch.micro=2") == 2
    assert "Traceback" not in launcher.stderr and "5" in launcher.stderr


@warm
def test_a_rank_that_raises_ends_the_job(launcher):
    assert launcher.run("raise_on_last") == 1
    assert "rank 3 (pp 1, dp 0, tp 1) failed: exit code 1" in launcher.stderr
    assert "RuntimeError: the planted failure" in launcher.stderr
    assert len(launcher.notes("pid")) == 4 and not launcher.left()


@warm
def test_a_rank_that_is_killed_ends_the_job(launcher):
    launcher.settings = {}
    process = launcher.start_all("never_leave")
    os.kill(launcher.notes("pid")[2], signal.SIGKILL)
    assert launcher.wait(process, 30) == 128 + 9
    assert "rank 2 (pp 1, dp 0, tp 0) failed: signal 9 (SIGKILL)" in launcher.stderr
    assert not launcher.left()


@warm
def test_ranks_die_with_a_killed_launcher(launcher):
    process = launcher.start_all("wait_for_signal")
    os.kill(process, signal.SIGKILL)
    wait_until(lambda: not launcher.left(), 10)
    assert not launcher.notes("saved")
    assert launcher.wait(process) == -9


@warm
def test_sigint_to_the_launcher_alone_reaches_the_ranks_once(launcher):
    process = launcher.start_all("wait_for_signal")
    os.kill(process, signal.SIGINT)
    assert launcher.wait(process, 30) == 0
    assert launcher.notes("saved") == {rank: [signal.SIGTERM] for rank in range(4)}


@warm
def test_sigterm_to_the_launcher_alone_reaches_the_ranks_once(launcher):
    process = launcher.start_all("wait_for_signal")
    os.kill(process, signal.SIGTERM)
    os.kill(process, signal.SIGTERM)
    assert launcher.wait(process, 30) == 0
    assert launcher.notes("saved") == {rank: [signal.SIGTERM] for rank in range(4)}


@warm
def test_a_signal_that_is_ignored_from_the_start_stays_ignored(launcher):
    """nohup, or a script's background job: neither the launcher nor the ranks take it up."""
    launcher.ignored = (signal.SIGHUP, signal.SIGINT)
    process = launcher.start_all("wait_for_signal")
    for number in launcher.ignored:
        os.killpg(process, number)
    time.sleep(1)
    assert exists(process) and not launcher.notes("saved")
    os.kill(process, signal.SIGTERM)
    assert launcher.wait(process, 30) == 0
    assert launcher.notes("saved") == {rank: [signal.SIGTERM] for rank in range(4)}


@warm
def test_ctrl_c_reaches_the_whole_group(launcher):
    process = launcher.start_all("wait_for_signal")
    os.killpg(process, signal.SIGINT)
    assert launcher.wait(process, 30) == 0
    assert {rank: signals[0] for rank, signals in launcher.notes("saved").items()} == dict.fromkeys(range(4), signal.SIGINT)


@warm
def test_a_second_ctrl_c_ends_at_once(launcher):
    process = launcher.start_all("never_leave")
    os.kill(process, signal.SIGINT)
    time.sleep(0.3)
    os.kill(process, signal.SIGINT)  # too early: the same impatient finger
    time.sleep(1.8)
    assert exists(process)
    os.kill(process, signal.SIGINT)
    assert launcher.wait(process, 20) == 130
    assert not launcher.left()


@warm
def test_a_cluster_s_signal_after_a_ctrl_c_reaches_the_ranks(launcher):
    process = launcher.start_all("wait_until_the_cluster_insists")
    os.kill(process, signal.SIGINT)
    time.sleep(2.2)
    assert exists(process)
    os.kill(process, signal.SIGTERM)
    assert launcher.wait(process, 20) == 0 and "failed" not in launcher.stderr


@warm
def test_a_polite_stop_that_hangs_has_an_end(launcher):
    launcher.settings = {(supervise, "STOP_SECONDS"): 1.0}
    process = launcher.start_all("never_leave")
    os.kill(process, signal.SIGTERM)
    assert launcher.wait(process, 20) == 128 + 9
    assert "rank 3 (pp 1, dp 0, tp 1) still ran 1 s after they were asked to save and leave: killed" in launcher.stderr
    assert "rank 0 (pp 0, dp 0, tp 0) failed: signal 9 (SIGKILL)" in launcher.stderr and not launcher.left()


@warm
def test_ranks_that_stay_behind_have_an_end(launcher):
    launcher.settings = {(supervise, "LEAVE_SECONDS"): 1.0}
    assert launcher.wait(launcher.start_all("one_leaves"), 20) == 128 + 9
    said = "rank 0 (pp 0, dp 0, tp 0), rank 2 (pp 1, dp 0, tp 0), rank 3 (pp 1, dp 0, tp 1) still ran 1 s after rank 1 (pp 0"
    assert said in launcher.stderr and not launcher.left()


@warm
def test_a_rank_that_cannot_be_killed_is_left_behind(launcher):
    """As one that waits for a device in the kernel; here the launcher's SIGKILL does nothing."""
    launcher.settings = {(supervise.process, "KILL_SECONDS"): 0.5, (os, "kill"): lambda *_: None, **launcher.settings}
    process = launcher.start_all("never_leave")
    ranks = launcher.notes("pid")
    os.kill(ranks[2], signal.SIGKILL)
    assert launcher.wait(process, 20) == 128 + 9
    assert "rank 2 (pp 1, dp 0, tp 0) failed: signal 9 (SIGKILL)" in launcher.stderr
    line = next(line for line in launcher.stderr.splitlines() if "left behind" in line)
    assert all(str(ranks[rank]) in line for rank in (0, 1, 3)) and str(ranks[2]) not in line


@warm
def test_ctrl_c_before_training_took_the_signals(launcher):
    process = launcher.start_all("wait_unprepared")
    os.killpg(process, signal.SIGINT)
    assert launcher.wait(process, 30) == 130
    assert "Traceback" not in launcher.stderr + launcher.stdout + launcher.log(1)
    assert "nothing was saved" in launcher.stderr, (launcher.stderr, launcher.log(0))


@warm
def test_a_user_error_in_a_rank_is_one_line(launcher):
    assert launcher.run("user_error") == 2
    console = launcher.stdout + launcher.stderr
    assert console.count("the planted user error") == 1 and "Traceback" not in console


@warm
def test_a_closed_console_does_not_end_the_job(launcher):
    launcher.closed_console = True
    code = launcher.run("report")
    assert code == 0, (code, launcher.stderr)
    assert "hello from rank 0" in launcher.log(0) and "a child of rank 0" in launcher.log(0)
    assert sorted(launcher.notes("seen")) == [0, 1, 2, 3]


def test_fresh_processes_where_there_are_gpus(launcher):
    """With devices visible every rank is a process of its own, the launcher imports no torch, and the ranks die with it."""
    program = (
        "import sys; from megalm.launch import local; local.visible_gpus = lambda: 4;"
        f"code = local.start({str(launcher.config)!r}, [], 'tests.launch.jobs:wait_for_signal');"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules; sys.exit(code)"
    )
    process = launcher.start_all("", command=[sys.executable, "-c", program])
    os.kill(process, signal.SIGTERM)
    assert launcher.wait(process, 30) == 0, launcher.stderr
    assert launcher.notes("saved") == {rank: [signal.SIGTERM] for rank in range(4)}
    for path in (launcher.folder / "run").glob("*_*"):
        path.unlink()
    process = launcher.start_all("", command=[sys.executable, "-c", program])
    os.kill(process, signal.SIGKILL)
    wait_until(lambda: not launcher.left(), 10)
    assert launcher.wait(process) == -9


def test_a_rank_that_fails_under_a_launcher_says_so(launcher):
    command = [*two_ranks("torchrun"), "--config", str(launcher.config), "parallel.pp=1"]
    assert launcher.run("raise_on_last", command=command) != 0
    assert "megalm: rank 1 failed: exit code 1" in launcher.stderr
    assert "RuntimeError: the planted failure" in launcher.stderr

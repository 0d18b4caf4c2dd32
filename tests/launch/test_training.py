"""Real training under the local launcher: a rank that dies, a Ctrl-C, and going on afterwards."""

from __future__ import annotations

import os
import signal
import time

from megalm.launch.process import descendants
from megalm.metrics import read_metrics
from tests import training
from tests.launch.launcher import WarmLauncher, exists, wait_until, warm


def write_config(launcher: WarmLauncher, steps: int) -> None:
    launcher.config = training.write_config(
        launcher.folder,
        parallel={"tp": 2, "pp": 2, "dp": 1},
        train={"dir": str(launcher.folder / "run"), "steps": steps},
    )


def steps_done(launcher: WarmLauncher) -> list[int]:
    return [record["step"] for record in read_metrics(launcher.folder / "run")]


def ranks_of(pid: int) -> list[int]:
    """The four ranks, in order: the launcher's first children that aren't copies of its output."""
    return descendants(pid)[:4]


@warm
def test_a_rank_killed_in_the_middle_of_training(launcher):
    write_config(launcher, steps=100_000)
    pid = launcher.start("")
    wait_until(lambda: len(steps_done(launcher)) >= 3, 60)
    below = descendants(pid)
    os.kill(ranks_of(pid)[1], signal.SIGKILL)
    start = time.monotonic()
    assert launcher.wait(pid) == 128 + 9
    assert time.monotonic() - start < 30
    assert "rank 1 (pp 0, dp 0, tp 1) failed: signal 9 (SIGKILL)" in launcher.stderr
    assert not any(exists(process) for process in below)


@warm
def test_ctrl_c_saves_and_the_same_command_goes_on(launcher):
    write_config(launcher, steps=100_000)
    pid = launcher.start("")
    wait_until(lambda: len(steps_done(launcher)) >= 2, 60)
    os.killpg(pid, signal.SIGINT)
    assert launcher.wait(pid, 60) == 0, launcher.stderr
    done = steps_done(launcher)[-1]
    assert f"stopped after step {done} of 100000" in launcher.stdout
    assert launcher.run("", f"train.stop_at={done + 2}", "logging.every=1") == 0, launcher.stderr
    assert steps_done(launcher) == list(range(1, done + 3))

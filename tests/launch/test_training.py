"""Real training under the local launcher: a rank that dies, a Ctrl-C, a lost terminal, and going on afterwards."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import time
from pathlib import Path

from megalm.checkpoint import find
from megalm.checkpoint.disk import Disk
from megalm.launch.process import descendants
from megalm.metrics import read_metrics
from tests import dist, training
from tests.checkpoint.disks import mounted
from tests.launch.launcher import Launcher, WarmLauncher, exists, two_ranks, wait_until, warm


def write_config(launcher: Launcher, steps: int, **train) -> None:
    launcher.config = training.write_config(
        launcher.folder,
        parallel={"tp": 2, "pp": 2, "dp": 1},
        train={"dir": str(launcher.folder / "run"), "steps": steps, **train},
    )


def steps_done(launcher: Launcher) -> list[int]:
    return [record["step"] for record in read_metrics(launcher.folder / "run") if "loss" in record]


def saved_where_it_stopped(launcher: Launcher) -> bool:
    """The run says after which step it stopped, and the checkpoint is that step's."""
    done = steps_done(launcher)[-1]
    assert f"stopped after step {done} of 100000" in launcher.log(0)
    return find(launcher.folder / "run").name == f"step_{done:08d}"


def ranks_of(pid: int) -> list[int]:
    """The four ranks, in order: the launcher's first children that aren't copies of its output."""
    return descendants(pid)[:4]


@warm
def test_a_rank_killed_in_the_middle_of_training(launcher):
    launcher.settings = {}
    write_config(launcher, steps=100_000)
    pid = launcher.start("")
    wait_until(lambda: len(steps_done(launcher)) >= 3, 120)
    below = descendants(pid)
    os.kill(ranks_of(pid)[1], signal.SIGKILL)
    start = time.monotonic()
    assert launcher.wait(pid) == 128 + 9
    assert time.monotonic() - start < 30
    log = launcher.folder / "run/logs/rank_00001.log"
    tail = "".join(f"  | {line}\n" for line in log.read_text().splitlines()[-20:])
    assert "  | --- 20" in tail
    failed = "rank 1 (pp 0, dp 0, tp 1) failed: signal 9 (SIGKILL); the job has ended. The end of"
    assert f"megalm: {failed} {log}:\n{tail}" in launcher.stderr
    assert not any(exists(process) for process in below)


def test_run_py_trains_under_torchrun(launcher):
    config = training.write_config(launcher.folder, parallel={"pp": 2}, train={"dir": str(launcher.folder / "run"), "steps": 2})
    assert launcher.run("", command=[*two_ranks("torchrun"), "--config", str(config)]) == 0, launcher.stderr
    assert steps_done(launcher) == [1, 2] and find(launcher.folder / "run").name == "step_00000002"
    assert "step 2/2 | loss" in launcher.stdout and "Traceback" not in launcher.stderr + launcher.log(1)


def test_torchrun_hides_the_exit_code_and_train_dir_has_it(launcher):
    folder = launcher.folder / "run"
    config = training.write_config(launcher.folder, parallel={"pp": 2}, train={"dir": str(folder), "steps": 100_000})
    pid = launcher.start("", command=[*two_ranks("torchrun"), "--config", str(config)])
    wait_until(lambda: len(steps_done(launcher)) >= 2, 90)
    assert not (folder / "exit_code").exists()
    os.kill(pid, signal.SIGTERM)
    assert launcher.wait(pid) == 1, launcher.stderr
    assert (folder / "exit_code").read_text() == "75\n" and saved_where_it_stopped(launcher)


def ranks_under_deepspeed(pid: int) -> list[int]:
    commands = {process: Path(f"/proc/{process}/cmdline").read_text().split("\0") for process in descendants(pid)}
    return [process for process, words in commands.items() if words[2:3] == [str(dist.ROOT / "launch/run.py")]]


def losses(launcher: Launcher) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in read_metrics(launcher.folder / "run")}


def test_deepspeed_ends_with_a_rank_and_the_ranks_with_deepspeed(launcher):
    """A rank that is killed takes the run down, and the same command goes on bitwise. `deepspeed` itself is gone at once when it
    is told to stop, and tells nobody, but the ranks notice, save and leave."""
    folder = launcher.folder / "run"
    config = training.write_config(launcher.folder, parallel={"pp": 2}, train={"dir": str(folder), "steps": 100_000})
    command = [*two_ranks("deepspeed"), "--config", str(config), "checkpoint.every=6", "checkpoint.async=false"]
    pid = launcher.start("", command=command)
    wait_until(lambda: len(steps_done(launcher)) >= 1, 180)
    below, ranks = descendants(pid), ranks_under_deepspeed(pid)
    wait_until(lambda: len(steps_done(launcher)) >= 7, 120)
    os.kill(ranks[1], signal.SIGKILL)
    assert launcher.wait(pid, 30) == 256 - 9, launcher.stderr
    assert len(ranks) == 2 and not any(map(exists, below))
    lost = losses(launcher)
    pid = launcher.start("", command=command)
    wait_until(lambda: "going on from step " in launcher.stdout and max(steps_done(launcher)) > max(lost), 180)
    below = descendants(pid)
    os.kill(pid, signal.SIGTERM)
    assert launcher.wait(pid, 5) == -signal.SIGTERM
    wait_until(lambda: not any(map(exists, below)), 30)
    assert (folder / "exit_code").read_text() == "75\n" and saved_where_it_stopped(launcher)
    assert losses(launcher).items() > lost.items()


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def lines_about_the_disk(launcher: WarmLauncher, step: int) -> int:
    """How often the console says that this step's save has failed."""
    console = launcher.stdout + launcher.stderr
    assert "Traceback" not in console and "failed: exit code" not in console, console
    lines = [line for line in console.splitlines() if f"step_{step:08d} wasn't saved: rank " in line]
    assert all("No space left on device [ENOSPC]" in line and "Earlier checkpoints are" in line for line in lines)
    return len(lines)


@warm
def test_a_disk_that_is_full_when_a_checkpoint_is_written(launcher):
    """It is a line and the run goes on; a last one that fails twice is exit code 2, and the checkpoint before it is what the
    same command goes on from. Written by the ranks: a planted error doesn't reach a writer; the next test's full disk does."""
    def write(disk: Disk, path: Path, chunks) -> int:
        if "step_00000004" in str(path) and path.name.endswith(".safetensors"):
            raise FULL
        return Disk.__dict__["intact"](disk, path, chunks)

    write_config(launcher, steps=6)
    launcher.settings = {(Disk, "intact"): Disk.write, (Disk, "write"): write, **launcher.settings}
    assert launcher.run("", "checkpoint.every=2", "checkpoint.async=false", "train.stop_at=4") == 2
    assert lines_about_the_disk(launcher, 4) == 2 and find(launcher.folder / "run").name == "step_00000002"
    assert launcher.run("", "checkpoint.every=2", "checkpoint.async=false") == 0, launcher.stderr
    assert "going on from step 2" in launcher.log(0) and steps_done(launcher) == [1, 2, 3, 4, 5, 6]
    assert lines_about_the_disk(launcher, 4) == 1 and find(launcher.folder / "run").name == "step_00000006"
    assert "Earlier checkpoints are as they were; 1 failed in a row, 3 end the run" in launcher.log(0)


def fill_the_disk(launcher: WarmLauncher, disk: Path) -> None:
    """Training on a disk that somebody else fills once there is a checkpoint: logs and metrics find no room either."""
    (launcher.folder / "run").symlink_to(disk)
    write_config(launcher, steps=100_000)
    pid = launcher.start("", "checkpoint.every=3")
    wait_until(lambda: list(disk.glob("checkpoints/step_*")) != [], 120)
    with contextlib.suppress(OSError), open(disk / "filler", "wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))
    assert launcher.wait(pid) == 2, launcher.stderr
    saved = int(find(disk).name[-8:])
    assert [lines_about_the_disk(launcher, saved + more) for more in (3, 6, 9, 12)] == [1, 1, 1, 0], "three in a row end it"
    (disk / "filler").unlink()
    launcher.start("", f"train.stop_at={saved + 3}")
    assert launcher.wait(launcher.pids[-1]) == 0, launcher.stderr
    assert f"going on from step {saved}" in launcher.stdout


def on_a_small_disk(_rank: int, _world: int, folder: Path, disk: Path) -> None:
    with WarmLauncher(folder, folder / "config.json") as launcher:
        fill_the_disk(launcher, disk)


def test_a_disk_that_becomes_full(tmp_path):
    with mounted(tmp_path / "small", "4m") as disk:
        dist.run(on_a_small_disk, 1, tmp_path, disk, group=False, timeout=300)


@warm
def test_ctrl_c_saves_and_the_same_command_goes_on(launcher):
    write_config(launcher, steps=100_000)
    pid = launcher.start("")
    wait_until(lambda: len(steps_done(launcher)) >= 2, 120)
    os.killpg(pid, signal.SIGINT)
    assert launcher.wait(pid) == 0, launcher.stderr
    done = steps_done(launcher)[-1]
    assert f"stopped after step {done} of 100000" in launcher.stdout
    assert launcher.run("", f"train.stop_at={done + 2}", "logging.every=1") == 0, launcher.stderr
    assert steps_done(launcher) == list(range(1, done + 3))


def pre_empt(launcher: WarmLauncher, number: int, to_a_rank: bool) -> None:
    """Train on from wherever the run is, with a checkpoint on its way more often than not, until this signal."""
    before = max(steps_done(launcher), default=0)
    pid = launcher.start("", "checkpoint.every=2")
    wait_until(lambda: len(steps_done(launcher)) >= before + 3, 120)
    below = descendants(pid)
    os.kill(ranks_of(pid)[2] if to_a_rank else pid, number)
    assert launcher.wait(pid, 30) == 75, launcher.stderr
    assert saved_where_it_stopped(launcher) and "failed" not in launcher.stderr
    assert not any(exists(process) for process in below)


@warm
def test_a_pre_empted_run_saves_within_30_seconds_and_says_so_by_its_exit_code(launcher):
    """Slurm's --signal reaches the launcher, or a rank alone; the same command goes on each time."""
    write_config(launcher, steps=100_000)
    for number, to_a_rank in ((signal.SIGTERM, False), (signal.SIGUSR1, False), (signal.SIGUSR1, True)):
        pre_empt(launcher, number, to_a_rank)
    assert steps_done(launcher) == list(range(1, steps_done(launcher)[-1] + 1))


def lose_the_terminal(launcher: WarmLauncher, pid: int, step: int) -> str:
    """Hang up after that step, as when ssh is lost; returns what was on the terminal."""
    shown = []
    wait_until(lambda: shown.append(launcher.shown()) or len(steps_done(launcher)) >= step, 120)
    os.close(launcher.terminal)
    return "".join(shown)


@warm
def test_a_lost_terminal_saves(launcher):
    """SIGHUP, and neither the launcher's lines nor the progress bar can be written any more."""
    write_config(launcher, steps=100_000, eval_every=1)
    pid = launcher.start_on_terminal("")
    assert "tokens/s" in lose_the_terminal(launcher, pid, step=3)
    below = descendants(pid)
    assert launcher.wait(pid) == 0, launcher.log(0)
    assert saved_where_it_stopped(launcher)
    assert not any(exists(process) for process in below)


@warm
def test_a_lost_terminal_does_not_end_a_run_under_nohup(launcher):
    write_config(launcher, steps=40, eval_every=5)
    launcher.ignored = (signal.SIGHUP,)
    pid = launcher.start_on_terminal("")
    lose_the_terminal(launcher, pid, step=3)
    assert launcher.wait(pid) == 0, launcher.log(0)
    assert steps_done(launcher) == list(range(1, 41)) and "stopped" not in launcher.log(0)
    assert "step 40 | validation loss" in launcher.log(0)


def test_ctrl_c_saves_though_it_ends_the_reader_of_a_pipe(launcher):
    """`megalm train c.json 2>&1 | tee log`: the terminal sends the signal to all three of the shell, the launcher and tee."""
    write_config(launcher, steps=100_000)
    pipeline = f"{sys.executable} -m megalm.cli train {launcher.config} 2>&1 | tee {launcher.folder / 'copy'}"
    pid = launcher.start("", command=["bash", "-c", pipeline])
    wait_until(lambda: len(steps_done(launcher)) >= 2, 90)
    below = descendants(pid)
    os.killpg(pid, signal.SIGINT)
    launcher.wait(pid)
    assert saved_where_it_stopped(launcher)
    assert "step " in Path(launcher.folder, "copy").read_text()
    assert not any(exists(process) for process in below)


@warm
def test_a_second_job_in_the_same_folder_is_refused(launcher):
    """And changes nothing of the first; a killed job leaves the folder free at once."""
    write_config(launcher, steps=100_000)
    pid = launcher.start("", "checkpoint.every=2")
    wait_until(lambda: len(steps_done(launcher)) >= 3, 120)
    with WarmLauncher(launcher.folder / "second", launcher.config) as second:
        second.folder.mkdir()
        assert second.run("") == 2
        console = second.stdout + second.stderr
        assert console.count("is in use by another job") == 1 and "Traceback" not in console
    done = steps_done(launcher)[-1]
    wait_until(lambda: steps_done(launcher)[-1] > done)
    below = descendants(pid)
    os.kill(pid, signal.SIGKILL)
    assert launcher.wait(pid) == -9
    wait_until(lambda: not any(exists(process) for process in below), 10)
    saved = int(find(launcher.folder / "run").name[-8:])
    assert launcher.run("", f"train.stop_at={saved + 1}") == 0, launcher.stderr
    assert steps_done(launcher) == list(range(1, saved + 2))

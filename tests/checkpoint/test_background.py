"""Saving beside the training: what is written is the state at the save, and a writer's trouble reaches all ranks."""
from __future__ import annotations

import mmap
import os
import resource
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megalm.checkpoint import CheckpointError, Saver, find, memory
from megalm.checkpoint.jobs import Answer
from megalm.checkpoint.snapshot import Snapshot
from megalm.checkpoint.uploads import BUSY
from tests.checkpoint.disks import mounted
from tests.checkpoint.fakes import SMALL, Crew, draw, engines, plan, settings
from tests.checkpoint.test_layouts import load_all, succeed, wrong

SECONDS = 20


def until_done(saver: Saver, groups) -> int:
    """What the training does after each step, until the checkpoint is whole; the steps it took."""
    for step in range(SECONDS * 100):
        groups.agree(None)
        [highest] = groups.highest(saver.state)
        saver.progress(highest)
        if highest != BUSY and saver._phase is None:
            return step
        time.sleep(0.01)
    raise AssertionError("never done")


def background(folder: Path, ranks, groups, **rules) -> Saver:
    saver = Saver(folder, ranks[groups.rank], groups, settings(**rules), plan())
    saver.write_in_background(torch.device("cpu"))
    return saver


def test_the_state_may_change_as_soon_as_save_returns(tmp_path):
    values = draw(SMALL)
    ranks = engines(SMALL, values, tp=2, dp=2)

    def job(groups):
        with background(tmp_path, ranks, groups) as saver:
            saver.save(3, 24, 1.5)
            for fragment in ranks[groups.rank].held:
                fragment.tensor.zero_()
            assert saver.saved is None
            until_done(saver, groups)
            assert saver.saved == 3

    succeed(Crew(4).run(job))
    targets = engines(SMALL, None, tp=3)
    succeed(load_all(tmp_path, targets))
    assert wrong(targets, values) == []


def test_a_rank_that_owns_nothing_saves_too(tmp_path):
    """As a second replica without ZeRO, or a rank of a small stage with it."""
    ranks = engines(SMALL, draw(SMALL), dp=2, sharded=False)
    assert not any(fragment.owned for fragment in ranks[1].held)

    def job(groups):
        with background(tmp_path, ranks, groups) as saver:
            for step in (3, 4):
                saver.save(step, 24, 1.5)
                until_done(saver, groups)
            assert saver.saved == 4

    succeed(Crew(2).run(job))


def test_one_is_on_its_way_at_most_and_the_wait_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[Saver.__module__], "TOLD_SECONDS", 0.0)
    ranks, lines = engines(SMALL, draw(SMALL)), []

    def job(groups):
        with Saver(tmp_path, ranks[0], groups, settings(), plan(), report=lines.append) as saver:
            saver.write_in_background(torch.device("cpu"))
            for step in (1, 2, 3):
                saver.save(step, 8 * step)
            saver.finish()

    succeed(Crew(1).run(job))
    assert [line.split(" for ")[1] for line in lines] == [f"the checkpoint of step {step} to be on the disk" for step in (1, 2)]
    assert find(tmp_path).name == "step_00000003"


def test_a_killed_writer_is_seen_by_all_ranks(tmp_path):
    ranks = engines(SMALL, draw(SMALL), tp=2)

    def job(groups):
        with background(tmp_path, ranks, groups) as saver:
            saver.save(1, 8)
            saver.finish()
            if groups.rank == 1:
                os.kill(saver.writer_pid, signal.SIGKILL)
            saver.save(2, 16)
            until_done(saver, groups)

    for result in Crew(2).run(job):
        assert isinstance(result, CheckpointError)
        assert "step_00000002 wasn't saved: rank 1 failed writing: the process that writes its checkpoints has ended: signal 9" \
            in str(result)
    assert find(tmp_path).name == "step_00000001" and not list((tmp_path / "checkpoints").glob(".*"))


def test_after_failures_the_run_goes_on_with_another_writer_until_they_are_too_many_in_a_row(tmp_path):
    ranks, lines = engines(SMALL, draw(SMALL), tp=2), []

    def job(groups):
        with background(tmp_path, ranks, groups, max_failures=2) as saver:
            saver._report = lines.append if groups.rank == 0 else lambda line: None
            for step in range(1, 9):
                if groups.rank == 1 and step in (1, 3, 5, 6):
                    os.kill(saver.writer_pid, signal.SIGKILL)
                saver.save(step, 8 * step)
                until_done(saver, groups)
                assert saver.saved == (step if step in (2, 4) else step - 1 or None)

    assert all(isinstance(result, CheckpointError) and "step_00000006 wasn't saved" in str(result) for result in Crew(2).run(job))
    assert [line.split(" ")[0][-1] for line in lines] == ["1", "3", "5"]
    end = "signal 9 (SIGKILL). Earlier checkpoints are as they were; 1 failed in a row, 2 end the run"
    assert all(line.endswith(end) for line in lines)
    assert find(tmp_path).name == "step_00000004" and not list((tmp_path / "checkpoints").glob(".*"))


def test_a_writer_that_memory_was_short_for_gets_no_successor_and_the_rank_writes_itself(tmp_path, monkeypatch):
    """What the kernel kills for its memory would be killed again. The wait for it isn't called one that came to a good end."""
    ranks, lines, free = engines(SMALL, draw(SMALL), tp=2), [], [1 << 40]
    monkeypatch.setattr(memory, "available_bytes", lambda: free[0])
    monkeypatch.setattr(sys.modules[Saver.__module__], "TOLD_SECONDS", 0.0)

    def job(groups):
        with background(tmp_path, ranks, groups, max_failures=9) as saver:
            saver._report = lines.append if groups.rank == 0 else lambda line: None
            size = saver._writer.size
            if groups.rank == 1:
                os.kill(saver.writer_pid, signal.SIGKILL)
                free[0] = 2 * size - 1
            saver.save(1, 8)
            saver.save(2, 16)
            assert (saver.writer_pid is None) == (groups.rank == 1)
            saver.finish()
            assert saver.saved == 2
            return size

    size = succeed(Crew(2).run(job))[1]
    assert lines[0] == ("checkpoints are written while the training waits: copies of rank 1 on one machine need "
                        f"{size:,} bytes, {2 * size - 1:,} are free")
    assert "step_00000001 wasn't saved" in lines[1] and lines[2].endswith(" s for the checkpoint of step 1, which failed")
    assert len(lines) == 3 and find(tmp_path).name == "step_00000002"


def test_a_writer_killed_after_the_checkpoint_has_its_name_has_saved_it(tmp_path):
    """Before it could say so: what counts is what is there."""
    ranks = engines(SMALL, draw(SMALL))

    def job(groups):
        with background(tmp_path, ranks, groups) as saver:
            for step in (1, 2):
                saver.save(step, 8 * step)
                saver.finish()
                saver._phase, saver._answer, saver._before = "whole", Answer("writing: the process has ended"), None
                (saver.root / "latest").rename(saver.root / ".tmp_latest")
                with pytest.raises(CheckpointError, match=f"step_0000000{step} is saved and whole, but rank 0 failed writing"):
                    saver.finish()
                assert saver.saved == step

    succeed(Crew(1).run(job))
    assert find(tmp_path).name == "step_00000002" and (tmp_path / "checkpoints/latest").exists()


def test_a_full_disk_is_a_line_and_the_checkpoint_before_stays(tmp_path):
    parts = {"up": ((64, 96), 0)}
    ranks = engines(parts, draw(parts), tp=2)

    def job(groups):
        with background(folder, ranks, groups, keep=9) as saver:
            for step in range(1, 9):
                saver.save(step, 8 * step)
                until_done(saver, groups)

    with mounted(tmp_path / "small", "256k") as folder:
        for result in Crew(2).run(job):
            assert isinstance(result, CheckpointError) and "[ENOSPC]" in str(result) and "bytes needed" in str(result), result
        found = find(folder)
        targets = engines(parts, None)
        succeed(load_all(found, targets))
        assert wrong(targets, draw(parts)) == [] and not list(found.parent.glob(".*"))


def test_a_signal_to_the_process_group_doesn_t_reach_the_writer_and_its_parent_s_end_does(tmp_path):
    """In a child of its own, which is killed: the writer goes with it, in the middle of whatever it does."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(2 * SECONDS)
        try:
            saver = background(tmp_path, engines(SMALL, draw(SMALL)), Crew(1).member(0))
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
                os.kill(saver.writer_pid, number)
            saver.save(1, 8)
            saver.finish()
            os.write(writing, str(saver.writer_pid).encode())
            time.sleep(SECONDS)
        finally:
            os._exit(1)
    os.close(writing)
    said = os.read(reading, 100)
    os.close(reading)
    assert said, "the child has failed"
    pid = int(said)
    assert find(tmp_path).name == "step_00000001"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    deadline = time.monotonic() + SECONDS
    while Path(f"/proc/{pid}/cmdline").exists() and time.monotonic() < deadline and _runs(pid):
        time.sleep(0.02)
    assert not _runs(pid)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_writer_imports_no_torch(tmp_path):
    def job(groups):
        with background(tmp_path, engines(SMALL, draw(SMALL)), groups) as saver:
            saver.save(1, 8)
            saver.finish()
            return Path(f"/proc/{saver.writer_pid}/maps").read_text()

    maps = succeed(Crew(1).run(job))[0]
    assert "xxhash" in maps and "torch" not in maps and "numpy" not in maps


def test_a_rank_with_thousands_of_open_files(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    null = os.open(os.devnull, os.O_RDONLY)
    held = [os.dup(null) for _ in range(1100)]

    def job(groups):
        with background(tmp_path, engines(SMALL, draw(SMALL)), groups) as saver:
            saver.save(1, 8)
            saver.finish()

    try:
        succeed(Crew(1).run(job))
    finally:
        for handle in (null, *held):
            os.close(handle)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert find(tmp_path).name == "step_00000001"


@pytest.mark.parametrize("status", [0, 1])
def test_memory_that_can_t_be_pinned_leaves_no_error_behind(status, monkeypatch):
    """CUDA keeps its last error for the next who launches a kernel."""
    last, calls = [], []

    def register(address, size, flags):
        calls.append("register")
        last.extend([status] if status else [])
        return status

    def launch(*shape, device):
        if last:
            raise RuntimeError(f"CUDA error {last.pop()}")

    runtime = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=lambda address: calls.append("unregister"))
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch, "ones", launch)
    with mmap.mmap(-1, 4096) as memory:
        snapshot = Snapshot(memory, torch.device("cuda"))
        snapshot.close()
        del snapshot
    assert last == [] and calls == (["register"] if status else ["register", "unregister"])


@pytest.mark.parametrize("rules, kept", [
    ({"keep": 1}, [6]), ({"keep": 2}, [5, 6]), ({"keep": 1, "keep_every": 2}, [2, 4, 6]),
    ({"keep": 1, "keep_best": 2}, [3, 5, 6]),
    ({"keep": 1, "keep_every": 4, "keep_best": 1}, [3, 4, 6])], ids=str)
def test_retention(rules, kept, tmp_path):
    ranks, losses = engines(SMALL, draw(SMALL)), {1: 3.0, 2: None, 3: 1.0, 4: 2.5, 5: 2.0, 6: 4.0}

    def job(groups):
        with Saver(tmp_path, ranks[0], groups, settings(**rules), plan()) as saver:
            for step, loss in losses.items():
                saver.save(step, 8 * step, loss)
                saver.finish()

    succeed(Crew(1).run(job))
    assert sorted(int(path.name[5:]) for path in (tmp_path / "checkpoints").glob("step_*")) == kept

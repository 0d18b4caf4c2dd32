"""Full disks, refused writes and sudden deaths: the previous checkpoint survives all of them."""
from __future__ import annotations

import errno
import os
import stat
import subprocess

import pytest

from megalm.checkpoint import CheckpointError, find, newest
from megalm.checkpoint.disk import Disk
from tests.checkpoint.disks import Dying, Failing, Killed, Remembering, mounted, tree
from tests.checkpoint.fakes import Hasty, draw, engines, save_all
from tests.checkpoint.test_layouts import load_all, succeed, wrong

PARTS = {"up": ((8, 6), 0), "down": ((6, 8), 1), "norm": ((6,), None)}
OLD, NEW = draw(PARTS, seed=1), draw(PARTS, seed=2)


def ranks(values, tp=2):
    return engines(PARTS, values, tp=tp)


@pytest.mark.parametrize("code, rank, name, number", [
    *((code, 1, "write", 1) for code in (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS, errno.EACCES)),
    *((errno.ENOSPC, 0, "write", number) for number in range(6)),
    (errno.EROFS, 0, "make_folder", 0), (errno.EIO, 1, "write", 0), (errno.EIO, 0, "sync_folder", 0),
    (errno.EIO, 0, "rename", 0)])
def test_a_failing_disk_is_one_clear_error_on_every_rank(code, rank, name, number, tmp_path):
    succeed(save_all(tmp_path, 10, ranks(OLD)))
    before = tree(tmp_path)
    disks = [Hasty(), Hasty()]
    disks[rank] = Failing(code, name, number)
    results = save_all(tmp_path, 20, ranks(NEW), disks)
    for result in results:
        assert isinstance(result, CheckpointError), result
        line = str(result)
        assert f"step_00000020 wasn't saved: rank {rank} failed" in line and "\n" not in line
        assert f"[{errno.errorcode[code]}]" in line and os.strerror(code) in line and " bytes free" in line
        assert " bytes needed, " in line or name == "make_folder"
    assert str(results[0]) == str(results[1])
    # On a disk that fails for good, the rubbish may outlast the attempt; the checkpoints may not change.
    assert {path: content for path, content in tree(tmp_path).items() if "/." not in path} == before
    assert find(tmp_path).name == "step_00000010"
    succeed(save_all(tmp_path, 20, ranks(NEW)))
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["latest", "step_00000010", "step_00000020"]


@pytest.mark.parametrize("name, number", [("sync_folder", 3), ("rename", 1), ("sync_folder", 4)])
@pytest.mark.parametrize("step", [20, 10])
def test_a_checkpoint_that_only_latest_misses_is_called_whole(name, number, step, tmp_path):
    """The disk fails after the folder has its name: the error says that the checkpoint is there, and it is."""
    succeed(save_all(tmp_path, 10, ranks(OLD)))
    number += step == 10 and name == "rename"  # the old folder steps aside first
    results = save_all(tmp_path, step, ranks(NEW), [Failing(errno.EIO, name, number), Hasty()])
    for result in results:
        assert isinstance(result, CheckpointError) and "wasn't saved" not in str(result)
        assert f"step_000000{step} is saved and whole, but rank 0 failed pointing latest to it: Input/output error" in str(result)
    target = ranks(None)
    succeed(load_all(tmp_path / f"checkpoints/step_000000{step}", target))
    assert wrong(target, NEW) == []
    assert find(tmp_path).name == f"step_000000{step}", "what latest was about to say is there"
    if step == 20:
        target = ranks(None)
        succeed(load_all(tmp_path / "checkpoints/step_00000010", target))
        assert wrong(target, OLD) == []
    succeed(save_all(tmp_path, 30, ranks(NEW)))
    assert find(tmp_path).name == "step_00000030" and not list((tmp_path / "checkpoints").glob(".*"))


def test_the_temporary_folder_of_a_failed_save_is_gone(tmp_path):
    succeed(save_all(tmp_path, 10, ranks(OLD)))
    before = tree(tmp_path)
    save_all(tmp_path, 20, ranks(NEW), [Hasty(), Failing()])
    assert tree(tmp_path) == before and sorted(os.listdir(tmp_path / "checkpoints")) == ["latest", "step_00000010"]


def test_several_failing_ranks_are_all_named(tmp_path):
    line = str(save_all(tmp_path, 1, ranks(OLD, tp=3), [Hasty(), Failing(), Failing(errno.EIO)])[0])
    assert "rank 1 failed writing its part: No space left on device [ENOSPC]" in line
    assert "rank 2 failed writing its part: Input/output error [EIO]" in line and "rank 0" not in line


def test_a_first_save_that_fails_leaves_nothing_to_resume_from(tmp_path):
    save_all(tmp_path, 1, ranks(OLD), [Hasty(), Failing()])
    assert newest(tmp_path / "checkpoints") is None
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        find(tmp_path)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB."""
    with mounted(tmp_path / "small", "256k") as folder:
        yield folder


def test_a_disk_that_is_really_full(small_disk):
    parts = {"up": ((64, 96), 0)}  # 24 KiB a tensor, 72 KiB a checkpoint with its moments
    succeed(save_all(small_disk, 1, engines(parts, draw(parts), tp=2), [Disk(), Disk()], keep=9))
    saved, error = 1, None
    for step in range(2, 6):
        result = save_all(small_disk, step, engines(parts, draw(parts, seed=step), tp=2), [Disk(), Disk()], keep=9)[1]
        if isinstance(result, BaseException):
            error = result
            break
        saved = step
    assert isinstance(error, CheckpointError) and "No space left on device [ENOSPC]" in str(error) and 1 <= saved <= 3
    assert find(small_disk).name == f"step_0000000{saved}"
    assert not list((small_disk / "checkpoints").glob(".*")), "the room that the attempt took is free again"
    target = engines(parts, None)
    succeed(load_all(small_disk, target))
    assert wrong(target, draw(parts, seed=saved if saved > 1 else 0)) == []


def test_a_read_only_file_system(small_disk):
    succeed(save_all(small_disk, 1, ranks(OLD)))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for result in save_all(small_disk, 2, ranks(NEW), [Disk(), Disk()]):
        assert isinstance(result, CheckpointError) and "[EROFS]" in str(result)
    target = ranks(None)
    succeed(load_all(small_disk, target))
    assert wrong(target, OLD) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into a read-only folder")
def test_a_read_only_folder(tmp_path):
    succeed(save_all(tmp_path, 1, ranks(OLD)))
    root = tmp_path / "checkpoints"
    root.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        assert "[EACCES]" in str(save_all(tmp_path, 2, ranks(NEW))[0]) and find(tmp_path).name == "step_00000001"
    finally:
        root.chmod(stat.S_IRWXU)


def deaths(folder, step, keep):
    """Every (operation, moment) at which a save by one rank can be killed."""
    disk = Remembering()
    succeed(save_all(folder, step, ranks(NEW, tp=1), [disk], keep=keep))
    for number, (name, *_) in enumerate(disk.log):
        yield from ((number, when) for when in ("before", "after", *(("within",) if name == "write" else ())))


def check_survivor(folder, allowed):
    """A whole checkpoint is found, it is one of those allowed (step -> values), and it loads bitwise."""
    path = find(folder)
    step = int(path.name.removeprefix(".old_").removeprefix("step_"))
    assert step in allowed
    target = ranks(None)
    succeed(load_all(path, target))
    assert any(wrong(target, values) == [] for values in allowed[step])
    return step


@pytest.mark.parametrize("step, keep", [(20, 3), (20, 1), (10, 3)], ids=["next", "next, deleting the old", "same step again"])
def test_killed_at_any_moment(step, keep, tmp_path):
    """Of a save after a whole checkpoint at step 10: what is found is the old one or the new one, and the next save cleans up."""
    (tmp_path / "trial").mkdir()
    succeed(save_all(tmp_path / "trial", 10, ranks(OLD)))
    moments = list(deaths(tmp_path / "trial", step, keep))
    assert len(moments) > 25
    allowed = {10: [OLD, NEW]} if step == 10 else {10: [OLD], 20: [NEW]}
    outcomes = set()
    for number, when in moments:
        folder = tmp_path / f"{number}-{when}"
        succeed(save_all(folder, 10, ranks(OLD)))
        result = save_all(folder, step, ranks(NEW, tp=1), [Dying(number, when)], keep=keep)[0]
        assert isinstance(result, Killed)
        outcomes.add(check_survivor(folder, allowed))
        again = save_all(folder, 30, ranks(NEW, tp=1))
        succeed(again)
        assert check_survivor(folder, {30: [NEW]}) == 30
        assert not list((folder / "checkpoints").glob(".*"))
        assert (folder / "checkpoints/step_00000010").is_dir() or keep == 1
    assert outcomes == set(allowed)


def test_a_rank_killed_while_it_writes(tmp_path):
    """The others can't meet it any more; nothing of the attempt is visible, and the next run's save removes it."""
    succeed(save_all(tmp_path, 10, ranks(OLD)))
    before = tree(tmp_path)
    results = save_all(tmp_path, 20, ranks(NEW), [Hasty(), Dying(1, "within")])
    assert isinstance(results[1], Killed) and isinstance(results[0], Exception)
    [attempt] = (tmp_path / "checkpoints").glob(".tmp_step_00000020.*")
    left = tree(tmp_path)
    assert all(name in before or name.startswith(f"checkpoints/{attempt.name}/rank_") for name in left)
    assert (attempt / "rank_00001.safetensors").exists(), "the torn file"
    assert find(tmp_path).name == "step_00000010"
    succeed(save_all(tmp_path, 30, ranks(NEW)))
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["latest", "step_00000010", "step_00000030"]


def test_a_checkpoint_that_stepped_aside_comes_back(tmp_path):
    """Killed between the two renames of a replacement: the old one is found under its other name, and gets its own back."""
    succeed(save_all(tmp_path, 10, ranks(OLD)))
    root = tmp_path / "checkpoints"
    (root / "step_00000010").rename(root / ".old_step_00000010")
    assert find(tmp_path).name == ".old_step_00000010"
    succeed(save_all(tmp_path, 20, ranks(NEW)))
    assert sorted(os.listdir(root)) == ["latest", "step_00000010", "step_00000020"]

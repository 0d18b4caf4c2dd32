"""checkpoint.remote: whole checkpoints on other storage, complete or invisible there, and a run that begins from it."""
from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

import fsspec
import pytest
import torch

from megalm.checkpoint import CheckpointError, Saver, attempts, fault, fetch_missing, find, uploads
from megalm.checkpoint.fetch import fetch
from megalm.checkpoint.jobs import Performer
from megalm.checkpoint.remote import Remote
from megalm.checkpoint.retain import Retention
from megalm.checkpoint.uploads import Uploads
from tests import training
from tests.checkpoint.disks import Remembering, tree
from tests.checkpoint.fakes import SMALL, Crew, Hasty, draw, engines, plan, save_all, settings
from tests.checkpoint.test_layouts import load_all, succeed, wrong

pytest_plugins = ["tests.checkpoint.storages"]


def copy_here(performer: Performer, url: str, step: int, ranks: int, keep: int) -> None:
    answers = [performer.withdraw(url, step), *(performer.upload(url, step, rank, ranks) for rank in range(ranks)),
               performer.complete(url, step, {"keep": keep})]
    assert [answer.problem for answer in answers] == [None] * len(answers)


def save_there(folder: Path, url: str, ranks, steps, background: bool = False, **rules) -> list[str]:
    lines: list[str] = []
    in_process = not url.startswith("file")  # no other one reaches memory, and starting one for S3 takes a second

    def job(groups):
        remote = None if in_process else url
        with Saver(folder, ranks[groups.rank], groups, settings(remote=remote, **rules), plan(), disk=Hasty(),
                   report=lines.append) as saver:
            if background:
                saver.write_in_background(torch.device("cpu"))
            for step in steps:
                saver.save(step, 8 * step)
                saver.finish()
                saver.copies.finish()
                if in_process and groups.rank == 0:
                    copy_here(Performer(saver.root, Hasty()), url, step, len(ranks), rules.get("keep", 3))

    succeed(Crew(len(ranks)).run(job))
    return lines


def test_what_was_copied_is_fetched_and_loads(url, tmp_path):
    values = draw(SMALL)
    assert save_there(tmp_path / "run", url, engines(SMALL, values, tp=2), (1, 2, 3), url.startswith("file"), keep=2) == []
    remote = Remote(url)
    assert remote.steps() == [3, 2]
    shutil.rmtree(tmp_path / "run")
    lines: list[str] = []
    found = fetch(remote, tmp_path / "run/checkpoints", lines.append)
    assert found.name == "step_00000003" and lines == [f"fetched {url}/step_00000003"] and find(tmp_path / "run") == found
    targets = engines(SMALL, None, tp=3)
    succeed(load_all(tmp_path / "run", targets))
    assert wrong(targets, values) == []


def test_without_every_file_there_is_no_checkpoint_there(url, tmp_path):
    save_there(tmp_path / "run", url, engines(SMALL, draw(SMALL), tp=2), (1,))
    remote, folder = Remote(url), tmp_path / "run/checkpoints/step_00000001"
    files, path = fsspec.core.url_to_fs(url)
    files.rm(path, recursive=True)
    remote.upload(folder, ["rank_00000.safetensors", "rank_00000.json", "rank_00001.json"])
    with pytest.raises(CheckpointError, match="rank_00001.safetensors has None bytes there, not"):
        remote.complete(folder, Retention(3))
    assert remote.steps() == [] and fetch(remote, tmp_path / "other", lambda line: None) is None


def test_a_step_saved_again_is_none_there_until_it_is_complete(url, tmp_path, monkeypatch):
    """The old checkpoint.json doesn't stand beside new files, of whatever moment."""
    save_there(tmp_path / "run", url, engines(SMALL, draw(SMALL)), (1, 2))
    upload, seen = Remote.upload, []
    monkeypatch.setattr(Remote, "upload", lambda self, *rest: (seen.append(self.steps()), upload(self, *rest)))
    succeed(save_all(tmp_path / "run", 2, engines(SMALL, draw(SMALL, seed=1))))
    copy_here(Performer(tmp_path / "run/checkpoints", Hasty()), url, 2, 1, 3)
    assert seen == [[1]] * len(seen) and len(seen) == 3 and Remote(url).steps() == [2, 1]


def test_a_flipped_bit_there_is_found_before_anything_has_its_name(url, tmp_path):
    save_there(tmp_path / "run", url, engines(SMALL, draw(SMALL)), (1, 2))
    files, path = fsspec.core.url_to_fs(url)
    name = f"{path}/step_00000002/rank_00000.safetensors"
    content = bytearray(files.cat_file(name))
    content[-1] ^= 1
    files.pipe_file(name, bytes(content))
    lines: list[str] = []
    assert fetch(Remote(url), tmp_path / "other", lines.append).name == "step_00000001"
    assert "aren't what was written" in lines[0] and [path.name for path in (tmp_path / "other").iterdir()] == ["step_00000001"]


def test_a_damaged_one_there_is_skipped_with_the_reason(url, tmp_path):
    save_there(tmp_path / "run", url, engines(SMALL, draw(SMALL)), (1, 2))
    files, path = fsspec.core.url_to_fs(url)
    files.pipe_file(f"{path}/step_00000002/plan.json", b"{}")
    lines: list[str] = []
    found = fetch(Remote(url), tmp_path / "other", lines.append)
    assert found.name == "step_00000001" and fault(found) is None
    assert len(lines) == 2 and lines[0].startswith(f"skipped {url}/step_00000002: plan.json has 2 bytes")


def test_where_none_is_whole_no_run_begins_anew(url, tmp_path):
    """It would put its own checkpoints in their place."""
    save_there(tmp_path / "run", url, engines(SMALL, draw(SMALL)), (1, 2))
    files, path = fsspec.core.url_to_fs(url)
    for step in (1, 2):
        files.pipe_file(f"{path}/step_{step:08d}/plan.json", b"{}")
    with pytest.raises(CheckpointError, match=r"none of .* is whole \(step_00000002: plan.json has 2 bytes.*step_0"):
        fetch_missing(tmp_path / "other", url, "auto", print)
    assert fetch(Remote(url), tmp_path / "other", print, steps=[2]) is None  # here is another to go on from


def test_older_ones_that_cannot_be_deleted_there_are_a_line_of_their_own(url, tmp_path, monkeypatch):
    """And the copy is there."""
    succeed(save_all(tmp_path / "run", 1, engines(SMALL, draw(SMALL))))
    folder, remote = tmp_path / "run/checkpoints/step_00000001", Remote(url)
    remote.upload_share(folder, 0, 1)
    monkeypatch.setattr(remote, "_retire", lambda *_: 1 / 0)
    notes = remote.complete(folder, Retention(keep=3))
    assert notes == [f"step_00000001 is in {url}, but older ones could not be deleted there: ZeroDivisionError: division by zero"]
    assert remote.has(folder) and fetch(remote, tmp_path / "other", print).name == "step_00000001"


class Storage(Remote):
    """Remembers what is asked for, and breaks down at a file, for good or for so many times."""

    def __init__(self, url: str, breaks_at: str = "", times: int = 99) -> None:
        super().__init__(url)
        self.breaks_at, self.times, self.asked = breaks_at, times, []

    def get(self, step: int, name: str, target: Path) -> None:
        self.asked.append(name)
        if name == self.breaks_at and self.times > 0:
            self.times -= 1
            target.write_bytes(b"half of it")
            raise ConnectionError("the line is down")
        super().get(step, name, target)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(attempts, "PAUSES", (0.0, 0.0))


def test_a_fetch_that_ended_early_is_gone_on_with(url, tmp_path, impatient):
    """Nothing older is taken instead, what is complete isn't asked for again, and what is bad of it is."""
    values = draw(SMALL)
    save_there(tmp_path / "run", url, engines(SMALL, values, tp=3), (1, 2))
    broken, root, lines = Storage(url, "rank_00001.safetensors"), tmp_path / "other/checkpoints", []
    with pytest.raises(CheckpointError, match="rank_00001.safetensors can't be fetched: ConnectionError: the line is down"):
        fetch(broken, root, lines.append)
    assert broken.asked.count("rank_00001.safetensors") == 3 and find_none(root) and lines == []
    kept = root / ".tmp_step_00000002.fetched/rank_00000.safetensors"
    kept.write_bytes(bytes(kept.stat().st_size))  # a disk that forgot
    sound = Storage(url)
    assert fetch(sound, root, lines.append).name == "step_00000002" and lines == [f"fetched {url}/step_00000002"]
    counts = {name: sound.asked.count(name) for name in sound.asked}
    assert counts["rank_00000.safetensors"] == 1 and sound.asked.index("rank_00000.safetensors") > sound.asked.index("plan.json")
    target = engines(SMALL, None)
    succeed(load_all(root.parent, target))
    assert wrong(target, values) == [] and not list(root.glob(".tmp*")) and not list(root.rglob("*part"))


def find_none(root: Path) -> bool:
    return not list(root.glob("step_*"))


def test_what_is_complete_of_a_fetch_is_kept(url, tmp_path, impatient):
    save_there(tmp_path / "run", url, engines(SMALL, draw(SMALL), tp=3), (1,))
    broken, root = Storage(url, "rank_00001.safetensors", times=3), tmp_path / "other"
    with pytest.raises(CheckpointError):
        fetch(broken, root, print)
    before, told = set(broken.asked) - {"rank_00001.safetensors"}, []
    broken.asked.clear()
    assert fetch(broken, root, print, tell=told.append) is not None and before and before.isdisjoint(broken.asked)
    assert told[0].endswith(f"in {len(broken.asked) + len(before) + 1} files, of which {len(before)} are here already")


def test_a_line_that_is_down_for_a_moment_costs_a_moment(url, tmp_path, impatient):
    save_there(tmp_path / "run", url, engines(SMALL, draw(SMALL), tp=2), (1,))
    assert fetch(Storage(url, "rank_00001.json", times=2), tmp_path / "other", print).name == "step_00000001"


def test_another_checkpoint_of_that_step_is_fetched_anew(url, tmp_path, impatient):
    """What is kept of a fetch is of what was there then."""
    save_there(tmp_path / "run", url, engines(SMALL, draw(SMALL), tp=2), (1,))
    with pytest.raises(CheckpointError):
        fetch(Storage(url, "rank_00001.safetensors"), tmp_path / "other/checkpoints", print)
    values = draw(SMALL, seed=1)
    save_there(tmp_path / "run", url, engines(SMALL, values, tp=2), (1,))
    fetch(Remote(url), tmp_path / "other/checkpoints", print)
    target = engines(SMALL, None)
    succeed(load_all(tmp_path / "other", target))
    assert wrong(target, values) == []


class Noting(Remembering):
    """Notes which files are synced, too."""

    def sync(self, handle: int) -> None:
        self.log.append(("sync", Path(os.readlink(f"/proc/self/fd/{handle}")).name))
        super().sync(handle)


def test_all_of_a_fetched_checkpoint_is_on_the_disk_before_it_has_its_name(url, tmp_path):
    save_there(tmp_path / "run", url, engines(SMALL, draw(SMALL), tp=2), (1,))
    disk = Noting()
    folder = fetch(Remote(url), tmp_path / "other", print, disk=disk)
    renamed = disk.log.index(("rename", ".tmp_step_00000001.fetched", "step_00000001"))
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "checkpoint.json"]
    synced = [disk.log[number - 1] for number, entry in enumerate(disk.log) if entry[:2] == ("rename", ".tmp_part")]
    assert len(synced) == len(files) and set(synced) == {("sync", ".tmp_part")}
    assert disk.log.index(("write", "checkpoint.json")) < renamed
    last = max(number for number, entry in enumerate(disk.log[:renamed]) if entry[0] == "rename")
    assert ("sync_folder", ".tmp_step_00000001.fetched") in disk.log[last:renamed]
    assert ("sync_folder", "other") in disk.log[renamed:]


def test_storage_that_doesn_t_answer_starts_no_run_anew(tmp_path, monkeypatch, impatient):
    """No checkpoint there and no answer from there are different things."""
    monkeypatch.setattr(Remote, "steps", lambda self: (_ for _ in ()).throw(PermissionError(13, "no credentials")))
    with pytest.raises(CheckpointError, match="^file:.*/bucket can't be fetched: PermissionError: no credentials"):
        fetch_missing(tmp_path / "run", f"file://{tmp_path}/bucket", "auto", print)


def test_steps_of_storage_that_doesn_t_answer_are_an_error(tmp_path, monkeypatch):
    save_there(tmp_path / "run", f"file://{tmp_path}/elsewhere", engines(SMALL, draw(SMALL)), (1,))
    remote = Remote(f"file://{tmp_path}/elsewhere")
    monkeypatch.setattr(type(remote._files), "info", lambda self, path, **more: (_ for _ in ()).throw(OSError("no answer")))
    with pytest.raises(OSError, match="no answer"):
        remote.steps()


def test_a_damaged_newest_is_fetched_though_an_older_one_is_whole(tmp_path):
    """Of a rewound run, nothing newer than where it was rewound to."""
    url, run, lines = f"file://{tmp_path}/elsewhere", tmp_path / "run", []
    save_there(run, url, engines(SMALL, draw(SMALL)), (1, 2, 3))
    (run / "checkpoints/step_00000003/config.json").unlink()
    assert fetch_missing(run, url, "auto", lines.append).name == "step_00000003"
    assert lines == [f"fetched {url}/step_00000003", "skipped step_00000003: config.json is missing"]
    (run / "checkpoints/latest").write_text("step_00000002\n")
    assert fetch_missing(run, url, "auto", lines.append) is None
    (run / "checkpoints/step_00000002/config.json").unlink()
    assert fetch_missing(run, url, "auto", lines.append).name == "step_00000002"
    assert fetch_missing(run, url, "auto", lines.append, [run / "checkpoints/step_00000002"]).name == "step_00000002"
    assert fetch_missing(run, url, "auto", lines.append, [run / "checkpoints/step_00000002"] * 2) is None


def test_trouble_there_is_told_and_stops_nothing(tmp_path):
    (tmp_path / "taken").write_text("a file where a folder should be")
    lines = save_there(tmp_path / "run", f"file://{tmp_path}/taken/run", engines(SMALL, draw(SMALL), tp=2), (1, 2))
    assert find(tmp_path / "run").name == "step_00000002" and len(lines) == 4, "a line a step on each of two ranks"
    assert all("isn't in file://" in line and "rank 0 failed copying it: " in line for line in lines)


def with_a_silent_server(folder: Path, then, **rules) -> list[str]:
    """then(saver, groups) on two ranks that copy to a server which takes connections and never says a word."""
    ranks, lines = engines(SMALL, draw(SMALL), tp=2), []
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        url = f"ftp://127.0.0.1:{server.getsockname()[1]}/run"

        def job(groups):
            with Saver(folder, ranks[groups.rank], groups, settings(remote=url, **rules), plan(),
                       report=lines.append if groups.rank == 0 else None) as saver:
                saver.write_in_background(torch.device("cpu"))
                then(saver, groups)

        succeed(Crew(2).run(job))
    return lines


def test_a_copy_that_hangs_delays_no_save_and_ends_in_a_line(tmp_path, monkeypatch):
    """Meanwhile the checkpoint that it copies stays here, though `keep` lets it go, and of those that wait the newest counts."""
    def train_on(saver, groups):
        for step in (1, 2, 3):
            saver.save(step, 8 * step)
            saver.finish()
        assert saver.saved == 3 and saver.copies.steps == [1, 3]
        assert sorted(path.name for path in saver.root.glob("step_*")) == ["step_00000001", "step_00000002", "step_00000003"]
        monkeypatch.setattr(uploads, "SILENT_SECONDS", 0.3)
        monkeypatch.setattr(uploads, "TELL_SECONDS", 0.0)
        saver.copies.finish()
        saver.save(4, 32)
        saver.finish()
        assert sorted(path.name for path in saver.root.glob("step_*")) == ["step_00000004"]

    lines = with_a_silent_server(tmp_path, train_on, keep=1)
    assert "step_00000002 isn't copied to ftp://" in lines[0] and "step_00000003 will be" in lines[0]
    assert lines[1].startswith("waiting until step_00000001 is in ftp://")
    assert ["isn't in ftp://" in line and "nothing has moved for" in line for line in lines[2:4]] == [True, True]


def test_who_must_leave_waits_for_no_copy(tmp_path):
    def leave(saver, groups):
        saver.save(1, 8)
        saver.finish()
        saver.save(2, 16)
        saver.finish()
        saver.copies.finish(lambda: groups.rank == 1)
        assert saver.saved == 2 and saver.copies.steps == []

    lines = with_a_silent_server(tmp_path, leave)
    assert len(lines) == 2 and all(line.endswith("the run had to leave; the next one copies it") for line in lines)
    assert find(tmp_path).name == "step_00000002"


def test_the_next_run_copies_what_was_left_though_it_has_other_ranks(tmp_path):
    url, lines = f"file://{tmp_path}/elsewhere", []
    succeed(save_all(tmp_path / "run", 1, engines(SMALL, draw(SMALL), tp=3)))
    Remote(url).upload(tmp_path / "run/checkpoints/step_00000001", ["rank_00001.safetensors"])

    def job(groups):
        copies = Uploads(tmp_path / "run/checkpoints", groups, url, {"keep": 3}, lines.append)
        for _ in range(2):  # the second time it is there already
            copies.offer(1)
            copies.finish()
        copies.close()

    succeed(Crew(2).run(job))
    found = fetch(Remote(url), tmp_path / "other", print)
    assert lines == [] and tree(found) == tree(tmp_path / "run/checkpoints/step_00000001")


def test_a_url_that_no_package_knows_is_one_line():
    with pytest.raises(CheckpointError, match="checkpoint.remote 'nowhere://x': .*nowhere"):
        Remote("nowhere://x")


def test_damaged_ones_here_don_t_hide_the_one_there(tmp_path):
    """Whether a first look tells, or only loading does; and a copy that is no better is not fetched for ever."""
    url, root = f"file://{tmp_path}/elsewhere", tmp_path / "run/checkpoints"
    save_there(tmp_path / "run", url, engines(SMALL, draw(SMALL)), (1,))
    folder, lines = root / "step_00000001", []
    assert fetch_missing(tmp_path / "run", url, "auto", lines.append) is None
    (folder / "plan.json").write_bytes(b"x" * (folder / "plan.json").stat().st_size)
    assert fetch_missing(tmp_path / "run", url, "auto", lines.append) == folder and fault(folder) is None
    assert fetch_missing(tmp_path / "run", url, "auto", lines.append, [folder]) == folder
    assert fetch_missing(tmp_path / "run", url, "auto", lines.append, [folder, folder]) is None
    assert [line for line in lines if line.startswith("fetched")] == [f"fetched {url}/step_00000001"] * 2
    assert [line.partition(": ")[0] for line in lines[1::2]] == ["skipped step_00000001"] * 2, "and why"


def test_a_run_that_lost_its_folder_goes_on_bitwise(tmp_path):
    path = training.write_config(tmp_path, checkpoint={"every": 2, "remote": f"file://{tmp_path}/elsewhere"})
    assert training.start(2, path, "parallel.dp=2", "train.stop_at=4") == [(0, "")] * 2
    shutil.rmtree(tmp_path / "run")
    assert training.start(2, path, "parallel.dp=2") == [(0, "")] * 2
    assert [record["step"] for record in training.records(tmp_path / "run")] == [5, 6]
    found = training.tensors(find(tmp_path / "run"))
    assert training.start(2, path, "parallel.dp=2", f"train.dir={tmp_path}/whole", "checkpoint.remote=null") == [(0, "")] * 2
    expected = training.tensors(find(tmp_path / "whole"))
    assert all(torch.equal(found[key], expected[key]) for key in expected) and found.keys() == expected.keys()

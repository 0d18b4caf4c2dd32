"""checkpoint.remote: whole checkpoints on other storage, complete or invisible there, and a run that begins from it."""
from __future__ import annotations

import shutil
import socket
import sys
import time
from pathlib import Path

import fsspec
import pytest
import torch

from megalm.checkpoint import CheckpointError, Saver, fault, fetch_missing, find
from megalm.checkpoint.remote import Remote
from megalm.checkpoint.retain import Retention
from tests import training
from tests.checkpoint.fakes import SMALL, Crew, Hasty, draw, engines, plan, settings
from tests.checkpoint.test_layouts import load_all, succeed, wrong


@pytest.fixture(params=["file", "memory"])
def url(request, tmp_path):
    """Folders on a disk, which a writer reaches too, and objects in memory."""
    yield f"file://{tmp_path}/elsewhere/run" if request.param == "file" else "memory://bucket/run"
    fsspec.filesystem("memory").store.clear()


def save_there(folder: Path, url: str, ranks, steps, background: bool = False, **rules) -> list[str]:
    lines: list[str] = []

    def job(groups):
        with Saver(folder, ranks[groups.rank], groups, settings(remote=url, **rules), plan(), disk=Hasty(),
                   report=lines.append) as saver:
            if background:
                saver.write_in_background(torch.device("cpu"))
            for step in steps:
                saver.save(step, 8 * step)
                saver.finish()

    succeed(Crew(len(ranks)).run(job))
    return lines


def test_what_was_copied_is_fetched_and_loads(url, tmp_path):
    values = draw(SMALL)
    assert save_there(tmp_path / "run", url, engines(SMALL, values, tp=2), (1, 2, 3), url.startswith("file"), keep=2) == []
    remote = Remote(url)
    assert remote.steps() == [3, 2]
    shutil.rmtree(tmp_path / "run")
    lines: list[str] = []
    found = remote.fetch(tmp_path / "run/checkpoints", lines.append)
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
    assert remote.steps() == [] and remote.fetch(tmp_path / "other", lambda line: None) is None


def test_a_step_saved_again_is_none_there_until_it_is_complete(url, tmp_path, monkeypatch):
    """The old checkpoint.json doesn't stand beside new files, of whatever moment."""
    save_there(tmp_path / "run", url, engines(SMALL, draw(SMALL)), (1, 2))
    upload, seen = Remote.upload, []
    monkeypatch.setattr(Remote, "upload", lambda self, *rest: (seen.append(self.steps()), upload(self, *rest)))
    save_there(tmp_path / "run", url, engines(SMALL, draw(SMALL, seed=1)), (2,))
    assert seen == [[1]] * len(seen) and len(seen) == 3 and Remote(url).steps() == [2, 1]


def test_a_flipped_bit_there_is_found_before_anything_has_its_name(url, tmp_path):
    save_there(tmp_path / "run", url, engines(SMALL, draw(SMALL)), (1, 2))
    files, path = fsspec.core.url_to_fs(url)
    name = f"{path}/step_00000002/rank_00000.safetensors"
    content = bytearray(files.cat_file(name))
    content[-1] ^= 1
    files.pipe_file(name, bytes(content))
    lines: list[str] = []
    assert Remote(url).fetch(tmp_path / "other", lines.append).name == "step_00000001"
    assert "aren't what was written" in lines[0] and [path.name for path in (tmp_path / "other").iterdir()] == ["step_00000001"]


def test_a_damaged_one_there_is_skipped_with_the_reason(url, tmp_path):
    save_there(tmp_path / "run", url, engines(SMALL, draw(SMALL)), (1, 2))
    files, path = fsspec.core.url_to_fs(url)
    files.pipe_file(f"{path}/step_00000002/plan.json", b"{}")
    lines: list[str] = []
    found = Remote(url).fetch(tmp_path / "other", lines.append)
    assert found.name == "step_00000001" and fault(found) is None
    assert len(lines) == 2 and lines[0].startswith(f"skipped {url}/step_00000002: plan.json has 2 bytes")


def test_trouble_there_is_told_and_stops_nothing(tmp_path):
    (tmp_path / "taken").write_text("a file where a folder should be")
    lines = save_there(tmp_path / "run", f"file://{tmp_path}/taken/run", engines(SMALL, draw(SMALL), tp=2), (1, 2))
    assert find(tmp_path / "run").name == "step_00000002" and len(lines) == 6
    assert all("isn't in file://" in line and "copying it: " in line for line in lines)


def with_a_silent_server(folder: Path, monkeypatch, then) -> list[str]:
    """then(saver, groups) on two ranks that copy to a server which takes connections and never says a word."""
    monkeypatch.setattr(sys.modules[Saver.__module__], "ELSEWHERE_SECONDS", 0.5)
    ranks, lines = engines(SMALL, draw(SMALL), tp=2), []
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        url = f"ftp://127.0.0.1:{server.getsockname()[1]}/run"

        def job(groups):
            with Saver(folder, ranks[groups.rank], groups, settings(remote=url), plan(), report=lines.append) as saver:
                saver.write_in_background(torch.device("cpu"))
                saver.save(1, 8)
                then(saver, groups)
                saver.save(2, 16)
                saver.finish()
                assert saver.saved == 2

        succeed(Crew(2).run(job))
    assert find(folder).name == "step_00000002"
    return lines


def test_a_copy_that_hangs_ends_in_a_line_and_the_run_goes_on(tmp_path, monkeypatch):
    def go_on(saver, groups):
        saver.finish()
        assert saver.saved == 1 and saver.writer_pid is not None

    lines = with_a_silent_server(tmp_path, monkeypatch, go_on)
    assert any("step_00000001 isn't in ftp://" in line and "copying it has taken more than" in line for line in lines)


def test_who_must_leave_waits_for_no_copy(tmp_path, monkeypatch):
    def leave(saver, groups):
        while saver._phase != "withdraw":
            saver.progress(groups.crew.highest(groups.rank, saver.state))
            time.sleep(0.01)
        saver.stay_here()

    lines = with_a_silent_server(tmp_path, monkeypatch, leave)
    assert len(lines) == 2 and all(line.endswith("the run had to leave") for line in lines)


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
    assert lines == [f"fetched {url}/step_00000001"] * 2


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

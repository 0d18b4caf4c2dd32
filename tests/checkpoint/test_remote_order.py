"""checkpoint.remote: which checkpoint there a run goes on from, and what is cleared away."""
from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest

from megalm.checkpoint import CheckpointError, fetch_missing, find
from megalm.checkpoint.fetch import fetch
from megalm.checkpoint.jobs import Performer
from megalm.checkpoint.remote import Remote
from megalm.checkpoint.retain import Retention
from megalm.checkpoint.uploads import Uploads
from tests.checkpoint.fakes import SMALL, Crew, Hasty, draw, engines, save_all
from tests.checkpoint.test_layouts import load_all, succeed, wrong
from tests.checkpoint.test_remote import copy_here, save_there

pytest_plugins = ["tests.checkpoint.storages"]


def there(url: str) -> set[str]:
    """What lies directly below the URL, folders with nothing in them left out."""
    files, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    return {name.removeprefix(f"{path}/").split("/")[0] for name in files.find(path)}


def put(url: str, name: str, content: bytes) -> None:
    files, path = fsspec.core.url_to_fs(url)
    if not url.startswith("s3:"):  # which would ask whether the bucket is there
        files.makedirs(f"{path}/{name}".rpartition("/")[0], exist_ok=True)
    files.pipe_file(f"{path}/{name}", content)


def rewound(folder: Path, url: str) -> dict:
    """A run that went to step 4, was rewound by hand to step 1 and went on another way to step 2; that one's values."""
    save_there(folder, url, engines(SMALL, draw(SMALL)), (1, 2, 3, 4), keep=4)
    (folder / "checkpoints/latest").write_text("step_00000001\n")
    values = draw(SMALL, seed=1)
    save_there(folder, url, engines(SMALL, values), (2,), keep=4)
    return values


def test_a_rewound_run_goes_on_where_it_was_and_not_at_the_highest_step(url, tmp_path):
    values = rewound(tmp_path / "run", url)
    assert Remote(url).steps() == [2, 1, 4, 3] and find(tmp_path / "run").name == "step_00000002"
    assert fetch(Remote(url), tmp_path / "other/checkpoints", print).name == "step_00000002"
    target = engines(SMALL, None)
    succeed(load_all(tmp_path / "other", target))
    assert wrong(target, values) == []


def test_a_run_put_back_to_a_step_that_is_there_says_so_as_it_begins(url, tmp_path):
    """Before it has saved anything, it may lose its folder."""
    save_there(tmp_path / "run", url, engines(SMALL, draw(SMALL)), (1, 2, 3), keep=4)
    performer = Performer(tmp_path / "run/checkpoints", Hasty())
    copy_here(performer, url, 1, 1, 4)  # which a run does with what it goes on from
    assert Remote(url).steps() == [1, 3, 2]


def test_a_copy_that_never_ends_takes_nothing_back_to_the_other_branch(url, tmp_path, monkeypatch):
    """`latest` is there before its checkpoint is."""
    rewound(tmp_path / "run", url)
    succeed(save_all(tmp_path / "run", 3, engines(SMALL, draw(SMALL, seed=1))))
    performer = Performer(tmp_path / "run/checkpoints", Hasty())
    upload = Remote.upload

    def up_to_its_end(self, folder, names, *rest):
        if names == ["checkpoint.json"]:
            raise CheckpointError("the line is down")
        upload(self, folder, names, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Remote, "upload", up_to_its_end)
        answers = [performer.withdraw(url, 3), performer.upload(url, 3, 0, 1), performer.complete(url, 3, {"keep": 4})]
    assert [answer.problem for answer in answers] == [None, None, "copying it: the line is down"]
    assert Remote(url).steps() == [2, 1, 4]
    copy_here(performer, url, 3, 1, 4)
    assert Remote(url).steps() == [3, 2, 1, 4]


@pytest.mark.parametrize("content", [b"", b"step_0000", b"step_00000001\nxxh3 0123456789abcdef\n"])
def test_a_latest_that_says_nothing_of_use_leaves_the_newest(url, tmp_path, content):
    """Torn, or of another checkpoint; a name alone is somebody's wish."""
    save_there(tmp_path / "run", url, engines(SMALL, draw(SMALL)), (1, 2))
    put(url, "latest", content)
    assert Remote(url).steps() == [2, 1]
    put(url, "latest", b"step_00000001\n")
    assert Remote(url).steps() == [1, 2]


def test_what_copies_that_ended_early_have_left_goes_with_the_next_and_nothing_whole(url, tmp_path):
    """Of later steps too it stays: they may be another branch's, which the run will overwrite."""
    run, remote = tmp_path / "run", Remote(url)
    save_there(run, url, engines(SMALL, draw(SMALL), tp=2), (1, 2, 4, 5), keep=4)
    files, path = fsspec.core.url_to_fs(url)
    for step in (2, 5):  # as if they had never been completed
        files.rm_file(f"{path}/step_{step:08d}/checkpoint.json")
    put(url, "notes/by_hand.txt", b"not ours")
    succeed(save_all(run, 3, engines(SMALL, draw(SMALL), tp=2)))
    copy_here(Performer(run / "checkpoints", Hasty()), url, 3, 2, 4)
    assert there(url) == {"latest", "notes", "step_00000001", "step_00000003", "step_00000004", "step_00000005"}
    assert remote.steps() == [3, 1, 4]
    copy_here(Performer(run / "checkpoints", Hasty()), url, 4, 2, 1)  # is there already: only the rule is another
    assert there(url) == {"latest", "notes", "step_00000004", "step_00000005"}


def test_leftovers_that_cannot_be_deleted_are_a_line_and_the_copy_is_there(url, tmp_path, monkeypatch):
    succeed(save_all(tmp_path / "run", 1, engines(SMALL, draw(SMALL))))
    save_there(tmp_path / "run", url, engines(SMALL, draw(SMALL)), (2,))
    folder, remote = tmp_path / "run/checkpoints/step_00000002", Remote(url)
    put(url, "step_00000001/rank_00000.json", b"half of it")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", "the folder")

    monkeypatch.setattr(remote._files, "rm", refuse, raising=False)
    [note] = remote.complete(folder, Retention(keep=1))
    assert note == f"step_00000002 is in {url}, but older ones could not be deleted there: " \
        "PermissionError: Permission denied (the folder)"
    # As S3's package does of files that it may not delete.
    monkeypatch.setattr(remote._files, "rm", lambda *_, **__: None, raising=False)
    [note] = remote.complete(folder, Retention(keep=1))
    assert note.endswith("step_00000001/rank_00000.json is still there")
    assert remote.steps() == [2]


def test_a_fetched_run_has_its_settings_too(url, tmp_path):
    """One that is finished would never write them; those that are there stay."""
    save_there(tmp_path / "run", url, engines(SMALL, draw(SMALL)), (1,))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/plan.json").write_text("mine")
    assert fetch_missing(tmp_path / "other", url, "auto", print).name == "step_00000001"
    stored = tmp_path / "run/checkpoints/step_00000001/config.json"
    assert (tmp_path / "other/config.json").read_bytes() == stored.read_bytes()
    assert (tmp_path / "other/plan.json").read_text() == "mine"
    assert sorted(path.name for path in (tmp_path / "other").iterdir()) == ["checkpoints", "config.json", "plan.json"]


def test_a_step_that_is_saved_again_replaces_what_was_damaged_though_checkpoint_json_is_the_same(url, tmp_path):
    """Which says nothing of the time: a run that comes to a step again says the same of it."""
    save_there(tmp_path / "run", url, engines(SMALL, draw(SMALL)), (1, 2))
    manifest = (tmp_path / "run/checkpoints/step_00000002/checkpoint.json").read_bytes()
    files, path = fsspec.core.url_to_fs(url)
    content = bytearray(files.cat_file(f"{path}/step_00000002/rank_00000.safetensors"))
    content[-1] ^= 1
    put(url, "step_00000002/rank_00000.safetensors", bytes(content))
    lines: list[str] = []
    assert fetch(Remote(url), tmp_path / "run2/checkpoints", lines.append).name == "step_00000001"
    assert lines[0].startswith(f"skipped {url}/step_00000002")
    succeed(save_all(tmp_path / "run2", 2, engines(SMALL, draw(SMALL))))
    assert (tmp_path / "run2/checkpoints/step_00000002/checkpoint.json").read_bytes() == manifest
    copy_again(Performer(tmp_path / "run2/checkpoints", Hasty()), url, 2)
    assert fetch(Remote(url), tmp_path / "other/checkpoints", print).name == "step_00000002"


def copy_again(performer: Performer, url: str, step: int) -> None:
    """As Uploads has it done of what this run has saved, and not of what it goes on from."""
    asked: list[bool] = []

    def job(groups):
        for earlier in (True, False):
            copies = Uploads(performer.root, groups, url, {"keep": 4}, print)
            copies._process = SimpleNamespace(send=lambda job, url, step, again: asked.append(again))
            copies.offer(step, earlier)

    succeed(Crew(1).run(job))
    assert asked == [False, True]
    assert performer.withdraw(url, step, again=True).problem is None
    copy_here(performer, url, step, 1, 4)


def test_a_step_of_an_earlier_run_is_copied_where_files_of_it_are_lost_and_else_not(url, tmp_path):
    save_there(tmp_path / "run", url, engines(SMALL, draw(SMALL)), (1, 2))
    performer, (files, path) = Performer(tmp_path / "run/checkpoints", Hasty()), fsspec.core.url_to_fs(url)
    before = files.info(f"{path}/step_00000002/checkpoint.json")
    copy_here(performer, url, 2, 1, 4)
    assert files.info(f"{path}/step_00000002/checkpoint.json") == before
    files.rm_file(f"{path}/step_00000002/rank_00000.safetensors")
    copy_here(performer, url, 2, 1, 4)
    assert fetch(Remote(url), tmp_path / "other/checkpoints", print).name == "step_00000002"


@pytest.mark.parametrize("content", [b"", b"{}\n", b"not JSON"])
def test_a_checkpoint_json_that_cannot_be_read_keeps_nothing_from_going(url, tmp_path, content):
    """It is none, so what keep leaves is counted without it, and it goes with the older ones."""
    save_there(tmp_path / "run", url, engines(SMALL, draw(SMALL)), (1, 2, 3), keep=4)
    put(url, "step_00000002/checkpoint.json", content)
    assert Remote(url).complete(tmp_path / "run/checkpoints/step_00000003", Retention(keep=2)) == []
    assert there(url) == {"latest", "step_00000001", "step_00000003"}


def test_the_place_is_tried_before_a_run_and_left_as_it_was(url, tmp_path, monkeypatch):
    tried: list[str] = []
    files = Remote(url)._files  # the one of all that have this URL
    for name in ("pipe_file", "cat_file", "rm_file"):
        monkeypatch.setattr(files, name, traced(getattr(files, name), tried, name), raising=False)
    assert fetch_missing(tmp_path / "run", url, "auto", print) is None
    assert tried[:3] == ["pipe_file", "cat_file", "rm_file"] and there(url) == set()


def traced(method, calls: list[str], name: str):
    def call(*args, **words):
        calls.append(name)
        return method(*args, **words)
    return call


def test_a_place_that_cannot_be_read_is_left_as_it_was(url, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", "that file")

    monkeypatch.setattr(Remote(url)._files, "cat_file", refuse, raising=False)
    with pytest.raises(CheckpointError, match="can't be written: PermissionError: Permission denied"):
        fetch_missing(tmp_path / "run", url, "auto", print)
    assert there(url) == set()

"""What a save leaves on the disk, and in which order it gets there."""
from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors import safe_open

from megalm.checkpoint import CheckpointError, fault, find, sealed
from megalm.checkpoint.disk import Disk
from tests.checkpoint.disks import Remembering, tree
from tests.checkpoint.fakes import SMALL, Crew, Engine, draw, engines, plan, save_all, settings
from tests.checkpoint.test_layouts import succeed


def test_the_files_of_a_checkpoint(tmp_path):
    tokenizer = tmp_path / "spm.model"
    tokenizer.write_bytes(b"pieces")
    ranks = engines(SMALL, draw(SMALL), tp=2, dp=2)
    for engine in ranks:
        engine.count = {"optimizer_step": 6, "scale": 0.1}
    results = succeed(save_all(tmp_path / "run", 8, ranks, tokenizer_files=[tokenizer], consumed=50))
    folder = tmp_path / "run/checkpoints/step_00000008"
    assert set(results) == {folder}
    names = [f"rank_0000{rank}.{suffix}" for rank in range(4) for suffix in ("json", "safetensors")]
    assert sorted(tree(folder)) == sorted([*names, "checkpoint.json", "config.json", "plan.json", "tokenizer/spm.model"])
    manifest = json.loads((folder / "checkpoint.json").read_text())
    assert manifest["format"] == "megalm.checkpoint" and manifest["version"] == 2
    assert (manifest["step"], manifest["consumed_samples"], manifest["world_size"]) == (8, 50, 4)
    assert manifest["counters"] == {"optimizer_step": 6, "scale": 0.1}
    assert manifest["versions"]["torch"] == torch.__version__.split("+")[0] or manifest["versions"]["torch"] == torch.__version__
    assert {name: stated["bytes"] for name, stated in manifest["files"].items()} == {
        name: len(content) for name, content in tree(folder).items() if name != "checkpoint.json"}
    assert json.loads((folder / "config.json").read_text()) == settings().model_dump("json")
    assert json.loads((folder / "plan.json").read_text()) == plan().to_dict()
    assert (folder.parent / "latest").read_text() == f"step_00000008\nxxh3 {manifest['xxh3']}\n"
    assert sorted(os.listdir(folder.parent)) == ["latest", "step_00000008"]


def test_any_safetensors_reader_opens_a_rank_s_file(tmp_path):
    """The index and the safetensors header tell the same, and the data is where both say."""
    ranks = engines(SMALL, draw(SMALL), tp=2, dp=3)
    folder = succeed(save_all(tmp_path, 1, ranks))[0]
    for rank, engine in enumerate(ranks):
        owned = [fragment for fragment in engine.held if fragment.owned]
        index = json.loads((folder / f"rank_{rank:05d}.json").read_text())
        assert (index["rank"], index["file"], len(index["fragments"])) == (rank, f"rank_{rank:05d}.safetensors", len(owned))
        with safe_open(folder / index["file"], framework="pt") as file:
            assert set(file.keys()) == {entry["key"] for entry in index["fragments"]}
            for entry, fragment in zip(index["fragments"], owned, strict=True):
                assert torch.equal(file.get_tensor(entry["key"]), fragment.tensor)
                assert (entry["part"], entry["role"], tuple(entry["full_shape"]), entry["start"], entry["count"]) == (
                    fragment.part, fragment.role, fragment.full_shape, fragment.start, fragment.count)
        start = int.from_bytes((folder / index["file"]).read_bytes()[:8], "little") + 8
        assert start % 64 == 0


def test_a_rank_that_owns_nothing_takes_part(tmp_path):
    ranks = engines(SMALL, draw(SMALL), dp=2, sharded=False)
    assert not any(fragment.owned for fragment in ranks[1].held)
    assert fault(succeed(save_all(tmp_path, 1, ranks))[0]) is None


def test_everything_is_on_the_disk_before_it_has_a_name(tmp_path):
    """checkpoint.json last in the folder, the folder's rename after it, `latest` after that."""
    disk = Remembering()
    succeed(save_all(tmp_path, 2, engines(SMALL, draw(SMALL)), [disk]))
    attempt = disk.log[0][1]
    assert attempt.startswith(".tmp_step_00000002.")
    assert disk.log == [
        ("make_folder", attempt), ("write", "rank_00000.safetensors"), ("write", "rank_00000.json"),
        ("write", "config.json"), ("write", "plan.json"), ("write", "checkpoint.json"), ("sync_folder", attempt),
        ("remove", ".tmp_latest"), ("write", ".tmp_latest"), ("sync_folder", "checkpoints"), ("sync_folder", tmp_path.name),
        ("rename", attempt, "step_00000002"), ("sync_folder", "checkpoints"),
        ("rename", ".tmp_latest", "latest"), ("sync_folder", "checkpoints"), ("remove", ".old_step_00000002")]


def test_files_and_folders_are_synced(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))))
    folder = succeed(save_all(tmp_path, 2, engines(SMALL, draw(SMALL), tp=2), [Disk(), Disk()]))[0]
    assert {*tree(folder), ".tmp_latest", "checkpoints", tmp_path.name} <= set(synced)
    assert any(name.startswith(".tmp_step_00000002.") for name in synced)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_stay(keep, tmp_path):
    ranks = engines(SMALL, draw(SMALL))
    for step in range(1, 6):
        succeed(save_all(tmp_path, step, ranks, keep=keep))
    names = [f"step_{step:08d}" for step in range(6 - keep, 6)]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["latest", *names]


def test_a_torn_checkpoint_isn_t_counted_among_those_kept(tmp_path):
    ranks = engines(SMALL, draw(SMALL))
    for step in (1, 2, 3):
        succeed(save_all(tmp_path, step, ranks))
    (tmp_path / "checkpoints/step_00000003/config.json").unlink()
    succeed(save_all(tmp_path, 4, ranks, keep=2))
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["latest", "step_00000002", "step_00000003", "step_00000004"]


def test_making_room_reads_no_rank_s_index(tmp_path, monkeypatch):
    """Of thousands of ranks, each kept checkpoint has thousands: their sizes are enough."""
    ranks = engines(SMALL, draw(SMALL), tp=2)
    for step in (1, 2):
        succeed(save_all(tmp_path, step, ranks))
    read, original = [], sealed.read
    monkeypatch.setattr(sealed, "read", lambda path: (read.append((path.parent.name, path.name)), original(path))[1])
    succeed(save_all(tmp_path, 3, ranks, keep=2))
    assert {name for folder, name in read if folder.startswith("step_")} == {"checkpoint.json"}
    read.clear()
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["latest", "step_00000002", "step_00000003"]
    assert find(tmp_path).name == "step_00000003" and ("step_00000003", "rank_00001.json") in read


def test_going_back_keeps_what_was_just_saved(tmp_path):
    """After `latest` was pointed to an older step, the abandoned later ones neither crowd out the new nor are lost at once."""
    ranks = engines(SMALL, draw(SMALL))
    for step in (10, 20, 30):
        succeed(save_all(tmp_path, step, ranks))
    (tmp_path / "checkpoints/latest").write_text("step_00000010")
    assert find(tmp_path).name == "step_00000010"
    succeed(save_all(tmp_path, 15, ranks, keep=1))
    assert find(tmp_path).name == "step_00000015"
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["latest", "step_00000015", "step_00000020", "step_00000030"]
    other = engines(SMALL, draw(SMALL, seed=5))
    before = tree(tmp_path / "checkpoints/step_00000020")
    succeed(save_all(tmp_path, 20, other, keep=1))
    assert tree(find(tmp_path)) != before and find(tmp_path).name == "step_00000020"


def test_what_can_t_be_deleted_is_reported_and_the_save_stands(tmp_path):
    class Stubborn(Remembering):
        def remove(self, path):
            if path.name.startswith(".deleted_"):
                raise PermissionError(13, "Permission denied", str(path))
            super().remove(path)

    lines = []
    for step in (1, 2):
        succeed(save_all(tmp_path, step, engines(SMALL, draw(SMALL)), [Stubborn()], keep=1, report=lines.append))
    assert find(tmp_path).name == "step_00000002"
    assert len(lines) == 1 and "couldn't be deleted: [Errno 13] Permission denied" in lines[0]
    succeed(save_all(tmp_path, 3, engines(SMALL, draw(SMALL))))
    assert not list((tmp_path / "checkpoints").glob(".*")), "the next save removes what that left"


def test_elements_that_two_ranks_own_or_none_does_are_refused(tmp_path):
    ranks = engines(SMALL, draw(SMALL), dp=2, sharded=False)
    twice = [ranks[0], Engine(ranks[0].held)]
    results = save_all(tmp_path, 1, twice)
    assert all(isinstance(result, CheckpointError) for result in results)
    refusal = "the ranks don't own every element exactly once"
    assert f"master of embedding.word.weight: {refusal}: elements 0..768 are stored twice" in str(results[1])
    lost = engines(SMALL, draw(SMALL), dp=2)
    gone = next(fragment for fragment in lost[1].held if fragment.start)  # its beginning is on the other rank
    lost[1].held.remove(gone)
    assert f"{gone}: {refusal}: elements {gone.start}.." in str(save_all(tmp_path, 1, lost)[0])
    assert os.listdir(tmp_path / "checkpoints") == []


def test_ranks_that_don_t_share_a_file_system(tmp_path):
    ranks = engines(SMALL, draw(SMALL), tp=2)
    from megalm.checkpoint import save
    results = Crew(2).run(lambda groups: save(tmp_path / str(groups.rank), 1, 8, ranks[groups.rank], groups, settings(),
                                                plan()))
    for result in results:
        assert isinstance(result, CheckpointError)
        assert "rank 0 failed describing it: rank_00001" in str(result) and "file system that all ranks share" in str(result)


def test_an_error_of_the_program_on_one_rank_reaches_all(tmp_path):
    class Broken(Engine):
        def fragments(self):
            raise RuntimeError("no state yet")

    results = save_all(tmp_path, 1, [engines(SMALL, draw(SMALL))[0], Broken([])])
    assert all("rank 1 failed writing its part: RuntimeError: no state yet" in str(result) for result in results)

"""Which checkpoint a folder stands for, and damage that is seen before or while it is read."""
from __future__ import annotations

import json
import re
import shutil
import struct

import pytest
import torch

from megalm.checkpoint import CheckpointError, fault, find, load, newest, read_weights
from megalm.checkpoint.sealed import digest, seal
from tests.checkpoint.disks import tree
from tests.checkpoint.fakes import SMALL, Crew, draw, engines, save_all
from tests.checkpoint.test_layouts import load_all, succeed

PARTS = {"up": ((8, 6), 0), "down": ((6, 8), 1)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with the whole checkpoints 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("saved")
    for step in (1, 2, 3):
        succeed(save_all(folder, step, engines(PARTS, draw(PARTS), tp=2)))
    return folder


@pytest.fixture
def run(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def last(run):
    return run / "checkpoints/step_00000003"


def edit(path, change) -> None:
    """Change a JSON file as somebody would who knows the format: its own hash is right again."""
    content = json.loads(path.read_text())
    sealed = content.pop("xxh3", None)
    change(content)
    path.write_bytes(seal(content) if sealed else json.dumps(content).encode())


def set_manifest(folder, **values) -> None:
    edit(folder / "checkpoint.json", lambda content: content.update(values))


def overwrite(path, byte: bytes) -> None:
    path.write_bytes(byte * path.stat().st_size)


def fix_sizes(folder) -> None:
    """Make checkpoint.json agree with the files again, so that a planted error gets past the first look."""
    files = {name: {"bytes": len(content), **({} if name.endswith(".safetensors") else {"xxh3": digest(content)})}
             for name, content in tree(folder).items() if name != "checkpoint.json"}
    edit(folder / "checkpoint.json", lambda manifest: manifest.update(files=files))


def test_a_run_folder_its_checkpoints_and_one_checkpoint(run):
    assert find(run) == find(run / "checkpoints") == find(str(run)) == run / "checkpoints/step_00000003"
    assert find(run / "checkpoints/step_00000002").name == "step_00000002"


def test_latest_decides_when_it_names_a_whole_one(run):
    (run / "checkpoints/latest").write_text("step_00000002\n")
    assert find(run).name == "step_00000002"


def test_a_damaged_one_after_a_rewind_falls_back_to_its_own_past(run):
    """The run was pointed from 3 back to 1 and has saved 2 since: 3 is of the past that was left."""
    (run / "checkpoints/latest").write_text("step_00000002\n")
    (run / "checkpoints/step_00000002/plan.json").unlink()
    assert find(run).name == "step_00000001"
    (run / "checkpoints/step_00000001/plan.json").unlink()
    assert find(run).name == "step_00000003", "better than none"


@pytest.mark.parametrize("text", [None, "", "step_00000009", "../../elsewhere", "\x00\xff"])
def test_without_a_usable_latest_the_newest_is_taken(run, text):
    path = run / "checkpoints/latest"
    path.unlink() if text is None else path.write_text(text, encoding="latin-1")
    assert find(run).name == "step_00000003"


def test_other_names_are_ignored(run):
    for name in (".tmp_step_00000009", ".deleted_step_00000008", "step_7", "step_00000009.bak", "notes"):
        (run / "checkpoints" / name).mkdir()
    (run / "checkpoints/step_00000010").write_text("a file")
    assert find(run).name == "step_00000003"


@pytest.mark.parametrize("damage, reason", [
    (lambda folder: (folder / "checkpoint.json").unlink(), "No such file"),
    (lambda folder: (folder / "checkpoint.json").write_text('{"format": "megalm'), "not JSON"),
    (lambda folder: (folder / "checkpoint.json").write_text("[" * 100000), "not JSON"),
    (lambda folder: (folder / "checkpoint.json").write_text("{}"), "not a checkpoint of the format"),
    (lambda folder: set_manifest(folder, version=1), "format version 1; this megalm reads version 2"),
    (lambda folder: set_manifest(folder, counters=None), "'counters' is missing or not of the type dict"),
    (lambda folder: set_manifest(folder, step=True), "'step' is missing or not of the type int"),
    (lambda folder: (folder / "rank_00001.safetensors").unlink(), "rank_00001.safetensors is missing"),
    (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    (lambda folder: (folder / "rank_00000.safetensors").write_bytes(b"short"), r"rank_00000.safetensors has 5 bytes, not \d+"),
    (lambda folder: overwrite(folder / "rank_00000.json", b"\xff"), "not JSON"),
])
def test_a_torn_checkpoint_is_skipped_and_the_reason_named(run, last, damage, reason):
    damage(last)
    lines = []
    assert find(run, lines.append).name == "step_00000002"
    [line] = [line for line in lines if "latest" not in line]
    assert re.match(f"skipped step_00000003: .*{reason}", line), lines
    with pytest.raises(CheckpointError, match=reason if (last / "checkpoint.json").exists() else "no checkpoint here"):
        find(last)


def test_no_whole_one_is_an_error_with_every_reason(run):
    for step in (1, 2, 3):
        (run / f"checkpoints/step_0000000{step}/plan.json").unlink()
    reasons = "; ".join(f"skipped step_0000000{step}: plan.json is missing" for step in (3, 2, 1))
    with pytest.raises(CheckpointError, match=f"no whole checkpoint; {reasons}"):
        find(run)
    with pytest.raises(CheckpointError):
        newest(run / "checkpoints")


def test_nothing_there(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        find(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no checkpoint here: neither checkpoint.json nor checkpoints/step_"):
        find(tmp_path)
    assert newest(tmp_path / "checkpoints") is None


@pytest.mark.parametrize("name", ["../../../outside.json", "/etc/passwd", "..", "a/../../x", "", 7, "a\\..\\b", "x\0y"])
def test_file_names_may_not_lead_out(last, name):
    edit(last / "checkpoint.json", lambda content: content.update(files={**content["files"], str(name): {"bytes": 1}}))
    if isinstance(name, str):
        assert "isn't the name of a file inside the checkpoint" in fault(last)
    edit(last / "rank_00000.json", lambda content: content.update(file=name))
    edit(last / "checkpoint.json", lambda content: content["files"].pop(str(name)))
    fix_sizes(last)
    with pytest.raises(CheckpointError, match="rank_00000.json: not the index of a rank's file: .*isn't the name of a file"):
        read_weights(last)


def test_a_link_out_of_the_folder_isn_t_followed(last, tmp_path):
    target = tmp_path / "outside.safetensors"
    (last / "rank_00000.safetensors").rename(target)
    (last / "rank_00000.safetensors").symlink_to(target)
    assert "leads out of the checkpoint" in fault(last)


@pytest.mark.parametrize("change, reason", [
    (lambda entry: entry.update(count=10**15), "elements 0..1000000000000000 of a slab"),
    (lambda entry: entry.update(count=10**15, full_shape=[10**9, 10**6], high=10**9), "000 bytes from .* aren't in"),
    (lambda entry: entry.update(start=-1), "elements -1.."),
    (lambda entry: entry.update(low="0"), "a number isn't an integer"),
    (lambda entry: entry.update(low=True), "a number isn't an integer"),
    (lambda entry: entry.update(dim=5), "dim 5 of a tensor of 2 dims"),
    (lambda entry: entry.update(dtype="PICKLE"), "dtype 'PICKLE' is none of"),
    (lambda entry: entry.update(role="code"), "role 'code'"),
    (lambda entry: entry.update(part=["up"]), "part \\['up'\\]"),
    (lambda entry: entry.pop("start"), "KeyError: 'start'"),
    (lambda entry: entry.update(high=3), "elements 0..24 of a slab of 18"),
    (lambda entry: entry.update(count=23), "master of up: elements 23..24 are missing of 0..4"),
    (lambda entry: entry.update(offset=entry["offset"] + 1), "rank_00000.safetensors: master/up: bytes 0 to 96 aren't what was"),
    (lambda entry: entry.update(xxh3=[]), "0 hashes of 96 bytes"),
    (lambda entry: entry.update(xxh3=[7]), "1 hashes of 96 bytes"),
    (lambda entry: entry.update(key="exp_avg/down"), "'exp_avg/down' names master/up"),
    (lambda entry: entry.update(dtype="BF16"), "master/up: bytes 0 to 48 aren't what was written"),
])
def test_an_index_that_lies_is_caught(last, change, reason):
    edit(last / "rank_00000.json", lambda content: change(content["fragments"][0]))
    fix_sizes(last)
    with pytest.raises(CheckpointError, match=reason):
        read_weights(last)["up"]
    results = load_all(last, engines(PARTS, None, tp=2))
    assert all(isinstance(result, CheckpointError) for result in results)


@pytest.mark.parametrize("content", [b"", b"\x00" * 7, struct.pack("<Q", 1 << 60) + b"{}", struct.pack("<Q", 2) + b"{}",
                                     struct.pack("<Q", 40) + b"\x80\x04\x95" + b"c" * 37, b"PK\x03\x04" * 4])
def test_a_tensor_file_of_rubbish_is_an_error_on_every_rank(last, content):
    """Truncated, an absurd header length, no tensors, a pickle, a zip: no crash, no code run."""
    size = (last / "rank_00000.safetensors").stat().st_size
    (last / "rank_00000.safetensors").write_bytes(content.ljust(size, b"\0"))
    assert fault(last) is None, "of the right size: only reading tells"
    results = load_all(last, engines(PARTS, None, tp=2))
    assert all(isinstance(result, CheckpointError) and "rank_00000.safetensors" in str(result) for result in results)


def test_one_rank_s_trouble_stops_all_before_anything_is_refreshed(run, monkeypatch):
    ranks = engines(PARTS, None, tp=2)
    original = ranks[1].fragments

    def broken():
        raise RuntimeError("out of memory")

    ranks[1].fragments = broken
    results = Crew(2).run(lambda groups: load(run, ranks[groups.rank], groups))
    assert all("rank 1: RuntimeError: out of memory" in str(result) for result in results)
    assert ranks[0].refreshed is None
    ranks[1].fragments = original
    succeed(load_all(run, ranks))


def test_reading_the_weights_of_one_part_reads_no_other(tmp_path):
    """Lazily: a damaged file that the part isn't in doesn't matter."""
    folder = succeed(save_all(tmp_path, 1, engines(SMALL, draw(SMALL), pp=2)))[0]
    size = (folder / "rank_00001.safetensors").stat().st_size
    (folder / "rank_00001.safetensors").write_bytes(b"\0" * size)
    weights = read_weights(folder)
    assert torch.equal(weights["embedding.word.weight"], draw(SMALL)["embedding.word.weight", "master"])
    with pytest.raises(CheckpointError, match="rank_00001.safetensors"):
        weights["head.weight"]

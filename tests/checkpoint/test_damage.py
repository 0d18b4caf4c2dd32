"""Flipped bits, foreign files, hostile pickles: what is read is what was written, or an error; nothing in it is run."""
from __future__ import annotations

import contextlib
import errno
import os
import pickle
import random
import resource
import shutil
from collections import Counter
from pathlib import Path

import pytest

from megalm.checkpoint import CheckpointError, DamagedError, choose, fault, find, read_weights
from megalm.checkpoint.find import candidates
from megalm.checkpoint.format import parse_index
from megalm.checkpoint.load import Stored, fill
from megalm.checkpoint.sealed import UnreadableError
from megalm.tools.checkpoint import main
from megalm.tools.flip_checkpoints import trials
from tests.checkpoint.fakes import SMALL, draw, engines, save_all
from tests.checkpoint.test_layouts import load_all, succeed, wrong

TROUBLE = (errno.EMFILE, errno.EACCES, errno.ESTALE, errno.ENOMEM)


def test_any_flipped_bit_is_found_and_the_checkpoint_before_is_used(tmp_path):
    """A quick subset of `python -m megalm.tools.flip_checkpoints`, which flips any bit of any file."""
    assert trials(tmp_path, 120, seed=1) == []


def test_a_rank_reads_and_checks_its_own_blocks_only(tmp_path):
    """A bit that is wrong in one rank's rows of a large tensor doesn't trouble a rank that needs the others."""
    parts = {"up": ((4096, 512), 0)}  # 8 MiB a role; two blocks
    folder = succeed(save_all(tmp_path, 1, engines(parts, draw(parts, roles=("master",)), roles=("master",))))[0]
    content = bytearray((folder / "rank_00000.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "rank_00000.safetensors").write_bytes(content)
    first, second = (engine.held[0] for engine in engines(parts, None, tp=2, roles=("master",)))
    assert fill(first, Stored.open(folder)) == 4 << 20
    with pytest.raises(DamagedError, match=r"master/up: bytes 4,194,304 to 8,388,608 aren't what was written"):
        fill(second, Stored.open(folder))
    for result in load_all(folder, engines(parts, None, tp=2, roles=("master",))):
        assert isinstance(result, DamagedError) and "rank 1: damaged: rank_00000.safetensors" in str(result)


def test_a_shape_that_differs_is_no_damage(tmp_path):
    folder = succeed(save_all(tmp_path, 1, engines({"up": ((8, 4), 0)}, draw({"up": ((8, 4), 0)}))))[0]
    [result] = load_all(folder, engines({"up": ((16, 4), 0)}, None))
    assert type(result) is CheckpointError


@pytest.mark.parametrize("code, kind", [
    (errno.EIO, DamagedError), *((code, UnreadableError) for code in TROUBLE)])
@pytest.mark.parametrize("name", ["rank_00000.safetensors", "rank_00000.json"])
def test_what_this_machine_can_t_read_is_no_damage(name, code, kind, tmp_path, monkeypatch):
    """It would make a run go on from an earlier checkpoint, with a sound one there."""
    folder = succeed(save_all(tmp_path, 1, engines(SMALL, draw(SMALL))))[0]
    stored, opened, read = Stored.open(folder), os.open, Path.read_bytes

    def refuse(path, *rest):
        if Path(path).name == name:
            raise OSError(code, os.strerror(code), str(path))
        return (opened if rest else read)(path, *rest)

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(CheckpointError, match=os.strerror(code)) as caught:
        parse_index(folder, name) if name.endswith(".json") else fill(engines(SMALL, None)[0].held[0], stored)
    assert type(caught.value) is kind


@pytest.mark.parametrize("name", ["checkpoint.json", "rank_00000.json", "latest"])
@pytest.mark.parametrize("code", TROUBLE, ids=errno.errorcode.get)
def test_a_checkpoint_that_this_machine_can_t_read_is_not_passed_over(name, code, tmp_path, monkeypatch):
    """The one before would lose the steps since, with a sound one there; a broken disk is another matter."""
    for step in (1, 2):
        succeed(save_all(tmp_path, step, engines(SMALL, draw(SMALL))))
    read, codes = Path.read_bytes, [code]

    def refuse(path):
        if path.name == name and path.parent.name != "step_00000001":
            raise OSError(codes[0], os.strerror(codes[0]), str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    for attempt in (lambda: find(tmp_path), lambda: choose(tmp_path, "auto")):
        with pytest.raises(UnreadableError, match=f"{name} can't be read: {os.strerror(code)}"):
            attempt()
    codes[0] = errno.EIO
    assert find(tmp_path).name == ("step_00000002" if name == "latest" else "step_00000001")


@pytest.mark.parametrize("code", TROUBLE, ids=errno.errorcode.get)
def test_what_a_rank_can_t_read_isn_t_called_damaged_where_other_bytes_are(code, tmp_path, monkeypatch):
    """An earlier checkpoint helps against the one and not against the other."""
    folder = succeed(save_all(tmp_path, 1, engines(SMALL, draw(SMALL), tp=2)))[0]
    (folder / "rank_00001.safetensors").unlink()
    opened = os.open

    def refuse(path, *rest):
        if Path(path).name == "rank_00000.safetensors":
            raise OSError(code, os.strerror(code), str(path))
        return opened(path, *rest)

    monkeypatch.setattr(os, "open", refuse)
    for result in load_all(folder, engines(SMALL, None, tp=2)):
        assert type(result) is CheckpointError and os.strerror(code) in str(result) and "No such file" in str(result)


def test_a_checkpoint_of_many_ranks_takes_few_descriptors(tmp_path):
    """With fewer left than there are files."""
    values = draw(SMALL)
    folder = succeed(save_all(tmp_path, 1, engines(SMALL, values, tp=2, pp=2, dp=12)))[0]
    target = engines(SMALL, None)
    before, used = resource.getrlimit(resource.RLIMIT_NOFILE), len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 24, before[1]))
    try:
        succeed(load_all(folder, target))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert len(list(folder.glob("*.safetensors"))) == 48 and wrong(target, values) == []
    assert len(os.listdir("/proc/self/fd")) == used, "they are closed again"


def test_what_was_hashed_is_what_is_used(tmp_path, monkeypatch):
    """A file that changes, or a disk that answers otherwise, once a block was read has no part in what is loaded."""
    parts = {"up": ((4096, 384), 0), "down": ((384, 4096), 1)}  # 6 MiB a role: two blocks, the second one half
    values = draw(parts, roles=("master",))
    folder = succeed(save_all(tmp_path, 1, engines(parts, values, roles=("master",))))[0]
    preadv, seen = os.preadv, []

    def read(handle, buffers, offset):
        count = preadv(handle, buffers, offset)
        seen.append((offset, count))
        with open(folder / "rank_00000.safetensors", "r+b") as file:
            file.seek(offset)
            file.write(bytes(count))
        return count

    monkeypatch.setattr(os, "preadv", read)
    target = engines(parts, None, roles=("master",))
    succeed(load_all(folder, target))
    assert wrong(target, values) == [] and len(seen) == len(set(seen)) == 4


def test_a_short_answer_is_asked_again_and_a_short_file_is_damaged(tmp_path, monkeypatch):
    values = draw(SMALL)
    folder = succeed(save_all(tmp_path, 1, engines(SMALL, values)))[0]
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda handle, buffers, offset: preadv(handle, [buffers[0][:100]], offset))
    target = engines(SMALL, None)
    succeed(load_all(folder, target))
    assert wrong(target, values) == []
    os.truncate(folder / "rank_00000.safetensors", 9000)
    [result] = load_all(folder, engines(SMALL, None))
    assert type(result) is DamagedError and "ends beyond the file's 9,000 bytes" in str(result)


def test_each_index_is_read_once_by_all_ranks_together(tmp_path, monkeypatch):
    values, counts = draw(SMALL), Counter()
    folder = succeed(save_all(tmp_path, 1, engines(SMALL, values, tp=2, pp=2, dp=2)))[0]
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: (counts.update([path.name]), read(path))[1])
    for layout in (dict(tp=4, dp=2), dict(tp=3), dict(dp=12)):
        target = engines(SMALL, None, **layout)
        counts.clear()
        succeed(load_all(folder, target))
        assert counts == {"checkpoint.json": 1, **{f"rank_{rank:05d}.json": 1 for rank in range(8)}}
        assert wrong(target, values) == []


def test_an_index_of_another_save_is_found(tmp_path):
    """Sound in itself, and not what checkpoint.json says."""
    one, other = (succeed(save_all(tmp_path / name, 1, engines(SMALL, draw(SMALL, seed=seed))))[0]
                  for seed, name in enumerate(("one", "other")))
    shutil.copy(other / "rank_00000.json", one / "rank_00000.json")
    [result] = load_all(one, engines(SMALL, None))
    assert type(result) is DamagedError and "rank_00000.json isn't what was written: xxh3" in str(result)


class Hostile:
    """Unpickling it runs a command."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_a_hostile_pickle_is_inert(tmp_path, capsys):
    """Wherever it lies, under whatever name: no function that opens checkpoints, and no command, runs what it says."""
    marker, values = tmp_path / "it ran".replace(" ", "_"), draw(SMALL)
    bomb = pickle.dumps(Hostile(marker))
    folder = succeed(save_all(tmp_path / "run", 1, engines(SMALL, values)))[0]
    names = ["data.pkl", "mp_rank_00_model_states.pt", "pytorch_model.bin", "latest.pkl", "rank_00001.safetensors", "__init__.py",
             "checkpoint.pkl", *(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())]
    for name in names:
        before = (folder / name).read_bytes() if (folder / name).exists() else None
        (folder / name).write_bytes(bomb if before is None else bomb.ljust(len(before), b"\0"))
        for attempt in (lambda: find(folder), lambda: read_weights(folder)["head.weight"],
                        lambda: succeed(load_all(folder, engines(SMALL, None)))):
            with contextlib.suppress(CheckpointError):
                attempt()
        for command in (["inspect", str(folder)], ["verify", str(folder)], ["diff", str(folder), str(folder)]):
            assert main(command) in (0, 1, 2)
        assert not marker.exists(), name
        if before is not None:
            (folder / name).write_bytes(before)
    (folder.parent / "latest").write_bytes(bomb)
    assert find(tmp_path / "run") == folder and not marker.exists() and len(candidates(folder.parent)) == 1
    capsys.readouterr()
    pickle.loads(bomb)
    assert marker.exists(), "the bomb would have worked"


def test_files_that_say_nothing_true_end_in_an_error_of_ours(tmp_path):
    """Random bytes in place of each file."""
    noise = random.Random(0)
    folder = succeed(save_all(tmp_path, 1, engines(SMALL, draw(SMALL), tp=2)))[0]
    for path in sorted(folder.iterdir()):
        before = path.read_bytes()
        for size in (len(before), 0, 3, 5000):
            path.write_bytes(noise.randbytes(size))
            with pytest.raises(CheckpointError):
                for part in SMALL:
                    read_weights(folder)[part]
            assert size == len(before) and path.suffix == ".safetensors" or fault(folder) is not None
        path.write_bytes(before)
    assert fault(folder) is None

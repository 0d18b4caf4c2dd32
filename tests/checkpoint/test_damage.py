"""Flipped bits, foreign files, hostile pickles: what is read is what was written, or an error; nothing in it is run."""
from __future__ import annotations

import contextlib
import errno
import os
import pickle
import random
import sys
from pathlib import Path

import pytest

from megalm.checkpoint import CheckpointError, DamagedError, fault, find, read_weights
from megalm.checkpoint.find import candidates
from megalm.checkpoint.format import parse_index
from megalm.checkpoint.load import Stored, fill
from megalm.tools.checkpoint import main
from megalm.tools.flip_checkpoints import trials
from tests.checkpoint.fakes import SMALL, draw, engines, save_all
from tests.checkpoint.test_layouts import load_all, succeed, wrong


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
    (errno.EIO, DamagedError), *((code, CheckpointError) for code in (errno.EMFILE, errno.EACCES, errno.ESTALE, errno.ENOMEM))])
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


def test_a_checkpoint_of_many_ranks_takes_few_descriptors(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[Stored.__module__], "OPEN_FILES", 3)
    values = draw(SMALL)
    folder = succeed(save_all(tmp_path, 1, engines(SMALL, values, tp=2, dp=4)))[0]
    stored, [target] = Stored.open(folder), engines(SMALL, None)
    before, most = len(os.listdir("/proc/self/fd")), 0
    for fragment in target.held:
        fill(fragment, stored)
        most = max(most, len(os.listdir("/proc/self/fd")) - before)
    assert 0 < most <= 6 and wrong([target], values) == []


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

"""Checkpoints written a few rows at a time are like any other: sound by every hash, whole or not there."""
from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from megalm.checkpoint import CheckpointError, read_weights, sealed, stream
from megalm.checkpoint.disk import Disk
from megalm.tools.checkpoint import main
from tests.checkpoint.fakes import Hasty


class Held:
    """Weights in memory."""

    def __init__(self, parts: dict[str, torch.Tensor]):
        self.parts = parts

    def shape(self, part: str) -> tuple[int, ...]:
        return tuple(self.parts[part].shape)

    def dtype(self, part: str) -> torch.dtype:
        return self.parts[part].dtype

    def rows(self, part: str, low: int, high: int) -> torch.Tensor:
        return self.parts[part][low:high]

    def release(self) -> None:
        return

    def __iter__(self):
        return iter(self.parts)


PARTS = {"embedding.word.weight": torch.randn(50, 12), "layers.0.mlp.up.weight": torch.randn(7, 12).bfloat16(),
         "layers.0.mlp.up.bias": torch.randn(7, dtype=torch.float64), "final_norm.weight": torch.randn(1).half()}
DOCUMENTS = {"config.json": {}, "plan.json": {}}


@pytest.mark.parametrize("seed", range(5))
def test_stretches_of_any_length_become_blocks(seed):
    pick = random.Random(seed)
    content = pick.randbytes(1000)
    cuts = sorted(pick.choices(range(1001), k=pick.randint(0, 40)))
    stretches = (memoryview(content[a:b]) for a, b in zip([0, *cuts], [*cuts, 1000], strict=True))
    size = pick.randint(1, 300)
    expected = [bytes(block) for block in sealed.blocks(memoryview(content), size)]
    assert [bytes(block) for block in sealed.blocks_of_stream(stretches, size)] == expected


def test_what_is_written_is_sound_and_of_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "BLOCK_BYTES", 200)
    monkeypatch.setattr(stream.groups_by_size, "__defaults__", (600,))
    stream.write_weights(tmp_path / "new", Held(PARTS), DOCUMENTS, {"more/file": Path(__file__)}, disk=Hasty())
    assert len(list((tmp_path / "new").glob("*.safetensors"))) == 2
    assert main(["verify", str(tmp_path / "new")]) == 0
    found = read_weights(tmp_path / "new")
    assert set(found) == set(PARTS)
    assert all(found[part].dtype == tensor.dtype and torch.equal(found[part], tensor) for part, tensor in PARTS.items())


class Failing(Disk):
    """Fails at its n-th operation."""

    def __init__(self, at: int):
        self.left = at

    def _count(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise OSError(28, "No space left on device")

    def append(self, handle, chunk):
        self._count()
        return super().append(handle, chunk)

    def rename(self, source, target):
        self._count()
        super().rename(source, target)

    def sync(self, handle):
        return


def test_an_error_anywhere_leaves_nothing(tmp_path):
    done = False
    for at in range(1, 100):
        try:
            stream.write_weights(tmp_path / "new", Held(PARTS), DOCUMENTS, {}, disk=Failing(at))
            done = True
            break
        except OSError:
            assert list(tmp_path.iterdir()) == []
    assert done and at > 8
    with pytest.raises(CheckpointError, match="new is there already"):
        stream.write_weights(tmp_path / "new", Held(PARTS), DOCUMENTS, {})

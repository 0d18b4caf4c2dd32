"""Flip one bit of a checkpoint at a time: it is found when the bytes are read, and the checkpoint before is used.

    python -m megalm.tools.flip_checkpoints [--trials 2000 --seed 0]

Each trial flips a random bit of the newest of two checkpoints (or of `latest`), chosen evenly over files so that small ones
have their share, and loads the run under another layout than it was saved in. What is loaded must be one of the two
checkpoints, bit for bit; it may be the newer one only if the bit isn't among the bytes that were read.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from megalm.checkpoint import CheckpointError, DamagedError, Fragment, load, newest, save
from megalm.checkpoint.disk import Disk
from megalm.checkpoint.format import CHECKPOINTS
from megalm.tools._command import Parser, positive, run

SHAPES = {"embedding.word.weight": (40, 16), "layers.0.mlp.up.weight": (24, 16), "final_norm.weight": (16,)}
ROLES = ("master", "exp_avg", "exp_avg_sq")


@dataclass
class OneRank:
    """The process groups of a job of one rank."""

    rank: int = 0
    world_size: int = 1

    def agree(self, problem: str | None) -> list[tuple[int, str]]:
        return [(0, problem)] if problem else []

    def broadcast(self, value: Any) -> Any:
        return value


class Hasty(Disk):
    """Doesn't wait for the disk."""

    def sync(self, handle: int) -> None:
        return


@dataclass
class Held:
    """As much of an engine as a checkpoint needs: these values, cut into `pieces`."""

    values: dict[tuple[str, str], torch.Tensor]
    pieces: int = 1
    step: int | None = 1
    held: list[Fragment] = field(default_factory=list)

    def __post_init__(self) -> None:
        for (part, role), full in self.values.items():
            flat, count = full.view(-1), full.numel()
            for piece in range(self.pieces):
                start, stop = count * piece // self.pieces, count * (piece + 1) // self.pieces
                at = None if role == "master" else self.step
                fragment = Fragment(part, role, tuple(full.shape), None, 0, full.shape[0], start, flat[start:stop], step=at)
                self.held.append(fragment)

    def fragments(self) -> list[Fragment]:
        return self.held

    def counters(self) -> dict[str, Any]:
        return {"optimizer_step": self.step}

    def refresh(self, counters: dict[str, Any]) -> None:
        self.step = counters["optimizer_step"]


def values(seed: int) -> dict[tuple[str, str], torch.Tensor]:
    """Every part in every role."""
    generator = torch.Generator().manual_seed(seed)
    return {(part, role): torch.randn(shape, generator=generator) for part, shape in SHAPES.items() for role in ROLES}


def store(folder: Path, step: int, held: Held, disk: Disk | None = None, keep: int = 3) -> None:
    """Save with one rank."""
    rule = SimpleNamespace(keep=keep, keep_every=0, keep_best=0)
    config = SimpleNamespace(checkpoint=rule, model_dump=lambda mode: {"model": {"hidden_size": 16}})
    numbers = {"tp": 1, "pp": 1, "dp": 1, "zero_stage": 1, "sequence_parallel": False, "padded_vocab_size": 40}
    plan = SimpleNamespace(**numbers, to_dict=lambda: numbers)
    save(folder, step, 8 * step, held, OneRank(), config, plan, disk=disk or Hasty())


def resume(folder: Path) -> tuple[Held, list[str]]:
    """What a run in `folder` goes on from, in another layout, and what it says of those it skips. Raises CheckpointError."""
    target = Held({key: torch.full(tensor.shape, torch.nan) for key, tensor in values(0).items()}, pieces=3)
    damaged: list[Path] = []
    lines: list[str] = []
    while True:
        path = newest(folder / CHECKPOINTS, lines.append, damaged)
        if path is None:
            raise CheckpointError(f"{folder}: nothing to resume from")
        try:
            load(path, target, OneRank())
            return target, lines
        except DamagedError as error:
            damaged.append(path)
            lines.append(f"skipped {path.name}: {error}")


def same(one: Held, other: Held) -> bool:
    """Bit for bit, and at the same step."""
    bits = [held.values[key].view(torch.int32) for held in (one, other) for key in one.values]
    half = len(bits) // 2
    return one.step == other.step and all(torch.equal(a, b) for a, b in zip(bits[:half], bits[half:], strict=True))


def trials(folder: Path, count: int, seed: int = 0) -> list[str]:
    """Flip `count` bits, one at a time; returns a line for each that had a consequence that it may not have."""
    chance, run_folder = random.Random(seed), folder / "run"
    old, new = Held(values(1), step=1), Held(values(2), step=2)
    for held in (old, new):
        store(run_folder, held.step or 0, held)
    newer = run_folder / CHECKPOINTS / "step_00000002"
    files = [*sorted(path for path in newer.iterdir() if path.is_file()), newer.parent / "latest"]
    wrong = []
    for _ in range(count):
        path = chance.choice(files)
        before = path.read_bytes()
        bit = chance.randrange(8 * len(before))
        flipped = bytearray(before)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        problem = _consequence(run_folder, path, old, new, bit // 8 >= _header(before))
        if problem:
            wrong.append(f"bit {bit} of {path.name}: {problem}")
        path.write_bytes(before)
    return wrong


def _header(content: bytes) -> int:
    """The bytes of a safetensors file that megalm doesn't read: its indices say where the tensors are."""
    return 8 + int.from_bytes(content[:8], "little")


def _consequence(folder: Path, path: Path, old: Held, new: Held, in_tensors: bool) -> str | None:
    try:
        found, lines = resume(folder)
    except CheckpointError as error:
        return f"nothing was loaded: {error}"
    if path.name == "latest" or (path.suffix == ".safetensors" and not in_tensors):
        return None if same(found, new) else "the newer checkpoint, which is sound, wasn't used"
    if not same(found, old):
        return "not found" if same(found, new) else "something was loaded that nobody saved"
    return None if any(line.startswith(f"skipped {path.parent.name}: ") for line in lines) else "skipped without a word"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the trials; 1 when a flipped bit had a consequence that it may not have."""
    parser = Parser(prog="flip_checkpoints", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=positive, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    return run(parser, _work, argv)


def _work(arguments: argparse.Namespace) -> int:
    folder = Path(tempfile.mkdtemp(prefix="megalm-flips-"))
    try:
        wrong = trials(folder, arguments.trials, arguments.seed)
    finally:
        shutil.rmtree(folder)
    for line in wrong:
        print(line)
    print(f"{arguments.trials:,} bits flipped: {len(wrong)} not found or with a wrong consequence")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

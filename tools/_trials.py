"""Checkpoints of a job of one rank that trains nothing, for the programs that damage them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from megalm.checkpoint import CheckpointError, DamagedError, Fragment, Saver, load, newest
from megalm.checkpoint.disk import Disk
from megalm.checkpoint.format import CHECKPOINTS

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

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def highest(self, *values: int) -> list[int]:
        return list(values)


class Hasty(Disk):
    """Doesn't wait for the disk."""

    def sync(self, handle: int) -> None:
        return


@dataclass
class Held:
    """As much of an engine as a checkpoint needs: these values, cut into `pieces`."""

    values: dict[tuple[str, str], torch.Tensor]
    pieces: int = 1
    step: int = 1
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


def saver(folder: Path, held: Held, disk: Disk | None = None, keep: int = 3) -> Saver:
    """What saves `held` into the run's folder."""
    rule = SimpleNamespace(keep=keep, keep_every=0, keep_best=0, remote=None, max_failures=1)
    config = SimpleNamespace(checkpoint=rule, model_dump=lambda mode: {"model": {"hidden_size": 16}})
    numbers = {"tp": 1, "pp": 1, "dp": 1, "zero_stage": 1, "sequence_parallel": False, "padded_vocab_size": 40}
    plan = SimpleNamespace(**numbers, to_dict=lambda: numbers)
    return Saver(folder, held, OneRank(), config, plan, disk=disk or Hasty())


def store(folder: Path, held: Held, disk: Disk | None = None, keep: int = 3) -> None:
    """Save `held` at its step, and wait until it is on the disk."""
    with saver(folder, held, disk, keep) as saves:
        saves.save(held.step, 8 * held.step)
        saves.finish()


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

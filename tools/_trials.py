"""Checkpoints of a job that trains nothing, for the programs that damage them: its state, its ranks, and what it resumes from."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from megalm.checkpoint import CheckpointError, DamagedError, Fragment, Saver, load, newest
from megalm.checkpoint.disk import Disk
from megalm.checkpoint.find import Report
from megalm.checkpoint.format import CHECKPOINTS
from megalm.checkpoint.save import Ranks
from megalm.tools._command import Parser, positive, run
from megalm.tools._crew import Crew

SHAPES = {"embedding.word.weight": (40, 16), "layers.0.mlp.up.weight": (24, 16), "final_norm.weight": (16,)}
ROLES = ("master", "exp_avg", "exp_avg_sq")
Values = dict[tuple[str, str], torch.Tensor]


class Hasty(Disk):
    """Doesn't wait for the disk."""

    def sync(self, handle: int) -> None:
        return


@dataclass
class Share:
    """As much of an engine as a checkpoint needs: one rank's part of a state."""

    held: list[Fragment] = field(default_factory=list)
    step: int = 0

    def fragments(self) -> list[Fragment]:
        return self.held

    def counters(self) -> dict[str, Any]:
        return {"optimizer_step": self.step}

    def refresh(self, counters: dict[str, Any]) -> None:
        self.step = counters["optimizer_step"]


@dataclass(frozen=True)
class State:
    """Of a whole job, after a step."""

    values: Values
    step: int

    def shares(self, ranks: int) -> list[Share]:
        """Views of it: every tensor cut evenly, in the order of the ranks."""
        found = [Share(step=self.step) for _ in range(ranks)]
        for (part, role), full in self.values.items():
            shape, count, at = tuple(full.shape), full.numel(), None if role == "master" else self.step
            for rank, share in enumerate(found):
                start, stop = count * rank // ranks, count * (rank + 1) // ranks
                share.held.append(Fragment(part, role, shape, None, 0, shape[0], start, full.view(-1)[start:stop], step=at))
        return found


def state(step: int, seed: int | None = None) -> State:
    """Every part in every role, drawn from the seed (default: the step)."""
    generator = torch.Generator().manual_seed(step if seed is None else seed)
    keys = [(part, role) for part in SHAPES for role in ROLES]
    return State({key: torch.randn(SHAPES[key[0]], generator=generator) for key in keys}, step)


def same(one: State, other: State) -> bool:
    """Bit for bit, and at the same step."""
    return one.step == other.step and all(torch.equal(tensor.view(torch.int32), other.values[key].view(torch.int32))
                                          for key, tensor in one.values.items())


def saver(folder: Path, share: Share, groups: Ranks, disk: Disk | None = None, *, keep: int = 3, max_failures: int = 1,
          report: Report | None = None) -> Saver:
    """What saves one rank's share into the run's folder."""
    rule = SimpleNamespace(keep=keep, keep_every=0, keep_best=0, remote=None, max_failures=max_failures)
    config = SimpleNamespace(checkpoint=rule, model_dump=lambda mode: {"model": {"hidden_size": 16}})
    numbers = {"tp": 1, "pp": 1, "dp": groups.world_size, "zero_stage": 1, "sequence_parallel": False, "padded_vocab_size": 40}
    plan = SimpleNamespace(**numbers, to_dict=lambda: numbers)
    return Saver(folder, share, groups, config, plan, disk=disk or Hasty(), report=report)


def save_all(folder: Path, held: State, crew: Crew, disks: Sequence[Disk] = (), keep: int = 3) -> list[BaseException | None]:
    """Save the state with all ranks of the crew, and wait until it is on the disk; how each rank ended."""
    shares = held.shares(crew.world_size)

    def work(groups: Ranks) -> None:
        with saver(folder, shares[groups.rank], groups, disks[groups.rank] if disks else None, keep=keep) as saves:
            saves.save(held.step, 8 * held.step)
            saves.finish()

    return crew.run(work)


def store(folder: Path, held: State, ranks: int = 1) -> None:
    """The same, where nothing is to go wrong."""
    for problem in save_all(folder, held, Crew(ranks)):
        if problem is not None:
            raise problem


def resume(folder: Path, ranks: int = 1) -> tuple[State, list[str]]:
    """What a run of so many ranks goes on from, and what it says of those it skips. Raises CheckpointError."""
    damaged: list[Path] = []
    lines: list[str] = []
    while True:
        path = newest(folder / CHECKPOINTS, lines.append, damaged)
        if path is None:
            raise CheckpointError(f"{folder}: nothing to resume from")
        target = State({key: torch.full(tensor.shape, torch.nan) for key, tensor in state(0).values.items()}, 0)
        shares = target.shares(ranks)
        ends = Crew(ranks).run(lambda groups, path=path, shares=shares: load(path, shares[groups.rank], groups))
        if all(isinstance(end, DamagedError) for end in ends):
            damaged.append(path)
            lines.append(f"skipped {path.name}: {ends[0]}")
            continue
        for end in ends:
            if isinstance(end, BaseException):
                raise end
        [step] = {share.step for share in shares}
        return State(target.values, step), lines


def program(name: str, description: str | None, work: Callable[[Path, argparse.Namespace], tuple[list[str], list[str]]],
            argv: Sequence[str] | None, more: Callable[[Parser], object] = lambda parser: None) -> int:
    """The command line of a program of trials: `work(empty folder, arguments)` returns what went wrong and what to say at the
    end. The exit code: 1 when anything went wrong."""
    parser = Parser(prog=name, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=positive, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    more(parser)

    def all_of_it(arguments: argparse.Namespace) -> int:
        folder = Path(tempfile.mkdtemp(prefix=f"megalm-{name}-"))
        try:
            wrong, told = work(folder, arguments)
        finally:
            shutil.rmtree(folder)
        for line in (*wrong, *told):
            print(line)
        return 1 if wrong else 0

    return run(parser, all_of_it, argv)

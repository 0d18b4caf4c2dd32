"""What a checkpoint costs the training: stalls beside those of others, and steps with and without one, in one run.

    python -m megalm.tools.bench_checkpoint [--megabytes 100 --rounds 15 --steps 16 --out FILE]

The state is that of a real engine: one rank, fp32, ZeRO 1, AdamW, on the CPU. Every round takes each way of saving once, in
turn: the seconds until the training could go on, the least of all rounds, as what disturbs only adds; the unit is one copy of
the same bytes in memory, the least too. As other work on the machine disturbs even that, the same of the rank's processor time
alone; what is asked of megalm's stall, which is work and no waiting, is measured so. Then steps of two seconds of matrix
products on one core, every other one with a checkpoint whose writer has the other core.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from megalm.checkpoint import Saver
from megalm.config import Config, load
from megalm.engine.engine import Engine, build
from megalm.model import layers
from megalm.parallel.groups import Groups, start
from megalm.parallel.random import StepContext
from megalm.parallel.world import join
from megalm.plan import Plan, make_plan
from megalm.tools._command import Parser, positive, run

COPY = "memory copy"
OURS, OURS_WAITING = "megalm, async", "megalm, waiting"
BYTES_A_PARAMETER = 12  # fp32 master and two moments
WIDTH = 512
LAYER = 12 * WIDTH**2  # parameters of a layer, nearly
MATRIX, STEP_SECONDS = 1024, 2.0
ALLOWED = {"stall": 1.3, "interference": 0.03}


def engine(folder: Path, megabytes: int) -> tuple[Config, Plan, Groups, Engine]:
    """An engine whose fp32 masters and moments take about so many megabytes."""
    count = max(1, round((megabytes * 1e6 / BYTES_A_PARAMETER - 448 * WIDTH) / LAYER))
    content = {
        "model": {"num_layers": count, "hidden_size": WIDTH, "num_attention_heads": 4, "seq_length": 64},
        "batch": {"micro": 1, "global": 1}, "precision": {"dtype": "fp32"}, "optimizer": {"lr": 1e-3},
        "parallel": {"dp": 1}, "tokenizer": {"type": "bytes"}, "data": {"train": [{"path": "none"}]},
        "train": {"dir": str(folder / "run"), "steps": 1}, "checkpoint": {"every": 1, "keep": 1}}
    (folder / "config.json").write_text(json.dumps(content))
    config = load(str(folder / "config.json"))
    plan = make_plan(config, 1, 257)
    join(folder / "store", 0, 1)
    groups = start(plan, torch.device("cpu"))
    context = StepContext(config.train.seed)
    made = build(config, plan, groups, context, layers(config, plan, groups.tp, context, groups.device))
    return config, plan, groups, made


class Ways:
    """Each way of saving as a function of a fresh folder: returns once the training could go on. `settle` waits for the rest."""

    def __init__(self, folder: Path, megabytes: int) -> None:
        self.folder = folder
        config, plan, groups, self.engine = engine(folder, megabytes)
        held = self.engine.fragments()
        self.state = {f"{fragment.role}/{fragment.part}/{number}": fragment.tensor for number, fragment in enumerate(held)}
        self.bytes = sum(tensor.numel() * tensor.element_size() for tensor in self.state.values())
        self._copies = {name: torch.zeros_like(tensor) for name, tensor in self.state.items()}
        self.saver = Saver(folder / "background", self.engine, groups, config, plan)
        self.saver.write_in_background(torch.device("cpu"))
        self._waiting = Saver(folder / "waiting", self.engine, groups, config, plan)
        self._step, self._future = 0, None
        self.all: dict[str, Callable[[Path], object]] = {
            COPY: self._copy, OURS: self._ours, OURS_WAITING: self._ours_waiting,
            "torch.save": lambda target: torch.save(self.state, target / "state.pt"),
            "torch.distributed.checkpoint": lambda target: dcp.save(self.state, checkpoint_id=target),
            "the same, async_save": self._dcp_async,
            "DeepSpeed's save_checkpoint": lambda target: self.engine.deepspeed.save_checkpoint(str(target)),
        }

    def _copy(self, target: Path) -> None:
        for name, tensor in self.state.items():
            self._copies[name].copy_(tensor)

    def _ours(self, target: Path) -> None:
        self._step += 1
        self.saver.save(self._step, self._step)

    def _ours_waiting(self, target: Path) -> None:
        self._step += 1
        self._waiting.save(self._step, self._step)
        self._waiting.finish()

    def _dcp_async(self, target: Path) -> None:
        self._future = dcp.async_save(self.state, checkpoint_id=target)

    def settle(self) -> None:
        """Until nothing is written any more, so that the next way has the disk to itself."""
        self.saver.finish()
        if self._future is not None:
            self._future.result()
        self._future = None
        os.sync()

    def close(self) -> None:
        self.saver.close()
        self._waiting.close()
        dist.destroy_process_group()


def stalls(ways: Ways, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds of each way in each round, by the clock and of the processor; the first, which touches all memory, is dropped."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways.all}
    for number in range(rounds + 1):
        for name, way in ways.all.items():
            target = ways.folder / "other"
            target.mkdir()
            begin, processor = time.perf_counter(), time.thread_time()
            way(target)
            seconds = time.perf_counter() - begin, time.thread_time() - processor
            ways.settle()
            shutil.rmtree(target)
            if number:
                found[name].append(seconds)
    return found


def interference(ways: Ways, steps: int) -> dict[str, float]:
    """What a checkpoint at every step adds to steps of two seconds, as a share of a step: seconds of the clock, and of this
    rank's processor, which other work on the machine disturbs less. Even steps save, odd ones don't."""
    one, *others = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {one})
    if others and ways.saver.writer_pid:
        os.sched_setaffinity(ways.saver.writer_pid, {others[0]})
    left = torch.randn(MATRIX, MATRIX)
    count = _products(left)
    found: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for step in range(steps):
        saves = step % 2 == 0
        clock, processor = time.perf_counter(), time.process_time()
        if saves:
            ways._ours(ways.folder)
        for _ in range(count):
            torch.mm(left, left)
        ways.saver.progress(ways.saver.state)
        found[saves].append((time.perf_counter() - clock, time.process_time() - processor))
        ways.saver.finish()
    paired = [[(a[side] - b[side]) / b[side] for a, b in zip(found[True], found[False], strict=True)] for side in (0, 1)]
    return {"clock": median(paired[0]), "processor": median(paired[1]), "step_seconds": median(c for c, _ in found[False])}


def _products(left: torch.Tensor) -> int:
    """How many products take about STEP_SECONDS."""
    begin, count = time.process_time(), 0
    while time.process_time() - begin < STEP_SECONDS:
        torch.mm(left, left)
        count += 1
    return count


def measure(megabytes: int, rounds: int, steps: int) -> dict[str, Any]:
    """Everything that was found, as JSON."""
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="megalm-bench-"))
    try:
        ways = Ways(folder, megabytes)
        try:
            found = stalls(ways, rounds)
            cost = interference(ways, steps - steps % 2)
        finally:
            ways.close()
    finally:
        shutil.rmtree(folder)
    clock, processor = ({name: min(time[side] for time in times) for name, times in found.items()} for side in (0, 1))
    ratios = {name: seconds / clock[COPY] for name, seconds in clock.items()}
    work = {name: seconds / processor[COPY] for name, seconds in processor.items()}
    met = {"stall": work[OURS] <= ALLOWED["stall"], "interference": cost["processor"] <= ALLOWED["interference"]}
    return {"bytes": ways.bytes, "rounds": rounds, "seconds": clock, "copies": ratios, "processor_copies": work,
            "interference": cost, "allowed": ALLOWED, "met": met}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if what is asked was met, else 1."""
    parser = Parser(prog="bench_checkpoint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=positive, default=100)
    parser.add_argument("--rounds", type=positive, default=15)
    parser.add_argument("--steps", type=positive, default=16)
    parser.add_argument("--out", type=Path)
    return run(parser, _work, argv)


def _work(arguments: argparse.Namespace) -> int:
    found = measure(arguments.megabytes, arguments.rounds, max(arguments.steps, 2))
    print(f"{found['bytes'] / 1e6:.0f} MB of state; until the training could go on, the least of {found['rounds']} rounds:")
    for name, seconds in found["seconds"].items():
        print(f"  {name:<30} {1000 * seconds:>9.1f} ms  {found['copies'][name]:>7.2f} memory copies, "
              f"{found['processor_copies'][name]:>6.2f} of the processor's time")
    cost = found["interference"]
    print(f"a checkpoint at every step of {cost['step_seconds']:.2f} s: {cost['processor']:+.2%} of the rank's processor, "
          f"{cost['clock']:+.2%} by the clock")
    print("; ".join(f"{name} at most {ALLOWED[name]}: {'met' if met else 'NOT MET'}" for name, met in found["met"].items()))
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if all(found["met"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())

"""What it takes to load a checkpoint, beside others: seconds until the state of an engine is back, in one run.

    python -m megalm.tools.bench_load [--megabytes 300 --rounds 7]

The state is that of bench_checkpoint: one rank, fp32, AdamW, on the CPU. Every round takes each way once, in turn; of each,
the least of all rounds counts, in units of one copy of the same bytes in memory. The files are in the system's cache: what is
measured is the work, not the disk. megalm checks every byte against its hash, the others check nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from megalm.checkpoint import load, save
from megalm.tools._command import Parser, positive, run
from megalm.tools.bench_checkpoint import COPY, engine


class Ways:
    """Each way of loading the same state, as a function."""

    def __init__(self, folder: Path, megabytes: int) -> None:
        config, plan, groups, made = engine(folder, megabytes)
        held = made.fragments()
        self.state = {f"{fragment.role}/{fragment.part}/{number}": fragment.tensor for number, fragment in enumerate(held)}
        self.bytes = sum(tensor.numel() * tensor.element_size() for tensor in self.state.values())
        self._copies = {name: tensor.clone() for name, tensor in self.state.items()}
        path = save(folder / "run", 1, 1, made, groups, config, plan)
        torch.save(self.state, folder / "state.pt")
        dcp.save(self.state, checkpoint_id=folder / "dcp")
        self.all: dict[str, Callable[[], object]] = {
            COPY: lambda: self._take(self._copies),
            "megalm": lambda: load(path, made, groups),
            "torch.load": lambda: self._take(torch.load(folder / "state.pt", weights_only=True)),
            "torch.load, mapped": lambda: self._take(torch.load(folder / "state.pt", weights_only=True, mmap=True)),
            "torch.distributed.checkpoint": lambda: dcp.load(self.state, checkpoint_id=folder / "dcp"),
        }

    def _take(self, source: dict[str, torch.Tensor]) -> None:
        for name, tensor in self.state.items():
            tensor.copy_(source[name])


def measure(megabytes: int, rounds: int) -> dict[str, object]:
    """{"bytes": of the state, "seconds": {way: the least of all rounds}}."""
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="megalm-bench-"))
    try:
        ways = Ways(folder, megabytes)
        found: dict[str, list[float]] = {name: [] for name in ways.all}
        for _ in range(rounds):
            for name, way in ways.all.items():
                begin = time.perf_counter()
                way()
                found[name].append(time.perf_counter() - begin)
        return {"bytes": ways.bytes, "seconds": {name: min(seconds) for name, seconds in found.items()}}
    finally:
        shutil.rmtree(folder)
        if dist.is_initialized():
            dist.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns 0."""
    parser = Parser(prog="bench_load", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=positive, default=300)
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--out", type=Path)
    return run(parser, _work, argv)


def _work(arguments: argparse.Namespace) -> int:
    found = measure(arguments.megabytes, arguments.rounds)
    print(f"{found['bytes'] / 1e6:.0f} MB of state; until it is back, the least of {arguments.rounds} rounds:")
    for name, seconds in found["seconds"].items():
        print(f"  {name:<30} {1000 * seconds:>9.1f} ms  {seconds / found['seconds'][COPY]:>7.2f} memory copies, "
              f"{found['bytes'] / 1e9 / seconds:>6.2f} GB/s")
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

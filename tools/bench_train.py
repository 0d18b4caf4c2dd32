"""Training throughput of megalm against its peers, side by side: ratios of interleaved pairs, with an interval.

    python -m megalm.tools.bench_train                        # every case, 60 pairs each: about an hour
    python -m megalm.tools.bench_train --cases plain-fp32 --pairs 20
    python -m megalm.tools.bench_train --list

A pair is one turn of megalm and one of the peer, whose order alternates; its ratio is megalm's tokens a second over the
peer's. What disturbs the machine for longer than a turn disturbs both, so the median of the ratios is steadier than
either speed. The interval is the 95% bootstrap interval of that median.
"""
from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megalm.engine.warm import warm
from megalm.tools._command import Parser, run
from megalm.tools.bench_peers import Size, Spec, make
from megalm.tools.bench_ranks import Contender, Turn

DRAWS, LEVEL = 10_000, 0.95


@dataclass(frozen=True)
class Case:
    """What races against what, and what is asked: the least median, and the least upper end of the interval."""

    ours: Spec
    peer: Spec
    median: float | None = None
    upper: float | None = None


def _against(kind: str, median: float, upper: float | None) -> dict[str, Case]:
    """One rank against a single-process peer, in both precisions, eager and compiled."""
    variants = [(dtype, compiled) for compiled in (False, True) for dtype in ("fp32", "bf16")]
    return {f"{kind}-{dtype}{'-compile' * compiled}":
            Case(Spec("megalm", dtype, compiled), Spec(kind, dtype, compiled), median, upper) for dtype, compiled in variants}


ONE = Spec("megalm")
PP2, DP2 = Spec("megalm", pp=2, micro=2), Spec("megalm", dp=2)
CASES = {
    **_against("plain", 0.94, 0.97),
    **_against("transformers", 1.0, None),
    "tp2": Case(Spec("megalm", tp=2), ONE),
    "tp2-sp": Case(Spec("megalm", tp=2, sp=True), ONE),
    "pp2": Case(PP2, ONE),
    "dp2": Case(DP2, ONE),
    "deepspeed-pp2": Case(PP2, Spec("deepspeed", pp=2, micro=2), 1.0),
    "deepspeed-dp2": Case(DP2, Spec("deepspeed", dp=2), 1.0),
}


def interval(ratios: Sequence[float], draws: int = DRAWS, level: float = LEVEL, seed: int = 0) -> tuple[float, float, float]:
    """(median, low, high): the bootstrap percentile interval of the median (Efron and Tibshirani, 1993, chapter 13)."""
    if not ratios:
        raise ValueError("no pair was measured")
    values = np.asarray(ratios)
    drawn = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    medians = np.median(values[drawn], axis=1)
    low, high = np.quantile(medians, [(1 - level) / 2, (1 + level) / 2])
    return float(np.median(values)), float(low), float(high)


def pair_ratios(pairs: Sequence[tuple[Turn, Turn]]) -> list[float]:
    """(ours, peer) turns of equally many tokens -> speed of ours over the peer's."""
    return [peer.seconds / ours.seconds for ours, peer in pairs]


def race(ours: Contender, peer: Contender, pairs: int, warmup: int, steps: int) -> list[tuple[Turn, Turn]]:
    """`pairs` pairs of turns of `steps` steps each, after `warmup` pairs that are dropped; who goes first alternates."""
    found = []
    for index in range(warmup + pairs):
        order = (ours, peer) if index % 2 == 0 else (peer, ours)
        turns = {contender: contender.turn(steps) for contender in order}
        found.append((turns[ours], turns[peer]))
    return found[warmup:]


def measure(case: Case, size: Size, pairs: int, warmup: int, steps: int, threads: int) -> dict[str, Any]:
    """Everything that one case's race found, as JSON."""
    with (Contender(str(case.ours), partial(make, case.ours, size), case.ours.world, threads) as ours,
          Contender(str(case.peer), partial(make, case.peer, size), case.peer.world, threads) as peer):
        turns = race(ours, peer, pairs, warmup, steps)
    median, low, high = interval(pair_ratios(turns))
    result = {"median": median, "low": low, "high": high, "pairs": pairs}
    for name, contender, mine in (("ours", ours, [a for a, _ in turns]), ("peer", peer, [b for _, b in turns])):
        seconds = float(np.median([turn.seconds for turn in mine])) / steps
        result[name] = {"name": contender.name, **contender.about, "tokens_per_second": round(size.tokens / seconds),
                        "step_seconds": seconds, "cpu_seconds": float(np.median([turn.cpu_seconds for turn in mine])) / steps,
                        "loss": mine[-1].loss}  # fmt: skip
    result["targets"] = {key: value for key, value in (("median", case.median), ("high", case.upper)) if value is not None}
    result["met"] = all(result[key] >= value for key, value in result["targets"].items())
    return result


def line(name: str, found: dict[str, Any]) -> str:
    """One case in a row of text."""
    ours, peer = found["ours"], found["peer"]
    verdict = "" if not found["targets"] else "met" if found["met"] else "NOT MET"
    return (f"{name:26} {found['median']:.3f} [{found['low']:.3f}, {found['high']:.3f}]  {ours['tokens_per_second']:>7} tokens/s "
            f"against {peer['tokens_per_second']:>7}, cpu {peer['cpu_seconds'] / ours['cpu_seconds']:.3f}  {verdict}")


def bench(arguments: argparse.Namespace) -> int:
    """The program, after its arguments. Returns 0 if all measured cases met their targets, else 1."""
    if arguments.list:
        print("\n".join(f"{name:26} {case.ours} against {case.peer}" for name, case in CASES.items()))
        return 0
    unknown = [name for name in arguments.cases if name not in CASES]
    if unknown:
        raise ValueError(f"no case {', '.join(unknown)}; there are: {', '.join(CASES)}")
    if min(arguments.pairs, arguments.steps, arguments.threads) < 1 or arguments.warmup < 0:
        raise ValueError("--pairs, --steps and --threads must be at least 1, --warmup at least 0")
    size = Size(**{key: value for key, value in vars(arguments).items() if key in Size.__dataclass_fields__})
    warm()
    report = {"date": time.strftime("%Y-%m-%d"), "versions": versions(), "threads": arguments.threads, "steps": arguments.steps,
              "size": asdict(size), "cases": {}}
    for name in arguments.cases or CASES:
        found = measure(CASES[name], size, arguments.pairs, arguments.warmup, arguments.steps, arguments.threads)
        report["cases"][name] = found
        print(line(name, found), flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if all(found["met"] for found in report["cases"].values()) else 1


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"python": platform.python_version(), **{name: version(name) for name in ("torch", "deepspeed", "transformers")},
            "instructions": torch.backends.cpu.get_cpu_capability()}


def parser() -> Parser:
    """The command line."""
    result = Parser(prog="bench_train", description=__doc__.splitlines()[0])
    result.add_argument("--cases", nargs="*", default=[], help="by default all of --list")
    result.add_argument("--list", action="store_true", help="name the cases and leave")
    result.add_argument("--pairs", type=int, default=60)
    result.add_argument("--warmup", type=int, default=4, help="pairs before those that count")
    result.add_argument("--steps", type=int, default=1, help="training steps a turn")
    result.add_argument("--threads", type=int, default=1, help="threads a rank")
    result.add_argument("--out", type=Path, help="a JSON file for everything that was found")
    for key, field in Size.__dataclass_fields__.items():
        result.add_argument(f"--{key}", type=int, default=field.default)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    return run(parser(), bench, argv)


if __name__ == "__main__":
    sys.exit(main())

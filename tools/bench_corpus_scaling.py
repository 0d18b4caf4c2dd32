"""How much faster megalm preprocess is on two cores than on one, and how much faster it could be on this machine.

Everything of the run on one core, threads and all, is held to that core; everything of the run on two, to those two. The ceiling
is two whole runs at once, one on each core, which share nothing but the machine: twice the time of one over theirs. Of the wall
seconds of the three, taken one right after the other, ratios are made, and of several such rounds the median counts: neighbours
on the machine disturb all three alike.
"""
from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

BLOCK = 1 << 22
Command = Callable[[Path, int], list[str]]  # of an output and a number of workers


def two_cores() -> list[int]:
    """The first two that this process may use. Raises ValueError where there is only one."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise ValueError("one core can't show what two workers bring: give --pairs 0, or run where two are allowed")
    return cores


def started(command: Sequence[str], cores: Sequence[int]) -> subprocess.Popen:
    """A process that stays with its children on these cores."""
    return subprocess.Popen(command, preexec_fn=lambda: os.sched_setaffinity(0, cores), stdout=subprocess.DEVNULL)


def wall(*runs: tuple[list[str], Sequence[int]]) -> float:
    """Seconds of some commands at once, each on its cores. Raises ValueError if one fails."""
    os.sync()  # what the run before has left isn't charged to this one
    start = time.perf_counter()
    processes = [started(command, cores) for command, cores in runs]
    codes = [process.wait() for process in processes]
    seconds = time.perf_counter() - start
    for (command, _), code in zip(runs, codes, strict=True):
        if code:
            raise ValueError(f"{' '.join(command[:4])} ... ended with exit code {code}")
    return seconds


def several(corpus: Path, folder: Path, megabytes: int) -> list[Path]:
    """Links to a corpus, so many that they hold so much text together; the text is in the page cache then."""
    folder.mkdir(exist_ok=True)
    for number in range(max(1, round(megabytes * 1e6 / corpus.stat().st_size))):
        link = folder / f"{number}.jsonl"
        link.unlink(missing_ok=True)
        try:
            os.link(corpus, link)
        except OSError:  # on another file system
            shutil.copyfile(corpus, link)
    found = sorted(folder.iterdir())
    for path in found:
        with open(path, "rb", buffering=0) as file:
            while file.read(BLOCK):
                pass
    return found


def rounds(command: Command, folder: Path, count: int) -> dict:
    """So many rounds: the seconds of each, and the medians of the ratios."""
    first, second = two_cores()
    found = []
    for _ in range(count):
        found.append({"one_core": wall((command(folder / "one", 1), [first])),
                      "two_cores": wall((command(folder / "one", 2), [first, second])),
                      "two_runs_at_once": wall((command(folder / "one", 1), [first]), (command(folder / "two", 1), [second]))})
    return {"seconds": [{name: round(seconds, 2) for name, seconds in entry.items()} for entry in found],
            "times": median([entry["one_core"] / entry["two_cores"] for entry in found]),
            "ceiling": median([2 * entry["one_core"] / entry["two_runs_at_once"] for entry in found])}


def median(values: Sequence[float]) -> float:
    return round(statistics.median(values), 2)

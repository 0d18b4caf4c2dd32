"""How much faster megalm preprocess is on two cores than on one, and how much faster it could be on this machine.

All of the run on one core, threads and all, is held to that core; all of the run on two, to those two. The ceiling
is two whole runs at once, one on each core, that share nothing but the machine: twice the time of one over theirs. The three take
turns, in rounds. `times` and `ceiling` are medians over the rounds of the ratios of wall seconds, `times_of_least` and
`ceiling_of_least` the ratios of the least of each: neighbours on the machine take from two cores what they needn't take from one.
How much that is, the processor seconds show, which stand beside.
"""
from __future__ import annotations

import os
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from operator import truediv
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


def measured(*runs: tuple[list[str], Sequence[int]]) -> tuple[float, float]:
    """Wall and processor seconds of some commands at once, each on its cores. Raises ValueError if one fails."""
    os.sync()  # what the run before has left isn't charged to this one
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    processes = [started(command, cores) for command, cores in runs]
    codes = [process.wait() for process in processes]
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    for (command, _), code in zip(runs, codes, strict=True):
        if code:
            raise ValueError(f"{' '.join(command[:4])} ... ended with exit code {code}")
    return round(seconds, 2), round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 2)


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
    """So many rounds: wall and processor seconds of each, and the ratios."""
    first, second = two_cores()
    kinds = {"one_core": [(1, [first])], "two_cores": [(2, [first, second])], "two_runs_at_once": [(1, [first]), (1, [second])]}
    found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    for _ in range(count):
        for kind, runs in kinds.items():
            with tempfile.TemporaryDirectory(dir=folder) as name:
                found[kind].append(measured(*((command(Path(name, str(number)), workers), cores)
                                              for number, (workers, cores) in enumerate(runs))))
    one, two, both = ([seconds for seconds, _ in found[kind]] for kind in kinds)
    return {"seconds_and_processor_seconds": found,
            "times": round(statistics.median(map(truediv, one, two)), 2),
            "ceiling": round(statistics.median(2 * ratio for ratio in map(truediv, one, both)), 2),
            "times_of_least": round(min(one) / min(two), 2),
            "ceiling_of_least": round(2 * min(one) / min(both), 2)}

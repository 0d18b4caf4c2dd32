"""Kills megalm preprocess at random moments, goes on with the same command, and compares the result with an undisturbed run.

    python -m megalm.tools.kill_preprocess --moments 50

Every other time the main process alone is killed, and its workers must end with it; else the whole process group. The text comes
in three files, of which each worker takes its own, or in one .gz, of which each takes a share.
"""
from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from megalm.data.errors import DataError
from megalm.tools._command import Parser, positive, run

SUFFIXES = (".bin", ".idx", ".data.json")
WORDS = ["quick", "brown", "fox", "the", "lazy", "dog", "def", "return", "(", ")", "你好", "世界", "😀", "=", "x1", ".", "?"]
KILLS = 3  # of one run, before it may end


def corpus(folder: Path, documents: int) -> dict[str, list[Path]]:
    """Random words, with documents that come twice, empty ones, and one that is long: as three files, and as one .gz of them."""
    draw = random.Random(7)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(0, 300))) for _ in range(documents)]
    texts += texts[::10] + ["", "word " * 20_000]
    paths = []
    for number in range(3):
        paths.append(folder / f"{number}.jsonl")
        paths[-1].write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[number::3]))
    whole = folder / "whole.jsonl.gz"
    whole.write_bytes(b"".join(gzip.compress(path.read_bytes()) for path in paths))  # three members
    return {"files": paths, "gz": [whole]}


def command(inputs: Sequence[Path], prefix: Path, options: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "megalm.tools.preprocess", "--input", *map(str, inputs), "--output", str(prefix), "--tokenizer",
            "bytes", "--workers", "2", "--piece-bytes", "40000", "--quiet", *options]


def outputs(prefix: Path) -> list[bytes | None]:
    """What is under the final names."""
    paths = [Path(f"{prefix}{suffix}") for suffix in SUFFIXES]
    return [path.read_bytes() if path.exists() else None for path in paths]


def complete(prefix: Path) -> bool:
    """Is the data set there, and nothing left to be done?"""
    return Path(f"{prefix}.idx").exists() and not Path(f"{prefix}.work/run.json").exists()


def kill_once(line: Sequence[str], delay: float, whole_group: bool) -> bool:
    """Start, and kill after so many seconds; False if it ended before. Raises AssertionError if a worker outlives it."""
    process = subprocess.Popen(line, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        _, err = process.communicate(timeout=delay)
        assert process.returncode == 0, err.decode()
        return False
    except subprocess.TimeoutExpired:
        (os.killpg if whole_group else os.kill)(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)  # its workers hold stderr too: this waits for them
        return True
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def disturbed(line: Sequence[str], prefix: Path, right: list[bytes | None], delays: Callable[[], float]) -> int:
    """One run, killed up to KILLS times; returns how often. Raises AssertionError if its result isn't the right one."""
    kills = 0
    while kills < KILLS and not complete(prefix) and kill_once(line, delays(), kills % 2 == 0):
        kills += 1
        bin_bytes, idx_bytes, _ = outputs(prefix)
        assert bin_bytes in (None, right[0]) and idx_bytes in (None, right[1]), "something half-written is under the final name"
    if not complete(prefix):
        subprocess.run(line, check=True, timeout=300, stdout=subprocess.DEVNULL)
    assert outputs(prefix) == right, "the result isn't that of the undisturbed run"
    return kills


def kill_at_moments(folder: Path, moments: int, seed: int, options: Sequence[str] = (), documents: int = 600) -> int:
    """Kill at least so many times; returns how often. Raises AssertionError for the first thing that is wrong."""
    kinds, right, length = corpus(folder, documents), {}, 0.0
    for kind, inputs in kinds.items():
        begun = time.monotonic()
        subprocess.run(command(inputs, folder / kind, options), check=True, timeout=300)
        length = max(length, time.monotonic() - begun)
        right[kind] = outputs(folder / kind)
    assert right["gz"][:2] == right["files"][:2], "the .gz gives other bytes than its files"
    draw, kills, number = random.Random(seed), 0, 0
    while kills < moments:
        prefix, kind = folder / f"out{number}", tuple(kinds)[number % 2]
        kills += disturbed(command(kinds[kind], prefix, options), prefix, right[kind], lambda: draw.uniform(0, length))
        for path in folder.glob(f"out{number}.*"):
            path.unlink() if path.is_file() else None
        number += 1
    return kills


def kill(arguments: argparse.Namespace) -> int:
    """The program, after its arguments."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            kills = kill_at_moments(Path(folder), arguments.moments, arguments.seed, arguments.options)
        except AssertionError as error:
            raise DataError(str(error)) from error
    print(f"killed {kills} times; each time the same command went on to the same bytes")
    return 0


def parser() -> Parser:
    """The command line."""
    result = Parser(prog="kill_preprocess", description=__doc__.splitlines()[0])
    result.add_argument("--moments", type=positive, default=50, metavar="N")
    result.add_argument("--seed", type=int, default=0)
    result.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="further options of preprocess; last")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    return run(parser(), kill, argv)


if __name__ == "__main__":
    sys.exit(main())

"""Flip one bit of a checkpoint at a time: it is found when the bytes are read, and the checkpoint before is used.

    python -m megalm.tools.flip_checkpoints [--trials 2000 --seed 0]

Each trial flips a random bit of the newest of two checkpoints of two ranks (or of `latest`), chosen evenly over files so that
small ones have their share, and loads the run with one, two or three ranks. What is loaded must be one of the two checkpoints,
bit for bit; it may be the newer one only if the bit isn't among the bytes that were read.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path

from megalm.checkpoint import CheckpointError
from megalm.checkpoint.format import CHECKPOINTS
from megalm.tools._trials import State, program, resume, same, state, store

RANKS = 2
LAYOUTS = (1, 2, 3)
"""Of how many ranks the runs are that load."""


def trials(folder: Path, count: int, seed: int = 0) -> list[str]:
    """Flip `count` bits, one at a time; returns a line for each that had a consequence that it may not have."""
    chance, run_folder = random.Random(seed), folder / "run"
    old, new = state(1), state(2)
    for held in (old, new):
        store(run_folder, held, RANKS)
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
        problem = _consequence(run_folder, path, old, new, bit // 8 >= _header(before), chance.choice(LAYOUTS))
        if problem:
            wrong.append(f"bit {bit} of {path.name}: {problem}")
        path.write_bytes(before)
    return wrong


def _header(content: bytes) -> int:
    """The bytes of a safetensors file that megalm doesn't read: its indices say where the tensors are."""
    return 8 + int.from_bytes(content[:8], "little")


def _consequence(folder: Path, path: Path, old: State, new: State, in_tensors: bool, ranks: int) -> str | None:
    try:
        found, lines = resume(folder, ranks)
    except CheckpointError as error:
        return f"nothing was loaded: {error}"
    if path.name == "latest" or (path.suffix == ".safetensors" and not in_tensors):
        return None if same(found, new) else "the newer checkpoint, which is sound, wasn't used"
    if not same(found, old):
        return "not found" if same(found, new) else "something was loaded that nobody saved"
    return None if any(line.startswith(f"skipped {path.parent.name}: ") for line in lines) else "skipped without a word"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the trials; 1 when a flipped bit had a consequence that it may not have."""
    def work(folder: Path, arguments) -> tuple[list[str], list[str]]:
        wrong = trials(folder, arguments.trials, arguments.seed)
        return wrong, [f"{arguments.trials:,} bits flipped: {len(wrong)} not found or with a wrong consequence"]

    return program("flip_checkpoints", __doc__, work, argv)


if __name__ == "__main__":
    sys.exit(main())

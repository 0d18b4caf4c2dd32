"""What is still to be done, a task at a time: a unit of the input, or a piece of one that is read here for all workers."""
from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass

from megalm.data.publish import PARTIAL

from .inputs import Unit, expected_parts, stream_of
from .job import Job
from .parts import Place, part_path
from .reading import BLOCK
from .streams import TextStream

FEW = 4  # units a worker: with fewer, compressed files are read here, so that all workers have a share of each


@dataclass(frozen=True)
class Piece:
    """The text of a part, in a file that whoever makes the part removes; the rest as TextStream has it."""

    number: int
    path: str
    first: int
    last: bool
    digest: str
    bytes_read: int


@dataclass(frozen=True)
class Task:
    """Make the parts of a unit but for those that are done, which only a compressed file has; or one, of a piece."""

    number: int
    unit: Unit
    done: frozenset[int] = frozenset()
    piece: Piece | None = None


def remaining(units: Sequence[Unit], job: Job, begin: Place, made: Set[Place], workers: int) -> Iterator[Task]:
    """The tasks from the part `begin` on, in order, but for the parts made already. Raises DataError for a damaged file."""
    few = workers > 1 and len(units) - begin[0] < FEW * workers
    for number in range(begin[0], len(units)):
        unit = units[number]
        done = frozenset(part for at, part in made if at == number).union(range(begin[1] if number == begin[0] else 0))
        if few and expected_parts(unit, job.sources, job.unit_bytes) > 1:
            yield from handed_out(number, unit, job, done)
        elif stream_of(unit, job.sources) is not None or not done:
            yield Task(number, unit, done)


def handed_out(number: int, unit: Unit, job: Job, done: frozenset[int]) -> Iterator[Task]:
    """The pieces of a compressed file, each written down when it is asked for."""
    with TextStream(stream_of(unit, job.sources), job.unit_bytes) as text:
        for part in text.pieces():
            if part in done:
                continue
            spool = f"{part_path(job.folder, number, part)}.text{PARTIAL}"
            with open(spool, "wb", buffering=BLOCK) as file:
                while block := text.read(BLOCK):
                    file.write(block)
            yield Task(number, unit, done, Piece(part, spool, text.first, *text.end()))


def most_workers(units: Sequence[Unit], job: Job, begin: Place, workers: int) -> int:
    """How many have something to do."""
    return max(1, min(workers, sum(expected_parts(unit, job.sources, job.unit_bytes) for unit in units[begin[0]:])))

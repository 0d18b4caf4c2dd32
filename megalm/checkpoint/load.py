"""Fill an engine, under any layout, from a checkpoint that was saved under any other.

Every target fragment is intersected with the stored ones; only the blocks that hold elements in common are read, checked
against their hashes, and copied as strided boxes from where they were checked straight into place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from megalm.checkpoint import blocks, boxes
from megalm.checkpoint.find import find, read_manifest
from megalm.checkpoint.format import ITEM_BYTES, MANIFEST, StoredFragment, index_file, parse_index
from megalm.checkpoint.fragment import DTYPES, MOMENT_ROLES, WEIGHT_ROLES, Fragment
from megalm.checkpoint.pieces import Parts, Piece, copy, wanted
from megalm.checkpoint.save import Engine, Ranks
from megalm.checkpoint.sealed import CheckpointError, DamagedError

T = TypeVar("T")
PROBLEMS_SHOWN = 5
DAMAGED = "damaged: "
"""How a problem begins that an earlier checkpoint may not have."""


def read_indices(folder: Path, manifest: Mapping[str, Any], ranks: Iterable[int]) -> list[StoredFragment]:
    """The fragments that these ranks wrote. Raises CheckpointError where an index isn't what checkpoint.json says."""
    found = []
    for name in map(index_file, ranks):
        found += parse_index(folder, name, manifest["files"].get(name, {}).get("xxh3"))
    return found


class Stored:
    """An open checkpoint: its description, and its tensors, of which only what is asked for is read.

    `fragments`: those of each (part, role). Methods raise CheckpointError where a file isn't what the checkpoint says.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], fragments: Iterable[StoredFragment]) -> None:
        self.folder, self.manifest = folder, manifest
        self.fragments: dict[tuple[str, str], list[StoredFragment]] = {}
        for entry in fragments:
            self.fragments.setdefault((entry.part, entry.role), []).append(entry)
        self._blocks = blocks.Blocks(folder)
        self._checked: set[tuple[str, str]] = set()

    @classmethod
    def open(cls, folder: Path) -> Stored:
        """Read the description of one checkpoint's folder."""
        manifest = read_manifest(folder)
        return cls(folder, manifest, read_indices(folder, manifest, range(manifest["world_size"])))

    @property
    def roles(self) -> list[str]:
        return sorted({role for _, role in self.fragments})

    def of(self, part: str, role: str) -> list[StoredFragment]:
        """The fragments that together are one part in one role; weights come from the masters where there are some.

        Empty when the checkpoint has none. Raises CheckpointError when they don't hold every element exactly once, at one step.
        """
        for name in WEIGHT_ROLES if role in WEIGHT_ROLES else (role,):
            entries = self.fragments.get((part, name))
            if entries is None:
                continue
            if (part, name) not in self._checked:
                problem = boxes.untiled(entries)
                if not problem and len({entry.step for entry in entries}) > 1:
                    problem = f"its pieces are of different optimizer steps: {sorted({str(entry.step) for entry in entries})}"
                if problem:
                    raise CheckpointError(f"{name} of {part}: {problem}")
                self._checked.add((part, name))
            return entries
        return []

    def release(self) -> None:
        """Close the files until something is read again."""
        self._blocks.release()

    def pieces(self, entry: StoredFragment, asked: Sequence[boxes.Box]) -> Iterator[Piece]:
        """The blocks of a stored fragment that may hold elements of these boxes, in order; each is read when it is looked at."""
        each = blocks.elements(entry)
        for number in _numbers(entry, asked, each):
            start = number * each
            block = dataclasses.replace(entry, start=entry.start + start, count=min(each, entry.count - start))
            first = 0
            for box in boxes.boxes(block):
                yield Piece(box, partial(self._view, entry, number, first, box))
                first += boxes.size(box)

    def _view(self, entry: StoredFragment, number: int, first: int, box: boxes.Box) -> Tensor:
        elements = self._blocks.read(entry, number)[first: first + boxes.size(box)]
        return elements.view([high - low for low, high in box])


def _numbers(entry: StoredFragment, asked: Sequence[boxes.Box], each: int) -> list[int]:
    """The blocks, of `each` elements, from the first that a box needs to the last."""
    found: set[int] = set()
    for theirs in boxes.boxes(entry):
        for ours in asked:
            common = boxes.intersect(ours, theirs)
            if common is not None:
                _, _, first, length = boxes.strides_in(entry, common)
                found.update(range(first // each, -(-(first + length) // each)))
    return sorted(found)


def load(path: str | Path, engine: Engine, groups: Ranks, *, weights_only: bool = False,
         allow_changes: bool = False) -> list[str]:
    """Fill every fragment of the engine, owned or not, from the checkpoint at `path`; all ranks call it together. Returns
    what the user should hear of.

    Then `engine.refresh(counters)` with the saved counters. `weights_only` leaves moments and counters as they are: a start
    from those weights.
    `allow_changes`: moments of a kind that the checkpoint has none of keep their initial value. Rows that the vocabulary's
    padding has here and not there do too. Raises CheckpointError on every rank, naming the part and what is missing;
    DamagedError where the only trouble is that bytes aren't those that were written.
    """
    stored, notes = _open_together(path, groups), []

    def work() -> None:
        fragments = [fragment for fragment in engine.fragments() if not (weights_only and fragment.role in MOMENT_ROLES)]
        if allow_changes:
            fragments, told = _without_unknown_moments(fragments, stored)
            notes.extend(told)
        _fill_all(fragments, stored)

    _agreed(path, groups, work)
    stored.release()
    engine.refresh(engine.counters() if weights_only else stored.manifest["counters"])
    return notes


def _open_together(path: str | Path, groups: Ranks) -> Stored:
    """The checkpoint on every rank, though each of its files is read by one: rank 0 finds it, and all read their share of the
    indices, of which there are as many as ranks that saved, and tell the others."""
    def found() -> tuple[Path, dict[str, Any]] | None:
        if groups.rank != 0:
            return None
        folder = Path(path) if (Path(path) / MANIFEST).exists() else find(path)
        return folder, read_manifest(folder)

    folder, manifest = groups.broadcast(_agreed(path, groups, found))
    share = range(groups.rank, manifest["world_size"], groups.world_size)
    shares = groups.gather(_agreed(path, groups, lambda: read_indices(folder, manifest, share)))
    return Stored(folder, manifest, (entry for entries in shares for entry in entries))


def _agreed(path: str | Path, groups: Ranks, work: Callable[[], T]) -> T:
    """This rank's result of `work`. Where any rank's fails, all raise, with what the first few say."""
    result, problem, cause = None, None, None
    try:
        result = work()
    except Exception as error:  # whatever it is, the other ranks wait for an answer
        problem, cause = _line(error), error
    problems = groups.agree(problem)
    if problems:
        lines = "; ".join(f"rank {rank}: {text}" for rank, text in problems[:PROBLEMS_SHOWN])
        more = f"; and {len(problems) - PROBLEMS_SHOWN} more ranks" if len(problems) > PROBLEMS_SHOWN else ""
        damaged = all(text.startswith(DAMAGED) for _, text in problems)
        raise (DamagedError if damaged else CheckpointError)(f"{path} can't be loaded: {lines}{more}") from cause
    return result


def _line(error: Exception) -> str:
    if isinstance(error, DamagedError):
        return DAMAGED + str(error)
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"


def _without_unknown_moments(fragments: Iterable[Fragment], stored: Stored) -> tuple[list[Fragment], list[str]]:
    """Leave out moments of a role that the checkpoint has nowhere: another optimizer wrote it."""
    unknown = {fragment.role for fragment in fragments if fragment.role in MOMENT_ROLES} - set(stored.roles)
    notes = [f"{role} starts anew: {stored.folder} holds {', '.join(stored.roles)}" for role in sorted(unknown)]
    return [fragment for fragment in fragments if fragment.role not in unknown], notes


def _fill_all(fragments: Iterable[Fragment], stored: Stored) -> None:
    """Fill each fragment. Raises CheckpointError with the first few problems, a DamagedError if all are damage."""
    problems = []
    for fragment in fragments:
        try:
            if fragment.count:
                fill(fragment, stored)
        except CheckpointError as error:
            problems.append(error)
    if problems:
        more = f"; and {len(problems) - PROBLEMS_SHOWN} more" if len(problems) > PROBLEMS_SHOWN else ""
        damaged = all(isinstance(error, DamagedError) for error in problems)
        lines = "; ".join(map(str, problems[:PROBLEMS_SHOWN]))
        raise (DamagedError if damaged else CheckpointError)(lines + more)


def fill(target: Fragment, stored: Stored) -> int:
    """Copy into `target` every element that the checkpoint has of it; returns how many bytes they take there.

    Raises CheckpointError when the part isn't stored, isn't complete, or has another shape (the vocabulary's padding apart).
    """
    entries = stored.of(target.part, target.role)
    if not entries:
        raise CheckpointError(f"{target} isn't in the checkpoint, which holds {', '.join(stored.roles) or 'no tensors'}")
    asked = wanted(target, entries[0].full_shape, "the checkpoint", padded=True)
    pieces = (piece for entry in _near(entries, target) for piece in stored.pieces(entry, asked))
    return copy(target, asked, pieces) * ITEM_BYTES[entries[0].dtype]


def _near(entries: Iterable[StoredFragment], target: Fragment) -> Iterator[StoredFragment]:
    """The entries that may have elements of the target: the cheap test first, there may be thousands."""
    for entry in entries:
        same_dim = entry.dim == target.dim and entry.dim is not None
        if same_dim and (entry.high <= target.low or target.high <= entry.low):
            continue
        same_slab = (entry.dim, entry.full_shape) == (target.dim, tuple(target.full_shape)) and (
            entry.dim is None or (entry.low, entry.high) == (target.low, target.high))
        if same_slab and (entry.start + entry.count <= target.start or target.start + target.count <= entry.start):
            continue
        yield entry


class Weights(Parts):
    """The weights of a checkpoint, or their moving average."""

    def __init__(self, stored: Stored, ema: bool = False) -> None:
        if ema and "ema" not in stored.roles:
            raise CheckpointError(f"{stored.folder} has no moving average: optimizer.ema_decay wasn't set")
        roles = ("ema",) if ema else WEIGHT_ROLES
        weights = [entries[0] for (_, role), entries in stored.fragments.items() if role in roles]
        super().__init__({entry.part: entry.full_shape for entry in weights}, roles[0])
        self._stored = stored

    def dtype(self, part: str) -> torch.dtype:
        return DTYPES[self._stored.of(part, self._role)[0].dtype]

    def fill(self, target: Fragment) -> None:
        fill(target, self._stored)

    def release(self) -> None:
        self._stored.release()


def read_weights(path: str | Path, ema: bool = False) -> Weights:
    """The weights of a checkpoint (or of a run's newest whole one) by canonical part name, full tensors, one at a time.

    The fp32 masters where there are some, else the weights; with `ema` their moving average. Raises CheckpointError.
    """
    return Weights(Stored.open(find(path)), ema)

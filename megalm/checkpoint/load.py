"""Fill an engine, under any layout, from a checkpoint that was saved under any other.

Every target fragment is intersected with the stored ones; only the blocks that hold bytes in common are read, checked
against their hashes, and copied as strided boxes from the mapped file straight into place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalm.checkpoint import boxes
from megalm.checkpoint.find import find, read_manifest
from megalm.checkpoint.format import ITEM_BYTES, StoredFragment, index_file, parse_index
from megalm.checkpoint.fragment import DTYPES, MOMENT_ROLES, WEIGHT_ROLES, Fragment
from megalm.checkpoint.mapped import MappedFile
from megalm.checkpoint.save import Engine, Ranks
from megalm.checkpoint.sealed import CheckpointError, DamagedError

PADDED_PARTS = ("embedding.word.weight", "head.weight")
"""Their dim 0 is the vocabulary, padded: its size may differ between two plans of one model."""
OPEN_FILES = 64
"""A checkpoint may have thousands; each that is open takes two descriptors, its own and its map's."""
PROBLEMS_SHOWN = 5
DAMAGED = "damaged: "
"""How a problem begins that an earlier checkpoint may not have."""


@dataclass
class Stored:
    """An open checkpoint: its description, and its tensors, of which only what is asked for is read.

    Raises CheckpointError where a file isn't what the checkpoint says.
    """

    folder: Path
    manifest: dict[str, Any]
    fragments: dict[tuple[str, str], list[StoredFragment]]
    _files: dict[str, MappedFile] = field(default_factory=dict)
    _checked: set[tuple[str, str]] = field(default_factory=set)

    @classmethod
    def open(cls, folder: Path) -> Stored:
        """Read the description of one checkpoint's folder."""
        manifest = read_manifest(folder)
        fragments: dict[tuple[str, str], list[StoredFragment]] = {}
        for rank in range(manifest["world_size"]):
            for entry in parse_index(folder, index_file(rank)):
                fragments.setdefault((entry.part, entry.role), []).append(entry)
        return cls(folder, manifest, fragments)

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
        """Let go of the mapped files until something is read again."""
        self._files.clear()

    def read(self, entry: StoredFragment, first: int, length: int) -> Tensor:
        """Elements [first, first + length) of a stored fragment, as a view of the mapped file, their blocks checked."""
        file = self._files.pop(entry.file, None) or MappedFile(self.folder, entry.file)
        self._files[entry.file] = file  # the last to go
        while len(self._files) > OPEN_FILES:
            del self._files[next(iter(self._files))]
        size = ITEM_BYTES[entry.dtype]
        return file.read(entry, first * size, length * size).view(DTYPES[entry.dtype])


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
    stored, problem, cause, notes = None, None, None, []
    try:
        stored = Stored.open(find(path))
        fragments = [fragment for fragment in engine.fragments() if not (weights_only and fragment.role in MOMENT_ROLES)]
        if allow_changes:
            fragments, notes = _without_unknown_moments(fragments, stored)
        problem = _fill_all(fragments, stored)
    except Exception as error:  # whatever it is, the other ranks wait for an answer
        problem, cause = _line(error), error
    problems = groups.agree(problem)
    if problems:
        lines = "; ".join(f"rank {rank}: {text}" for rank, text in problems[:PROBLEMS_SHOWN])
        more = f"; and {len(problems) - PROBLEMS_SHOWN} more ranks" if len(problems) > PROBLEMS_SHOWN else ""
        damaged = all(text.startswith(DAMAGED) for _, text in problems)
        raise (DamagedError if damaged else CheckpointError)(f"{path} can't be loaded: {lines}{more}") from cause
    assert stored is not None
    engine.refresh(engine.counters() if weights_only else stored.manifest["counters"])
    return notes


def _line(error: Exception) -> str:
    if isinstance(error, DamagedError):
        return DAMAGED + str(error)
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"


def _without_unknown_moments(fragments: Iterable[Fragment], stored: Stored) -> tuple[list[Fragment], list[str]]:
    """Leave out moments of a role that the checkpoint has nowhere: another optimizer wrote it."""
    unknown = {fragment.role for fragment in fragments if fragment.role in MOMENT_ROLES} - set(stored.roles)
    notes = [f"{role} starts anew: {stored.folder} holds {', '.join(stored.roles)}" for role in sorted(unknown)]
    return [fragment for fragment in fragments if fragment.role not in unknown], notes


def _fill_all(fragments: Iterable[Fragment], stored: Stored) -> str | None:
    """Fill each fragment; the first few problems in one line, or None."""
    problems = []
    for fragment in fragments:
        try:
            if fragment.count:
                fill(fragment, stored)
        except CheckpointError as error:
            problems.append(_line(error))
    if not problems:
        return None
    more = f"; and {len(problems) - PROBLEMS_SHOWN} more" if len(problems) > PROBLEMS_SHOWN else ""
    return "; ".join(problems[:PROBLEMS_SHOWN]) + more


@torch.no_grad()
def fill(target: Fragment, stored: Stored) -> int:
    """Copy into `target` every element that the checkpoint has of it; returns how many bytes were read.

    Raises CheckpointError when the part isn't stored, isn't complete, or has another shape (the vocabulary's padding apart).
    """
    entries = stored.of(target.part, target.role)
    if not entries:
        raise CheckpointError(f"{target} isn't in the checkpoint, which holds {', '.join(stored.roles) or 'no tensors'}")
    shape, own = entries[0].full_shape, tuple(target.full_shape)
    resized = target.part in PADDED_PARTS and shape[1:] == own[1:]
    if shape != own and not resized:
        raise CheckpointError(f"{target} has shape {list(shape)} in the checkpoint and {list(own)} here")
    wanted = [box for box in boxes.boxes(target) if not resized or box[0][0] < shape[0]]
    expected = sum(boxes.size(box) if not resized else _rows_below(box, shape[0]) for box in wanted)
    copied = read = 0
    for entry in _near(entries, target):
        for theirs in boxes.boxes(entry):
            for ours in wanted:
                common = boxes.intersect(ours, theirs)
                if common is None:
                    continue
                sizes, strides, first, length = boxes.strides_in(entry, common)
                source = stored.read(entry, first, length)
                box_view(target, common).copy_(source.as_strided(sizes, strides, source.storage_offset()))
                copied, read = copied + boxes.size(common), read + boxes.size(common) * source.element_size()
    assert copied == expected, f"{target}: {expected - copied:,} of {expected:,} elements are missing"  # `of` found it complete
    return read


def _rows_below(box: boxes.Box, rows: int) -> int:
    (low, high), *rest = box
    return boxes.size(((low, min(high, rows)), *rest))


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


def box_view(target: Fragment, box: boxes.Box) -> Tensor:
    """The box as a view of the target's own memory."""
    tensor = target.tensor.detach()
    assert tensor.dim() == 1 and tensor.is_contiguous(), f"{target}: not a contiguous 1-D tensor"
    sizes, strides, first, _ = boxes.strides_in(target, box)
    return tensor.as_strided(sizes, strides, tensor.storage_offset() + first)


class Weights(Mapping[str, Tensor]):
    """Part name -> the whole tensor, on the CPU, assembled when it is asked for and not kept."""

    def __init__(self, stored: Stored, ema: bool = False) -> None:
        self._stored, self._role = stored, "ema" if ema else WEIGHT_ROLES[0]
        if ema and "ema" not in stored.roles:
            raise CheckpointError(f"{stored.folder} has no moving average: optimizer.ema_decay wasn't set")
        roles = ("ema",) if ema else WEIGHT_ROLES
        weights = [entries[0] for (_, role), entries in stored.fragments.items() if role in roles]
        self._shapes = {entry.part: entry.full_shape for entry in weights}

    def shape(self, part: str) -> tuple[int, ...]:
        """The full shape, without reading the tensor."""
        return self._shapes[part]

    def dtype(self, part: str) -> torch.dtype:
        """The dtype that it is stored in."""
        return DTYPES[self._stored.of(part, self._role)[0].dtype]

    def rows(self, part: str, low: int, high: int) -> Tensor:
        """Rows [low, high) along the first dim, in the stored dtype."""
        shape = self._shapes[part]
        rows = torch.empty((high - low, *shape[1:]), dtype=self.dtype(part))
        fill(Fragment(part, self._role, shape, 0, low, high, 0, rows.view(-1), False), self._stored)
        return rows

    def release(self) -> None:
        """Let go of the mapped files, whose pages count as this process's memory; what is read next maps them again."""
        self._stored.release()

    def __getitem__(self, part: str) -> Tensor:
        return self.rows(part, 0, self._shapes[part][0])

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def read_weights(path: str | Path, ema: bool = False) -> Weights:
    """The weights of a checkpoint (or of a run's newest whole one) by canonical part name, full tensors, one at a time.

    The fp32 masters where there are some, else the weights; with `ema` their moving average. Raises CheckpointError.
    """
    return Weights(Stored.open(find(path)), ema)

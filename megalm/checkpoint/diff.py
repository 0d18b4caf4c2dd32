"""How two checkpoints differ: settings, counters, and every tensor's largest difference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megalm.checkpoint.find import read_manifest
from megalm.checkpoint.format import read_json
from megalm.checkpoint.fragment import DTYPES, Fragment
from megalm.checkpoint.load import Stored, fill
from megalm.checkpoint.resume import MISSING, Difference, flatten

ABOUT = ("step", "consumed_samples", "eval_loss", "counters", "layout", "versions")
"""What of checkpoint.json is compared."""


@dataclass(frozen=True)
class TensorDifference:
    """`what` differs between two checkpoints' tensors of one part and role; `largest`: absolute, where both have it."""

    part: str
    role: str
    what: str
    largest: float | None = None


def setting_differences(one: Path, other: Path) -> list[Difference]:
    """Leaves of checkpoint.json, config.json (as config....) and plan.json (as plan....) that differ. Raises CheckpointError."""
    sides = [_settings(folder) for folder in (one, other)]
    keys = dict.fromkeys([*sides[0], *sides[1]])
    pairs = [Difference(key, sides[0].get(key, MISSING), sides[1].get(key, MISSING)) for key in keys]
    return [pair for pair in pairs if pair.stored != pair.current]


def _settings(folder: Path) -> dict[str, Any]:
    manifest = read_manifest(folder)
    found = {name: manifest[name] for name in ABOUT if name in manifest}
    found |= {name: read_json(folder / f"{name}.json") for name in ("config", "plan")}
    return flatten(found)


def tensor_differences(one: Path, other: Path) -> Iterator[TensorDifference]:
    """Every tensor that isn't bitwise the same in both, one part in memory at a time. Raises CheckpointError."""
    stored = [Stored.open(folder) for folder in (one, other)]
    for part, role in dict.fromkeys([*stored[0].fragments, *stored[1].fragments]):
        entries = [side.fragments.get((part, role)) for side in stored]
        if not all(entries):
            yield TensorDifference(part, role, f"only in the {'second' if entries[0] is None else 'first'}")
            continue
        kinds = [(entry[0].dtype, list(entry[0].full_shape)) for entry in entries]
        if kinds[0] != kinds[1]:
            yield TensorDifference(part, role, f"{kinds[0][0]} {kinds[0][1]} and {kinds[1][0]} {kinds[1][1]}")
            continue
        first, second = (_whole(side, part, role) for side in stored)
        if not torch.equal(first.view(torch.uint8), second.view(torch.uint8)):
            largest = (first.double() - second.double()).abs().max().item()
            differing = int((first != second).sum())
            yield TensorDifference(part, role, f"{differing:,} of {first.numel():,} elements", largest)


def _whole(stored: Stored, part: str, role: str) -> torch.Tensor:
    """One part in one role, flat."""
    entry = stored.fragments[part, role][0]
    tensor = torch.zeros(entry.full_shape, dtype=DTYPES[entry.dtype]).view(-1)
    fill(Fragment(part, role, entry.full_shape, None, 0, entry.full_shape[0], 0, tensor, False), stored)
    return tensor

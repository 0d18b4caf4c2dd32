"""How two checkpoints differ: settings, counters, and every tensor's largest difference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megalm.checkpoint.find import read_manifest
from megalm.checkpoint.format import ROLES, read_json
from megalm.checkpoint.fragment import DTYPES, WEIGHT_ROLES, Fragment
from megalm.checkpoint.load import Stored, fill
from megalm.checkpoint.pieces import PADDED_PARTS
from megalm.checkpoint.resume import MISSING, Difference, flatten

ABOUT = ("step", "consumed_samples", "eval_loss", "counters", "layout", "versions")
"""What of checkpoint.json is compared."""
ROLE_NAMES = {"master": "master weights", "weight": "weights", "exp_avg": "moments", "exp_avg_sq": "moments",
              "momentum": "moments", "ema": "moving average"}


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


class Tensors:
    """The tensors of two checkpoints, side by side, in the roles that both have.

    Where one has fp32 masters and the other weights alone, these two are compared, in the dtype of the weights.
    """

    def __init__(self, one: Path, other: Path) -> None:
        """Raises CheckpointError."""
        self._stored = [Stored.open(folder) for folder in (one, other)]
        first, second = (set(stored.roles) for stored in self._stored)
        weights = [next((role for role in WEIGHT_ROLES if role in roles), None) for roles in (first, second)]
        self._pairs = [(role, role) for role in ROLES if role in first & second]
        if None not in weights and not first & second & set(WEIGHT_ROLES):
            self._pairs.insert(0, (weights[0], weights[1]))

    def only(self) -> tuple[list[str], list[str]]:
        """What the first has in no role of the second, and the other way round: "master weights", "moments"..."""
        compared = [{pair[side] for pair in self._pairs} for side in (0, 1)]
        found = [dict.fromkeys(ROLE_NAMES[role] for role in ROLES if role in set(stored.roles) - roles)
                 for stored, roles in zip(self._stored, compared, strict=True)]
        return list(found[0]), list(found[1])

    def differences(self) -> Iterator[TensorDifference]:
        """Every tensor that isn't bitwise the same in both, one part in memory at a time. Raises CheckpointError."""
        parts = dict.fromkeys(part for stored in self._stored for part, _ in stored.fragments)
        for part in parts:
            for roles in self._pairs:
                yield from self._compare(part, roles)

    def _compare(self, part: str, roles: tuple[str, str]) -> Iterator[TensorDifference]:
        name = roles[0] if roles[0] == roles[1] else " and ".join(roles)
        entries = [stored.fragments.get((part, role)) for stored, role in zip(self._stored, roles, strict=True)]
        if not all(entries):
            if any(entries):
                yield TensorDifference(part, name, f"only in the {'second' if entries[0] is None else 'first'}")
            return
        shapes = [list(held[0].full_shape) for held in entries]
        rows = min(shape[0] for shape in shapes)
        padded = part in PADDED_PARTS and shapes[0][1:] == shapes[1][1:] and shapes[0] != shapes[1]
        dtypes = [held[0].dtype for held in entries]
        if (shapes[0] != shapes[1] and not padded) or (dtypes[0] != dtypes[1] and roles[0] == roles[1]):
            yield TensorDifference(part, name, f"{dtypes[0]} {shapes[0]} and {dtypes[1]} {shapes[1]}")
            return
        first, second = (_rows(stored, part, role, rows) for stored, role in zip(self._stored, roles, strict=True))
        narrow = min(first.dtype, second.dtype, key=lambda dtype: dtype.itemsize)
        first, second = first.to(narrow), second.to(narrow)
        more = f", and {shapes[0][0]:,} and {shapes[1][0]:,} rows with the padding" if padded else ""
        if not torch.equal(first.view(torch.uint8), second.view(torch.uint8)):
            largest = (first.double() - second.double()).abs().max().item()
            differing = int((first != second).sum())
            yield TensorDifference(part, name, f"{differing:,} of {first.numel():,} elements{more}", largest)
        elif more:
            yield TensorDifference(part, name, f"the same{more}")


def _rows(stored: Stored, part: str, role: str, rows: int) -> torch.Tensor:
    """The first rows of one part in one role, flat."""
    entry = stored.fragments[part, role][0]
    shape = (rows, *entry.full_shape[1:])
    tensor = torch.zeros(shape, dtype=DTYPES[entry.dtype]).view(-1)
    fill(Fragment(part, role, entry.full_shape, 0, 0, rows, 0, tensor, False), stored)
    return tensor

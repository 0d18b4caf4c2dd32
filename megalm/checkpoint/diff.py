"""How two checkpoints differ: counters, settings, layout, versions, and every tensor's largest difference."""

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

COUNTER, SETTING, LAYOUT, VERSION = "counter", "setting", "fact of the layout", "version"
ABOUT = {"step": COUNTER, "consumed_samples": COUNTER, "eval_loss": COUNTER, "counters": COUNTER, "config": SETTING,
         "layout": LAYOUT, "plan": LAYOUT, "versions": VERSION}
"""What is compared besides tensors, and what it is called: keys of checkpoint.json, and the documents beside it."""
DOCUMENTS = ("config", "plan")
OF_WEIGHTS = ("config.model", "config.tokenizer", "config.precision", "plan.vocab_size")
"""All that checkpoints have to say which weights alone were written to: the rest of their config is made up."""
ROLE_NAMES = {"master": "master weights", "weight": "weights", "exp_avg": "moments", "exp_avg_sq": "moments",
              "momentum": "moments", "ema": "moving average"}
KINDS = {"master": "weight", "weight": "weight", "ema": "moving average"}


@dataclass(frozen=True)
class TensorDifference:
    """`what` differs between two checkpoints' tensors of one part and role; `largest`: absolute, where both have it. `kind`:
    "weight", "moment" or "moving average"."""

    part: str
    role: str
    kind: str
    what: str
    largest: float | None = None


@dataclass(frozen=True)
class About:
    """What a checkpoint says besides its tensors: {path: leaf}, such as config.train.seed, and what is missing, in one line."""

    facts: dict[str, Any]
    weights_alone: bool
    missing: str | None

    @classmethod
    def read(cls, folder: Path) -> About:
        """Raises CheckpointError."""
        manifest = read_manifest(folder)
        alone = not manifest["step"] and not manifest["counters"]
        there = [name for name in DOCUMENTS if f"{name}.json" in manifest["files"]]
        found = {name: manifest[name] for name in ABOUT if name in manifest and not (name == "counters" and alone)}
        facts = flatten(found | {name: read_json(folder / f"{name}.json") for name in there})
        repeated = [f"plan.{name}" for name in manifest.get("layout", {})]
        lacks = [f"has no {name}.json" for name in DOCUMENTS if name not in there]
        lacks += ["weights alone, of no run: of its config, only what model they are counts"] if alone else []
        return cls({path: leaf for path, leaf in facts.items() if path not in repeated}, alone, "; ".join(lacks) or None)


def differences(one: About, other: About) -> dict[str, list[Difference]]:
    """What differs of what both say, by the names in ABOUT."""
    sides, alone = (one.facts, other.facts), one.weights_alone or other.weights_alone
    found: dict[str, list[Difference]] = {kind: [] for kind in dict.fromkeys(ABOUT.values())}
    told = [{path.split(".")[0] for path in side} for side in sides]
    for path in dict.fromkeys([*sides[0], *sides[1]]):
        pair = Difference(path, *(side.get(path, MISSING) for side in sides))
        name = path.split(".")[0]
        said_by_both = name in told[0] and name in told[1] or name not in DOCUMENTS
        if pair.stored != pair.current and said_by_both and (not alone or path.startswith(OF_WEIGHTS)):
            found[ABOUT[name]].append(pair)
    if "plan.vocab_size" in one.facts and one.facts["plan.vocab_size"] == other.facts.get("plan.vocab_size"):
        # A size that one side states and the other takes from its tokenizer is the same size.
        found[SETTING] = [pair for pair in found[SETTING] if pair.path != "config.model.vocab_size"]
    return found


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
        name, kind = (roles[0] if roles[0] == roles[1] else " and ".join(roles)), KINDS.get(roles[0], "moment")
        entries = [stored.fragments.get((part, role)) for stored, role in zip(self._stored, roles, strict=True)]
        if not all(entries):
            if any(entries):
                yield TensorDifference(part, name, kind, f"only in the {'second' if entries[0] is None else 'first'}")
            return
        shapes = [list(held[0].full_shape) for held in entries]
        rows = min(shape[0] for shape in shapes)
        padded = part in PADDED_PARTS and shapes[0][1:] == shapes[1][1:] and shapes[0] != shapes[1]
        dtypes = [held[0].dtype for held in entries]
        if (shapes[0] != shapes[1] and not padded) or (dtypes[0] != dtypes[1] and roles[0] == roles[1]):
            yield TensorDifference(part, name, kind, f"{dtypes[0]} {shapes[0]} and {dtypes[1]} {shapes[1]}")
            return
        first, second = (_rows(stored, part, role, rows) for stored, role in zip(self._stored, roles, strict=True))
        narrow = min(first.dtype, second.dtype, key=lambda dtype: dtype.itemsize)
        first, second = first.to(narrow), second.to(narrow)
        more = f", and {shapes[0][0]:,} and {shapes[1][0]:,} rows with the padding" if padded else ""
        if not torch.equal(first.view(torch.uint8), second.view(torch.uint8)):
            largest = (first.double() - second.double()).abs().max().item()
            differing = int((first != second).sum())
            yield TensorDifference(part, name, kind, f"{differing:,} of {first.numel():,} elements{more}", largest)
        elif more:
            yield TensorDifference(part, name, kind, f"the same{more}")


def _rows(stored: Stored, part: str, role: str, rows: int) -> torch.Tensor:
    """The first rows of one part in one role, flat."""
    entry = stored.fragments[part, role][0]
    shape = (rows, *entry.full_shape[1:])
    tensor = torch.zeros(shape, dtype=DTYPES[entry.dtype]).view(-1)
    fill(Fragment(part, role, entry.full_shape, 0, 0, rows, 0, tensor, False), stored)
    return tensor

"""Which checkpoints stay: the newest few, every k-th, and the best by validation loss."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from megalm.checkpoint.disk import Disk
from megalm.checkpoint.find import candidates, damage, fault, read_manifest
from megalm.checkpoint.format import DELETED_PREFIX, REPLACED_PREFIX, step_name
from megalm.checkpoint.sealed import CheckpointError


@dataclass(frozen=True)
class Retention:
    """`keep`: so many of the newest. `every`: those of steps that it divides (0: no rule). `best`: so many of the lowest
    validation loss, of those at whose step it was measured."""

    keep: int
    every: int = 0
    best: int = 0

    def kept(self, whole: Sequence[tuple[int, float | None]]) -> set[int]:
        """The steps that stay of the whole checkpoints, given as (step, validation loss)."""
        newest = sorted(step for step, _ in whole)[-max(self.keep, 1):]
        measured = sorted((loss, -step) for step, loss in whole if loss is not None and math.isfinite(loss))
        multiples = {step for step, _ in whole if self.every and step % self.every == 0}
        return {*newest, *multiples, *(-step for _, step in measured[: self.best])}


def retire(root: Path, step: int, rule: Retention, disk: Disk, needed: Collection[int] = ()) -> list[str]:
    """Delete the checkpoints up to `step`, the one just saved, that the rule doesn't keep; returns what couldn't be done. Those
    of the steps `needed` stay for now.

    Nothing is deleted unless the one just saved is whole. A torn one goes when it is older than all of the newest that stay.
    Later steps belong to a branch that the user went back from; they stay until the run overwrites them.
    """
    if fault(root / step_name(step), read=False) is not None:
        return [f"{step_name(step)} isn't whole any more; no older checkpoint was deleted"]
    try:
        disk.remove(root / (REPLACED_PREFIX + step_name(step)))
        found = [(number, folder) for number, folder in candidates(root) if number <= step]
        whole = [(number, read_manifest(folder)["eval_loss"]) for number, folder in found if not damage(folder, read=False)]
        kept = rule.kept(whole)
        oldest = min(sorted((number for number, _ in whole), reverse=True)[: max(rule.keep, 1)])
        sound = {number for number, _ in whole}
        for number, folder in found:
            if number in kept or number in needed or (number not in sound and number >= oldest):
                continue
            doomed = root / (DELETED_PREFIX + folder.name)
            disk.rename(folder, doomed)
            disk.sync_folder(root)  # else a power cut may keep what `remove` did and not the hidden name
            disk.remove(doomed)
    except (OSError, CheckpointError) as error:
        return [f"an old checkpoint in {root} couldn't be deleted: {error}"]
    return []

"""May this run go on from that checkpoint? Pure functions of two configs and of a folder's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalm.checkpoint.find import Report, newest
from megalm.checkpoint.format import CHECKPOINTS, CheckpointError, read_json

CHECKED = ("model", "data", "optimizer", "batch.global", "train.seed", "train.z_loss", "train.label_smoothing")
"""Settings that shape the numbers; a resume with others isn't the same run."""
NEWER = {"train.z_loss": 0.0, "train.label_smoothing": 0.0}
"""What those that a checkpoint may be older than were in its run."""
FREE = ("model.vocab_multiple", "data.cache")
"""Among these, the ones that don't: padding never wins a logit, and a cache can lie anywhere."""
ALLOWED_BEFORE = ("logs",)
"""What a launcher may have put into a run's folder before the ranks look at it."""


@dataclass(frozen=True)
class Difference:
    """One setting, by its dotted path, with both values; MISSING where a side has none."""

    path: str
    stored: Any
    current: Any

    def __str__(self) -> str:
        return f"{self.path}: stored {self.stored!r}, now {self.current!r}"


class _Missing:
    def __repr__(self) -> str:
        return "nothing"


MISSING = _Missing()


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    """{"a.b[0].c": leaf} of nested JSON; an empty object or list is a leaf."""
    if isinstance(value, Mapping) and value:
        items = [(f"{path}.{key}" if path else str(key), item) for key, item in value.items()]
    elif isinstance(value, (list, tuple)) and value:
        items = [(f"{path}[{index}]", item) for index, item in enumerate(value)]
    else:
        return {path: [] if isinstance(value, tuple) else value}
    return {name: leaf for key, item in items for name, leaf in flatten(item, key).items()}


def differences(stored: Mapping[str, Any], current: Mapping[str, Any]) -> list[Difference]:
    """The checked settings that two resolved configs (config.json's content) don't share, in the order of their paths."""
    sides = [NEWER | {path: value for path, value in flatten(side).items() if _checked(path)} for side in (stored, current)]
    paths = list(dict.fromkeys([*sides[0], *sides[1]]))
    pairs = [Difference(path, sides[0].get(path, MISSING), sides[1].get(path, MISSING)) for path in paths]
    return [pair for pair in pairs if pair.stored is MISSING or pair.current is MISSING or pair.stored != pair.current]


def _checked(path: str) -> bool:
    def below(name: str) -> bool:
        return path == name or path.startswith((f"{name}.", f"{name}["))

    return any(below(name) for name in CHECKED) and not any(below(name) for name in FREE)


def check_resume(checkpoint: Path, config: Any, plan: Any = None) -> list[Difference]:
    """Compare a checkpoint's config.json (and its plan's vocabulary) with the run's; returns what differs.

    Raises CheckpointError with every difference on its line, unless config.checkpoint.allow_changes.
    """
    stored, current = read_json(checkpoint / "config.json"), config.model_dump(mode="json")
    if not isinstance(stored, Mapping):
        raise CheckpointError(f"{checkpoint / 'config.json'}: not a config")
    found = differences(stored, current)
    if plan is not None:
        # A size that one side states and the other takes from its tokenizer is the same size: the plans know it.
        before = read_json(checkpoint / "plan.json").get("vocab_size", MISSING)
        found = [difference for difference in found if difference.path != "model.vocab_size"]
        found += [Difference("the vocabulary's size", before, plan.vocab_size)] if before != plan.vocab_size else []
    if found and not config.checkpoint.allow_changes:
        lines = "".join(f"\n  {difference}" for difference in found)
        raise CheckpointError(f"{checkpoint} has other settings; checkpoint.allow_changes=true goes on regardless:{lines}")
    return found


def choose(run_folder: str | Path, resume: str, report: Report | None = None) -> Path | None:
    """The checkpoint that a run with checkpoint.resume = "auto" or "never" goes on from; None: it starts at step 0.

    Raises CheckpointError when "never" meets a folder that holds a run, or when there are checkpoints but none is whole.
    """
    folder = Path(run_folder)
    if resume == "auto":
        return newest(folder / CHECKPOINTS, report)
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    taken = [name for name in names if name not in ALLOWED_BEFORE and not name.startswith(".")]
    if taken:
        shown = ", ".join(taken[:5]) + (", ..." if len(taken) > 5 else "")
        raise CheckpointError(f'checkpoint.resume "never" needs an empty train.dir; {folder} has {shown}: use another or "auto"')
    return None

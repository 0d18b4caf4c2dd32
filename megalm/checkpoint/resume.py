"""May this run go on from that checkpoint? Pure functions of two configs, the tokenizers' files and a folder's names."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalm.checkpoint.find import Report, candidates, damage, newest
from megalm.checkpoint.format import CHECKPOINTS, TOKENIZER, read_json
from megalm.checkpoint.sealed import CheckpointError

CHECKED = ("model", "data", "tokenizer", "optimizer", "batch.global", "train.seed", "train.z_loss", "train.label_smoothing")
"""Settings that shape the numbers; a resume with others isn't the same run."""
NEWER = {"train.z_loss": 0.0, "train.label_smoothing": 0.0, "data.document_mask": False, "data.reset_positions": False,
         "model.parallel_residual": False, "model.sliding_window": None, "model.rotary_fraction": 1.0,
         "optimizer.ema_decay": None}
"""What those that a checkpoint may be older than were in its run."""
FREE = ("model.vocab_multiple", "data.cache", "tokenizer.path")
"""Among these, the ones that don't: padding never wins a logit, a cache can lie anywhere, and of a tokenizer's file the
content is compared."""
FREE_AT_START = ("model.family", "model.vocab_size", "model.dropout", "model.attention_dropout", "model.init_std")
"""Of the model section, what doesn't matter either to a run that begins with another's weights."""
TOLD = ("precision.dtype",)
"""Settings that a run may go on with, but hears of."""
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


def differences(stored: Mapping[str, Any], current: Mapping[str, Any], names: Sequence[str] = CHECKED) -> list[Difference]:
    """The settings of these names that two resolved configs (config.json's content) don't share, in the order of their paths."""
    sides = [{path: value for path, value in (_newer(side) | flatten(side)).items() if _among(path, names)}
             for side in (stored, current)]
    paths = list(dict.fromkeys([*sides[0], *sides[1]]))
    pairs = [Difference(path, sides[0].get(path, MISSING), sides[1].get(path, MISSING)) for path in paths]
    return [pair for pair in pairs if pair.stored is MISSING or pair.current is MISSING or pair.stored != pair.current]


def _newer(side: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a checkpoint may be older than, as they were in its run."""
    model = side.get("model", {})
    derived = {"model.qkv_bias": model.get("bias"), "model.mlp_bias": model.get("bias")}
    if "hidden_size" in model and "num_attention_heads" in model:
        derived["model.head_dim"] = model["hidden_size"] // model["num_attention_heads"]
    return NEWER | {path: value for path, value in derived.items() if value is not None}


def _among(path: str, names: Sequence[str]) -> bool:
    def below(name: str) -> bool:
        return path == name or path.startswith((f"{name}.", f"{name}["))

    return any(below(name) for name in names) and not any(below(name) for name in FREE)


def check_resume(checkpoint: Path, config: Any, plan: Any, tokenizer_files: Iterable[Path] = ()) -> list[Difference]:
    """Compare what a checkpoint holds of its run (config, vocabulary, tokenizer) with this run; returns what differs.

    Raises CheckpointError with every difference that shapes the numbers on its line, unless config.checkpoint.allow_changes.
    """
    stored, current = _read_object(checkpoint, "config.json"), config.model_dump(mode="json")
    found = differences(stored, current)
    return _allowed(found, checkpoint, config, plan, tokenizer_files) + differences(stored, current, TOLD)


def check_start(checkpoint: Path, config: Any, plan: Any, tokenizer_files: Iterable[Path] = ()) -> list[Difference]:
    """The same for a run that begins with the weights of a checkpoint: is it the same model? A checkpoint that has no
    tokenizer's files, as one of weights from elsewhere, may go with any of as many tokens."""
    stored, current = _read_object(checkpoint, "config.json"), config.model_dump(mode="json")
    window = ("model.seq_length",) if current["model"].get("position_embedding") == "rotary" else ()
    found = [item for item in differences(stored, current, ("model",)) if item.path not in (*FREE_AT_START, *window)]
    known = any((checkpoint / TOKENIZER).glob("*"))
    return _allowed(found, checkpoint, config, plan, tokenizer_files if known else ())


def _allowed(found: Sequence[Difference], checkpoint: Path, config: Any, plan: Any,
             tokenizer_files: Iterable[Path]) -> list[Difference]:
    """`found` and what differs of the vocabulary. Raises CheckpointError where that may not be."""
    # A size that one side states and the other takes from its tokenizer is the same size: the plans know it.
    found = [difference for difference in found if difference.path != "model.vocab_size"]
    pairs = (("the vocabulary's size", _read_object(checkpoint, "plan.json").get("vocab_size", MISSING), plan.vocab_size),
             ("the tokenizer's files", _contents((checkpoint / TOKENIZER).glob("*")), _contents(tokenizer_files)))
    found += [Difference(name, before, now) for name, before, now in pairs if before != now]
    if found and not config.checkpoint.allow_changes:
        lines = "".join(f"\n  {difference}" for difference in found)
        raise CheckpointError(f"{checkpoint} has other settings; checkpoint.allow_changes=true goes on regardless, as far as the "
                              f"weights fit:{lines}")
    return found


def replaces_all(checkpoint: Path, plan: Any) -> bool:
    """Whether loading it overwrites every initial weight: rows that only this plan's vocabulary padding has would keep theirs."""
    rows = _read_object(checkpoint, "plan.json").get("padded_vocab_size")
    return isinstance(rows, int) and rows >= plan.padded_vocab_size


def _read_object(checkpoint: Path, name: str) -> Mapping[str, Any]:
    content = read_json(checkpoint / name)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{checkpoint / name}: a JSON object expected")
    return content


def _contents(files: Iterable[Path]) -> list[str]:
    """What the files hold, whatever they are called."""
    contents = [path.read_bytes() for path in files]
    return sorted(f"{len(content)} bytes, sha256 {hashlib.sha256(content).hexdigest()[:12]}" for content in contents)


def whole(run_folder: str | Path) -> list[Path]:
    """Every whole checkpoint of a run, by what `damage` finds at a first look."""
    return [path for _, path in candidates(Path(run_folder) / CHECKPOINTS) if damage(path, read=False) is None]


def choose(run_folder: str | Path, resume: str, report: Report | None = None, damaged: Collection[Path] = ()) -> Path | None:
    """The checkpoint that a run with checkpoint.resume = "auto" or "never" goes on from; None: it starts at step 0. `damaged`:
    those that loading has found so.

    Raises CheckpointError when "never" meets a folder that holds a run, or when there are checkpoints but none is whole.
    """
    folder = Path(run_folder)
    if resume == "auto":
        return newest(folder / CHECKPOINTS, report, damaged)
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    taken = [name for name in names if name not in ALLOWED_BEFORE and not name.startswith(".")]
    if taken:
        shown = ", ".join(taken[:5]) + (", ..." if len(taken) > 5 else "")
        raise CheckpointError(f'checkpoint.resume "never" needs an empty train.dir; {folder} has {shown}: use another or "auto"')
    return None

"""metrics.jsonl: one JSON object a line, in the order of the steps."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

NAME = "metrics.jsonl"


def encode(record: dict[str, Any]) -> str:
    """One line of strict JSON; a number that isn't finite becomes null."""
    finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()}
    return json.dumps(finite, allow_nan=False)


def decode(line: str) -> dict[str, Any] | None:
    """The object of a line, None for a line that a crash cut short."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """All records of a run folder (or of a metrics.jsonl), lines cut short left out; empty if there is no such file."""
    path = Path(folder)
    path = path / NAME if path.is_dir() else path
    if not path.exists():
        return []
    return [record for line in path.read_text(encoding="utf-8").splitlines() if (record := decode(line))]


def cut_back(folder: str | Path, step: int) -> int:
    """Keep the records up to `step` and move the others to the end of metrics.jsonl.old; returns how many were moved.

    A run that goes on from a checkpoint calls this first, so that no step is there twice.
    """
    path = Path(folder) / NAME
    if not path.exists():
        return 0
    kept, moved = [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        record = decode(line)
        (kept if record and record["step"] <= step else moved).append(line)
    if not moved:
        return 0
    with open(f"{path}.old", "a", encoding="utf-8") as old:
        old.writelines(f"{line}\n" for line in moved)
        _sync(old)
    with open(f"{path}.part", "w", encoding="utf-8") as part:
        part.writelines(f"{line}\n" for line in kept)
        _sync(part)
    os.replace(f"{path}.part", path)
    return len(moved)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


class JsonLines:
    """Appends records to metrics.jsonl; each is handed to the operating system before `write` returns."""

    def __init__(self, folder: Path):
        self._file = open(folder / NAME, "a", encoding="utf-8", buffering=1)  # noqa: SIM115

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(encode(record) + "\n")

    def close(self) -> None:
        self._file.close()

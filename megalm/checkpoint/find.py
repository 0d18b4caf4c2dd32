"""Which checkpoints a folder has, and which of them are whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megalm.checkpoint import format as names
from megalm.checkpoint.format import CheckpointError, inside, read_json, step_of

Report = Callable[[str], None]
"""Takes one line for the user."""
MANIFEST_TYPES = {"step": int, "consumed_samples": int, "world_size": int, "counters": dict, "files": dict}


def read_manifest(folder: Path) -> dict[str, Any]:
    """checkpoint.json, its format and version checked. Raises CheckpointError."""
    path = folder / names.MANIFEST
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != names.FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of the format {names.FORMAT!r}")
    if manifest.get("version") != names.VERSION:
        raise CheckpointError(f"{path}: format version {manifest.get('version')!r}; this megalm reads version {names.VERSION}")
    for key, kind in MANIFEST_TYPES.items():
        if type(manifest.get(key)) is not kind:
            raise CheckpointError(f"{path}: {key!r} is missing or not of the type {kind.__name__}")
    return manifest


def fault(folder: Path, read: bool = True) -> str | None:
    """Why this folder isn't a whole checkpoint: a file missing, of another size, or JSON that can't be read. None: it is whole.

    The tensors' bytes aren't read; without `read`, nor is any JSON but checkpoint.json: there may be thousands.
    """
    try:
        manifest = read_manifest(folder)
        for name, size in manifest["files"].items():
            path = inside(folder, name)
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes, not {size}"
            if read and path.suffix == ".json" and path.parent == folder:
                read_json(path)
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        return f"{error.strerror}: {error.filename}"
    return None


def candidates(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of everything below `root` that is named as a checkpoint, the newest first.

    One that had stepped aside when a run was killed stands in for the missing one of its step.
    """
    found: dict[int, Path] = {}
    for path in root.iterdir() if root.is_dir() else ():
        step = step_of(path.name)
        if step is not None and path.is_dir():
            found[step] = path
    for path in root.glob(f"{names.REPLACED_PREFIX}step_*") if root.is_dir() else ():
        step = step_of(path.name.removeprefix(names.REPLACED_PREFIX))
        if step is not None and path.is_dir():
            found.setdefault(step, path)
    return sorted(found.items(), reverse=True)


def newest(root: Path, report: Report | None = None) -> Path | None:
    """The checkpoint that `latest` names if it is whole, else the newest whole one; None where there is none at all.

    `latest` comes first so that a user who points it to an older step goes on from there. Each one skipped is reported
    with its reason. Raises CheckpointError when there are checkpoints but none is whole.
    """
    found = candidates(root)
    named = _latest(root)
    order = sorted(found, key=lambda item: item[0] != named)
    skipped = []
    for _, folder in order:
        reason = fault(folder)
        if reason is None:
            return folder
        skipped.append(f"skipped {folder.name}: {reason}")
        if report is not None:
            report(skipped[-1])
    if skipped:
        raise CheckpointError(f"{root}: no whole checkpoint; " + "; ".join(skipped))
    return None


def _latest(root: Path) -> int | None:
    """The step that the file `latest` names; None when it is missing or says nothing of use."""
    try:
        return step_of((root / names.LATEST).read_text(encoding="utf-8").strip())
    except (OSError, UnicodeDecodeError):
        return None


def find(folder: str | Path, report: Report | None = None) -> Path:
    """The checkpoint that `folder` stands for: itself, or the newest whole one of a run's folder.

    Raises CheckpointError when there is none, or when the one named isn't whole.
    """
    folder = Path(folder)
    if (folder / names.MANIFEST).exists():
        reason = fault(folder)
        if reason is not None:
            raise CheckpointError(f"{folder}: not a whole checkpoint: {reason}")
        return folder
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    root = folder / names.CHECKPOINTS if (folder / names.CHECKPOINTS).is_dir() else folder
    path = newest(root, report)
    if path is None:
        raise CheckpointError(f"{folder}: no checkpoint here: neither {names.MANIFEST} nor {names.CHECKPOINTS}/step_*")
    return path

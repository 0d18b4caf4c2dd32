"""Which checkpoints a folder has, and which of them are whole."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from megalm.checkpoint import format as names
from megalm.checkpoint import sealed
from megalm.checkpoint.format import inside, step_of
from megalm.checkpoint.sealed import CheckpointError, DamagedError, UnreadableError

Report = Callable[[str], None]
"""Takes one line for the user."""
MANIFEST_TYPES = {"step": int, "consumed_samples": int, "world_size": int, "counters": dict, "files": dict}


def read_manifest(folder: Path) -> dict[str, Any]:
    """checkpoint.json, its format, version and hash checked. Raises CheckpointError."""
    path = folder / names.MANIFEST
    content = sealed.read(path)
    manifest = sealed.parse(content, path)
    if not isinstance(manifest, dict) or manifest.get("format") != names.FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of the format {names.FORMAT!r}")
    if manifest.get("version") != names.VERSION:
        raise CheckpointError(f"{path}: format version {manifest.get('version')!r}; this megalm reads version {names.VERSION}")
    sealed.unseal(content, path)
    for key, kind in MANIFEST_TYPES.items():
        if type(manifest.get(key)) is not kind:
            raise CheckpointError(f"{path}: {key!r} is missing or not of the type {kind.__name__}")
    if type(manifest.get("eval_loss", "missing")) not in (float, type(None)):
        raise CheckpointError(f"{path}: 'eval_loss' is missing or neither a number nor null")
    return manifest


def damage(folder: Path, read: bool = True) -> str | None:
    """Why this folder isn't a whole checkpoint: a file missing, of another size, or not what was written. None: it is whole.

    The tensors' bytes aren't read (loading checks those that it reads); without `read`, nor is any file but
    checkpoint.json: there may be thousands. Raises UnreadableError where this machine can't tell.
    """
    try:
        manifest = read_manifest(folder)
        for name, stated in manifest["files"].items():
            path, size = inside(folder, name), stated["bytes"]
            found = sealed.size(path)
            if found is None:
                return f"{name} is missing"
            if found != size:
                return f"{name} has {found} bytes, not {size}"
            if read and "xxh3" in stated:
                _check(path, stated["xxh3"])
    except UnreadableError:
        raise
    except CheckpointError as error:
        return str(error)
    except (TypeError, KeyError) as error:
        return f"{names.MANIFEST}: 'files' isn't what it should be: {type(error).__name__}: {error}"
    return None


def fault(folder: Path, read: bool = True) -> str | None:
    """The same, or why this machine can't tell: for who only asks whether it can be counted on."""
    try:
        return damage(folder, read)
    except UnreadableError as error:
        return str(error)


def _check(path: Path, xxh3: str) -> None:
    """Raise DamagedError unless the file has this hash."""
    content = sealed.read(path)
    if sealed.digest(content) == xxh3:
        return
    if path.suffix == ".json":
        sealed.parse(content, path)
    raise DamagedError(f"{path.name} isn't what was written: xxh3 {sealed.digest(content)}, not {xxh3}")


def candidates(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of everything below `root` that is named as a checkpoint, the newest first.

    One that had stepped aside when a run was killed stands in for the missing one of its step. Raises UnreadableError.
    """
    found: dict[int, Path] = {}
    try:
        paths = sorted(root.iterdir(), reverse=True) if root.is_dir() else []  # "step_" before ".old_step_"
        for path in paths:
            step = step_of(path.name.removeprefix(names.REPLACED_PREFIX))
            if step is not None and path.is_dir():
                found.setdefault(step, path)
    except OSError as error:
        raise UnreadableError(f"{root} can't be read: {error.strerror or error}") from error
    return sorted(found.items(), reverse=True)


def preferred(root: Path, report: Report | None = None) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint, in the order in which a run would go on from them: the one that `latest` names, those
    before it, the newest first, those after it. Raises UnreadableError where that can't be told."""
    named = _latest(root, report)
    return sorted(candidates(root), key=lambda item: turn(item[0], named))


def turn(step: int, named: int | None) -> tuple[bool, bool, int]:
    """The key by which steps sort into the order in which a run would go on from them, where `latest` names that one."""
    return step != named, named is not None and step > named, -step


def newest(root: Path, report: Report | None = None, damaged: Collection[Path] = ()) -> Path | None:
    """The checkpoint that `latest` names if it is whole, else the newest whole one before it, else the newest; None where there
    is none at all.

    `latest` comes first so that a user who points it to an older step goes on from there; what is newer than it is of a past
    that was left then. `damaged`: folders that loading has found damaged. Each one skipped is reported with its reason.
    Raises CheckpointError when there are checkpoints but none is whole, UnreadableError where this machine can't tell.
    """
    skipped = []
    for _, folder in preferred(root, report):
        if folder in damaged:
            skipped.append(f"skipped {folder.name}: damaged")
            continue
        reason = damage(folder)
        if reason is None:
            return folder
        skipped.append(f"skipped {folder.name}: {reason}")
        if report is not None:
            report(skipped[-1])
    if skipped:
        raise CheckpointError(f"{root}: no whole checkpoint; " + "; ".join(skipped))
    return None


def _latest(root: Path, report: Report | None = None) -> int | None:
    """The step to go on from: what `latest` was about to say when the run was killed, else what it says; None: nothing of use.

    What was about to be said counts where it is the newer of the two files: people may point `latest` elsewhere meanwhile.
    """
    if pending(root):
        return names.parse_latest(sealed.read(root / names.NEW_LATEST))[0]
    try:
        content = sealed.read(root / names.LATEST)
    except DamagedError:  # there may be none
        return None
    step, seal = names.parse_latest(content)
    if step is not None and (seal is None or _seal(root, step) in (seal, None)):
        return step
    if report is not None:
        report(f"{root / names.LATEST} names no checkpoint that is here: {content[:60]!r}")
    return None


def pending(root: Path) -> bool:
    """Whether a run was killed after its checkpoint had got its name and before `latest` named it. Raises UnreadableError."""
    try:
        step, seal = names.parse_latest(sealed.read(root / names.NEW_LATEST))
        if step is None or seal is None or _seal(root, step) != seal:
            return False
        times = [(root / name).stat().st_mtime_ns for name in (names.NEW_LATEST, names.LATEST) if (root / name).exists()]
    except (DamagedError, OSError):
        return False
    return times[0] == max(times)


def _seal(root: Path, step: int) -> str | None:
    """The xxh3 at the end of the checkpoint.json of that step; None where there is no such file, or a broken one."""
    try:
        return sealed.seal_of(sealed.read(root / names.step_name(step) / names.MANIFEST))
    except DamagedError:
        return None


def find(folder: str | Path, report: Report | None = None) -> Path:
    """The checkpoint that `folder` stands for: itself, or the newest whole one of a run's folder.

    Raises CheckpointError when there is none, or when the one named isn't whole.
    """
    folder = Path(folder)
    if sealed.size(folder / names.MANIFEST) is not None:
        reason = damage(folder)
        if reason is not None:
            raise CheckpointError(f"{folder}: not a whole checkpoint: {reason}")
        return folder
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: {'not a' if folder.exists() else 'no such'} folder")
    root = folder / names.CHECKPOINTS if (folder / names.CHECKPOINTS).is_dir() else folder
    path = newest(root, report)
    if path is None:
        raise CheckpointError(f"{folder}: no checkpoint here: neither {names.MANIFEST} nor {names.CHECKPOINTS}/step_*")
    return path

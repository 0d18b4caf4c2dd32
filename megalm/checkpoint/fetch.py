"""A checkpoint from other storage back into the run's own folder: under a hidden name, complete, verified and on the disk before
it has its own. A fetch that ends early is gone on with by the next: files that are complete stay.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from megalm.checkpoint import sealed
from megalm.checkpoint.attempts import attempt, refused, told
from megalm.checkpoint.disk import Disk
from megalm.checkpoint.find import Report, candidates, damage, preferred, read_manifest
from megalm.checkpoint.format import CHECKPOINTS, MANIFEST, REPLACED_PREFIX, TEMPORARY_PREFIX, inside, step_name
from megalm.checkpoint.publish import replace
from megalm.checkpoint.remote import Remote
from megalm.checkpoint.sealed import CheckpointError, DamagedError
from megalm.checkpoint.verify import size, verify

T = TypeVar("T")
PROBLEMS_SHOWN = 3
DOCUMENTS = ("config.json", "plan.json")
"""What a run has of these beside its checkpoints is the same as in its last one."""
PART = TEMPORARY_PREFIX + "part"
"""The file that is being copied."""


def fetch_missing(run_folder: str | Path, url: str, resume: str, report: Report, damaged: Sequence[Path] = (),
                  tell: Report = lambda line: None) -> Path | None:
    """Copy from checkpoint.remote what a run would go on from, were it whole here; returns it. Where none is whole here, that is
    what a run would go on from there. The settings that it ran with come along, for a run that is finished and writes none.

    `damaged`: those that loading has found so; one that is so twice was fetched in vain. `tell` hears of what takes long.
    Raises CheckpointError for a URL that can't be, or that can't be written, or that doesn't answer when it is needed.
    """
    remote, root = Remote(url), Path(run_folder) / CHECKPOINTS
    reasons, steps = _wanted(root, damaged) if resume == "auto" else ([], [])
    if not damaged:
        _reach(remote, report, must=steps != [] or resume != "auto")
    vain = {step for step, folder in candidates(root) if damaged.count(folder) > 1}
    found = fetch(remote, root, report, steps, vain=vain, tell=tell) if steps != [] else None
    if found is None:
        return None
    for line in reasons:
        report(line)
    for name in DOCUMENTS:
        if not (Path(run_folder) / name).exists():
            _copy(found / name, Path(run_folder) / name, Disk())
    return found


def _copy(source: Path, target: Path, disk: Disk) -> None:
    part = target.with_name(PART)
    disk.remove(part)
    disk.write(part, [source.read_bytes()])
    disk.rename(part, target)


def _wanted(root: Path, damaged: Sequence[Path]) -> tuple[list[str], list[int] | None]:
    """Why a run can't go on from what it would, and the steps of those to fetch instead, the first that can be: none where
    it can; None: whatever there is, as none is whole here."""
    reasons, steps = [], []
    for step, folder in preferred(root):
        reason = "damaged" if folder in damaged else damage(folder)
        if reason is None:
            return reasons, steps
        reasons.append(f"skipped {folder.name}: {reason}")
        steps.append(step)
    return reasons, None


def _reach(remote: Remote, report: Report, must: bool) -> None:
    """Find out before the training, and not after its first hours, whether checkpoints can be copied there. Where the storage
    only doesn't answer, and what the run goes on from is here (not `must`), it may later. By rank 0, for its own machine."""
    try:
        attempt(remote.check)
    except Exception as error:  # each storage's library has its own
        line = f"checkpoint.remote {remote.url!r} can't be written: {told(error)}"
        if must or refused(error):
            raise CheckpointError(f"{line}; checkpoint.remote=null trains without copies") from error
        report(f"{line}; it is tried again with every checkpoint")


def fetch(remote: Remote, root: Path, report: Report, steps: Iterable[int] | None = None, *, vain: Collection[int] = (),
          disk: Disk | None = None, tell: Report = lambda line: None) -> Path | None:
    """Copy the first of these steps (default: all but the `vain` ones, in Remote.steps' order) that is complete and sound there
    into `root`, as a checkpoint like those made there; None where none is.

    One with a file that is lost, or isn't what was written, is skipped with a line. `tell` hears of what takes long. Raises
    CheckpointError where the storage doesn't answer, as what it has may be sound, and where none of all that are there is whole.
    """
    disk, skipped = disk or Disk(), []
    there = _attempt(remote.url, remote.steps)
    wanted = there if steps is None else steps
    for step in [step for step in wanted if step in there and step not in vain]:
        temporary = root / f"{TEMPORARY_PREFIX}{step_name(step)}.fetched"
        try:
            problem = _download(remote, step, temporary, disk, tell)
        except DamagedError as error:
            problem = str(error)
        if problem is None:
            # Deleting what is replaced takes long, and a death meanwhile must cost neither.
            disk.remove(root / (REPLACED_PREFIX + step_name(step)))
            replace(root / step_name(step), temporary, disk)
            disk.sync_folder(root)
            disk.sync_folder(root.parent)
            disk.remove(root / (REPLACED_PREFIX + step_name(step)))
            report(f"fetched {remote.url}/{step_name(step)}")
            return root / step_name(step)
        skipped.append(f"{step_name(step)}: {problem}")
        report(f"skipped {remote.url}/{skipped[-1]}")
        disk.remove(temporary)
    if skipped and steps is None:
        raise CheckpointError(f"none of the checkpoints in {remote.url} is whole ({'; '.join(skipped)}); move them away, or set "
                              "checkpoint.remote to another place, to begin without them")
    return None


def _download(remote: Remote, step: int, folder: Path, disk: Disk, tell: Report) -> str | None:
    """All files of a step, on the disk and verified; what is wrong with it there, or None."""
    content = _attempt(f"{remote.url}/{step_name(step)}/{MANIFEST}", lambda: remote.manifest(step))
    if sealed.size(folder / MANIFEST) is None or sealed.read(folder / MANIFEST) != content:
        disk.remove(folder)  # of a checkpoint that was replaced there meanwhile, if of any
        disk.make_folder(folder)
        disk.write(folder / MANIFEST, [content])
    kept = _copy_files(remote, step, folder, disk, tell)
    problems = verify(folder).problems
    if problems and kept:  # a disk that has lost what it had: all of it once more
        for name in kept:
            disk.remove(inside(folder, name))
        _copy_files(remote, step, folder, disk, tell)
        problems = verify(folder).problems
    return "; ".join(problems[:PROBLEMS_SHOWN]) or None


def _copy_files(remote: Remote, step: int, folder: Path, disk: Disk, tell: Report) -> list[str]:
    """Copy what isn't here yet; returns the names of the files that were."""
    manifest = read_manifest(folder)
    files = manifest["files"]
    kept = [name for name, stated in files.items() if sealed.size(inside(folder, name)) == stated["bytes"]]
    missing = [name for name in files if name not in kept]
    number, total = size(folder, manifest)
    tell(f"fetching {remote.url}/{step_name(step)}: {total:,} bytes in {number} files"
         + (f", of which {len(kept)} are here already" if kept else ""))
    part = folder / PART
    disk.remove(part)
    for name in missing:
        path = inside(folder, name)
        disk.make_folder(path.parent)
        _attempt(f"{remote.url}/{step_name(step)}/{name}", lambda name=name: remote.get(step, name, part))
        _sync(part, disk)
        disk.rename(part, path)
    for parent in {folder, *(inside(folder, name).parent for name in files)}:
        disk.sync_folder(parent)
    return kept


def _sync(path: Path, disk: Disk) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        disk.sync(handle)
    finally:
        os.close(handle)


def _attempt(what: str, work: Callable[[], T]) -> T:
    """The result of what the storage is asked. Raises DamagedError where it says that there is no such file, CheckpointError
    for anything else that is so several times."""
    try:
        return attempt(work)
    except FileNotFoundError as error:
        raise DamagedError(f"{what.rpartition('/')[2]} is missing") from error
    except Exception as error:  # each storage's library has its own
        raise CheckpointError(f"{what} can't be fetched: {told(error)}. What is here of it stays, and the same command goes on "
                              "from there; checkpoint.remote=null goes on from what train.dir has") from error

"""A checkpoint from other storage back into the run's own folder: under a hidden name, complete, verified and on the disk before
it has its own. A fetch that ends early is gone on with by the next: files that are complete stay.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import TypeVar

from megalm.checkpoint import sealed
from megalm.checkpoint.disk import Disk
from megalm.checkpoint.find import Report, read_manifest
from megalm.checkpoint.format import MANIFEST, REPLACED_PREFIX, TEMPORARY_PREFIX, inside, step_name
from megalm.checkpoint.publish import replace
from megalm.checkpoint.remote import Remote
from megalm.checkpoint.sealed import CheckpointError, DamagedError
from megalm.checkpoint.verify import size, verify

T = TypeVar("T")
PROBLEMS_SHOWN = 3
PAUSES = (1.0, 5.0)
"""Seconds before a file that couldn't be copied is tried again."""
PART = TEMPORARY_PREFIX + "part"
"""The file that is being copied."""


def fetch(remote: Remote, root: Path, report: Report, steps: Iterable[int] | None = None, *, vain: Collection[int] = (),
          disk: Disk | None = None, tell: Report = lambda line: None) -> Path | None:
    """Copy the first of these steps (default: of all but the `vain` ones, the newest first) that is complete and sound there
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
    for pause in (*PAUSES, None):
        try:
            return work()
        except FileNotFoundError as error:
            raise DamagedError(f"{what.rpartition('/')[2]} is missing") from error
        except Exception as error:  # each storage's library has its own
            if pause is None:
                line = " ".join(f"{type(error).__name__}: {error}".split())
                raise CheckpointError(f"{what} can't be fetched: {line}. What is here of it stays, and the same command goes on "
                                      "from there; checkpoint.remote=null goes on from what train.dir has") from error
        time.sleep(pause)
    raise AssertionError

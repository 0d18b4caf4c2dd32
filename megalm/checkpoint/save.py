"""Write a checkpoint so that it is either whole or invisible.

Every rank writes its owned fragments into a temporary folder on the same file system; when all of them have, rank 0 adds
what describes the whole, checkpoint.json last, renames the folder and then replaces `latest`. A failure anywhere is known
to every rank before anything of the previous checkpoint is touched.
"""

from __future__ import annotations

import errno
import importlib.metadata
import json
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from megalm.checkpoint import boxes
from megalm.checkpoint.disk import Disk
from megalm.checkpoint.find import Report, candidates, fault
from megalm.checkpoint.format import (
    CHECKPOINTS,
    DELETED_PREFIX,
    FORMAT,
    LATEST,
    MANIFEST,
    REPLACED_PREFIX,
    TEMPORARY_PREFIX,
    TOKENIZER,
    VERSION,
    CheckpointError,
    StoredFragment,
    describe,
    index_file,
    json_bytes,
    parse_index,
    rank_file,
    safetensors_chunks,
    step_name,
)
from megalm.checkpoint.fragment import Fragment

NOT_SHARED = "train.dir must be on a file system that all ranks share"
NEW_LATEST = TEMPORARY_PREFIX + LATEST
LIBRARIES = ("megalm", "torch", "deepspeed", "safetensors", "numpy")


class Engine(Protocol):
    """What a checkpoint needs of an engine."""

    def fragments(self) -> list[Fragment]: ...

    def counters(self) -> dict[str, Any]: ...

    def refresh(self, counters: Mapping[str, Any]) -> None: ...


class Ranks(Protocol):
    """What a checkpoint needs of the process groups."""

    rank: int

    @property
    def world_size(self) -> int: ...

    def agree(self, problem: str | None) -> list[tuple[int, str]]: ...


def save(run_folder: str | Path, step: int, consumed_samples: int, engine: Engine, groups: Ranks, config: Any, plan: Any,
         tokenizer_files: Sequence[Path] = (), *, disk: Disk | None = None, report: Report | None = None) -> Path:
    """Save the state after `step` optimizer steps as run_folder/checkpoints/step_XXXXXXXX; all ranks call it together.

    `consumed_samples`: how many training samples these steps have drawn. Older checkpoints beyond config.checkpoint.keep are
    deleted at the end; one that can't be is only reported.
    Raises CheckpointError on every rank when any rank failed: nothing of the new checkpoint is left, and the previous one
    and `latest` are as they were; or, where only `latest` couldn't be replaced, that the new one is whole.
    """
    disk = disk or Disk()
    root = Path(run_folder) / CHECKPOINTS
    temporary = root / (TEMPORARY_PREFIX + step_name(step))
    attempt = _Attempt(groups, disk, root, step)
    attempt.rank_0("preparing the folder", lambda: _prepare(root, temporary, disk))
    attempt.together("writing its part", lambda: _write_rank(temporary, engine, attempt))
    manifest = {
        "format": FORMAT, "version": VERSION, "step": step,
        "consumed_samples": consumed_samples,
        "world_size": groups.world_size,
        "layout": {name: getattr(plan, name) for name in ("tp", "pp", "dp", "zero_stage", "sequence_parallel")},
        "counters": engine.counters(), "versions": versions(),
    }
    documents = {"config.json": config.model_dump(mode="json"), "plan.json": plan.to_dict()}
    attempt.rank_0("describing it", lambda: _describe_whole(temporary, manifest, documents, tokenizer_files, disk))
    attempt.rank_0("publishing it", lambda: _publish(root, temporary, step, disk))
    attempt.published = True
    attempt.rank_0("pointing latest to it", lambda: _point_latest(root, disk))
    if groups.rank == 0:
        _retire(root, step, config.checkpoint.keep, disk, report)
    return root / step_name(step)


class _Attempt:
    """One save as one rank sees it: runs a stage of it and lets all ranks learn how it went everywhere."""

    def __init__(self, groups: Ranks, disk: Disk, root: Path, step: int) -> None:
        self.groups, self.disk, self.root, self.step = groups, disk, root, step
        self.needed, self.published = 0, False

    def together(self, doing: str, work: Callable[[], None]) -> None:
        """Run this rank's share of a stage; raise CheckpointError on all ranks if any failed, the rubbish removed."""
        problem, cause = None, None
        try:
            work()
        except Exception as error:  # whatever it is, the others wait for an answer
            problem, cause = f"{doing}: {self.reason(error)}", error
        problems = self.groups.agree(problem)
        if not problems:
            return
        if self.groups.rank == 0:
            _clean_quietly(self.root, self.disk)
        lines = "; ".join(f"rank {rank} failed {text}" for rank, text in problems)
        name = self.root / step_name(self.step)
        if self.published:
            text = f"{name} is saved and whole, but {lines}. A resume may begin at an earlier checkpoint"
        else:
            text = f"{name} wasn't saved: {lines}. Earlier checkpoints are as they were"
        raise CheckpointError(text) from cause

    def rank_0(self, doing: str, work: Callable[[], None]) -> None:
        """`together` for a stage in which only rank 0 works."""
        self.together(doing, work if self.groups.rank == 0 else lambda: None)

    def reason(self, error: Exception) -> str:
        """The error in one line; for one of the file system with the bytes needed and free."""
        if not isinstance(error, OSError):
            return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
        name = errno.errorcode.get(error.errno, "OSError") if error.errno else type(error).__name__
        where = f" ({error.filename})" if error.filename else ""
        needed = f", {self.needed:,} bytes needed" if self.needed else ""
        return f"{error.strerror or error} [{name}]{where}{needed}, {_free_bytes(self.root)} bytes free"


def _free_bytes(folder: Path) -> str:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return f"{shutil.disk_usage(folder).free:,}"
    except OSError:
        return "an unknown number"


def _prepare(root: Path, temporary: Path, disk: Disk) -> None:
    disk.make_folder(root)
    clean(root, disk)
    disk.make_folder(temporary)


def clean(root: Path, disk: Disk) -> None:
    """Remove what killed or failed saves left; give a checkpoint its name back that was stepping aside for one of them."""
    for path in sorted(root.glob(f"{REPLACED_PREFIX}*")):
        original = root / path.name.removeprefix(REPLACED_PREFIX)
        if fault(path) is None and (not original.exists() or fault(original) is not None):
            disk.remove(original)
            disk.rename(path, original)
        else:
            disk.remove(path)
    for prefix in (TEMPORARY_PREFIX, DELETED_PREFIX):
        for path in sorted(root.glob(f"{prefix}*")):
            disk.remove(path)


def _clean_quietly(root: Path, disk: Disk) -> None:
    try:
        clean(root, disk)
    except OSError:
        return  # the disk is failing; what stays has a hidden name that nobody reads, and the next save tries again


def _write_rank(temporary: Path, engine: Engine, attempt: _Attempt) -> None:
    """This rank's owned fragments: the index first, because it is small, then the tensors."""
    rank, disk = attempt.groups.rank, attempt.disk
    if not temporary.is_dir():
        raise CheckpointError(f"{temporary}, which rank 0 has made, isn't there: {NOT_SHARED}")
    owned = [fragment for fragment in engine.fragments() if fragment.owned and fragment.count]
    entries = describe(owned, rank_file(rank))
    index = json_bytes({"rank": rank, "file": rank_file(rank), "fragments": [entry.to_json() for entry in entries]})
    attempt.needed = len(index) + sum(fragment.count * fragment.tensor.element_size() for fragment in owned)
    disk.write(temporary / index_file(rank), [index])
    tensors = [(entry, fragment.tensor) for entry, fragment in zip(entries, owned, strict=True)]
    disk.write(temporary / rank_file(rank), safetensors_chunks(tensors))


def _describe_whole(temporary: Path, manifest: Mapping[str, Any], documents: Mapping[str, Any], tokenizer_files: Sequence[Path],
                    disk: Disk) -> None:
    """The files that belong to no rank, and checkpoint.json last, with the size of every file beside it."""
    ranks = range(manifest["world_size"])
    _check_ranks(temporary, ranks)
    # By name rather than by listing the folder: a network file system may list what it remembers.
    files = {name: (temporary / name).stat().st_size for rank in ranks for name in (rank_file(rank), index_file(rank))}
    for name, document in documents.items():
        files[name] = disk.write(temporary / name, [(json.dumps(document, indent=2) + "\n").encode()])
    if tokenizer_files:
        folder = temporary / TOKENIZER
        disk.make_folder(folder)
        for source in map(Path, tokenizer_files):
            files[f"{TOKENIZER}/{source.name}"] = disk.copy(source, folder / source.name)
        disk.sync_folder(folder)
    disk.write(temporary / MANIFEST, [json_bytes({**manifest, "files": files})])
    disk.sync_folder(temporary)


def _check_ranks(temporary: Path, ranks: range) -> None:
    """Every rank's files are here, and together they hold every element of every part exactly once."""
    stored: dict[tuple[str, str], list[StoredFragment]] = {}
    for rank in ranks:
        if not (temporary / rank_file(rank)).is_file():
            raise CheckpointError(f"{rank_file(rank)} isn't there: {NOT_SHARED}")
        for entry in parse_index(temporary, index_file(rank)):
            stored.setdefault((entry.part, entry.role), []).append(entry)
    for (part, role), entries in stored.items():
        problem = boxes.untiled(entries)
        assert problem is None, f"{role} of {part}: the ranks don't own every element exactly once: {problem}"


def _publish(root: Path, temporary: Path, step: int, disk: Disk) -> None:
    """Rename the folder to its name. What `latest` will say is written before, when failing is harmless."""
    final, aside = root / step_name(step), root / (REPLACED_PREFIX + step_name(step))
    disk.write(root / NEW_LATEST, [f"{final.name}\n".encode()])
    if final.exists():
        disk.rename(final, aside)
    disk.rename(temporary, final)


def _point_latest(root: Path, disk: Disk) -> None:
    """Replace `latest` once the new folder's name is on the disk."""
    disk.sync_folder(root)
    disk.rename(root / NEW_LATEST, root / LATEST)
    disk.sync_folder(root)


def _retire(root: Path, step: int, keep: int, disk: Disk, report: Report | None) -> None:
    """Delete what is older than the `keep` newest whole checkpoints up to `step`, the one just saved.

    Later steps belong to a branch that the user went back from; they stay until the run overwrites them.
    """
    try:
        disk.remove(root / (REPLACED_PREFIX + step_name(step)))
        whole = 0
        for _, folder in [item for item in candidates(root) if item[0] <= step]:
            if whole < max(keep, 1):
                whole += fault(folder, read=False) is None
                continue
            doomed = root / (DELETED_PREFIX + folder.name)
            disk.rename(folder, doomed)
            disk.remove(doomed)
    except OSError as error:
        if report is not None:
            report(f"an old checkpoint in {root} couldn't be deleted: {error}")


def versions() -> dict[str, str]:
    """Of Python and the libraries that shape the state; one that isn't installed is left out."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found

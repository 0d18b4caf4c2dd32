"""From the ranks' parts to a checkpoint with a name: what rank 0 does once every rank's part is on the disk."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megalm.checkpoint import boxes, sealed
from megalm.checkpoint.disk import Disk
from megalm.checkpoint.find import damage, pending
from megalm.checkpoint.format import (
    DELETED_PREFIX,
    LATEST,
    MANIFEST,
    NEW_LATEST,
    REPLACED_PREFIX,
    TEMPORARY_PREFIX,
    TOKENIZER,
    StoredFragment,
    index_file,
    latest_text,
    open_index,
    rank_file,
    step_name,
)
from megalm.checkpoint.sealed import CheckpointError

NOT_SHARED = "train.dir must be on a file system that all ranks share"


def describe_whole(temporary: Path, manifest: Mapping[str, Any], documents: Mapping[str, Any], tokenizer_files: Sequence[str],
                   disk: Disk, more: Mapping[str, Path] | None = None) -> None:
    """The files that belong to no rank, and checkpoint.json last, with size and hash of every file beside it.

    `more`: {name in the folder: file to copy}.
    """
    files = _check_ranks(temporary, manifest["world_size"])
    for name, document in documents.items():
        content = (json.dumps(document, indent=2) + "\n").encode()
        files[name] = {"bytes": disk.write(temporary / name, [content]), "xxh3": sealed.digest(content)}
    copies = {f"{TOKENIZER}/{Path(source).name}": Path(source) for source in tokenizer_files} | dict(more or {})
    for folder in {(temporary / name).parent for name in copies}:
        disk.make_folder(folder)
    for name, source in copies.items():
        content = source.read_bytes()
        files[name] = {"bytes": disk.write(temporary / name, [content]), "xxh3": sealed.digest(content)}
    for folder in {(temporary / name).parent for name in copies}:
        disk.sync_folder(folder)
    disk.write(temporary / MANIFEST, [sealed.seal({**manifest, "files": files})])
    disk.sync_folder(temporary)


def _check_ranks(temporary: Path, world_size: int) -> dict[str, dict[str, Any]]:
    """Every rank's files are here, and together they hold every element of every part exactly once; size and hash of each.

    By name rather than by listing the folder: a network file system may list what it remembers.
    """
    files: dict[str, dict[str, Any]] = {}
    stored: dict[tuple[str, str], list[StoredFragment]] = {}
    for rank in range(world_size):
        tensors, index = temporary / rank_file(rank), temporary / index_file(rank)
        if not tensors.is_file() or not index.is_file():
            raise CheckpointError(f"{rank_file(rank)} isn't there: {NOT_SHARED}")
        content, entries = open_index(temporary, index.name)
        size = tensors.stat().st_size
        if size != content["bytes"]:
            raise CheckpointError(f"{tensors.name} has {size} bytes, not {content['bytes']}")
        files[tensors.name] = {"bytes": size}  # its blocks' hashes are in the index
        text = sealed.read(index)
        files[index.name] = {"bytes": len(text), "xxh3": sealed.digest(text)}
        for entry in entries:
            stored.setdefault((entry.part, entry.role), []).append(entry)
    for (part, role), entries in stored.items():
        problem = boxes.untiled(entries)
        assert problem is None, f"{role} of {part}: the ranks don't own every element exactly once: {problem}"
    return files


def publish(root: Path, temporary: Path, step: int, disk: Disk) -> None:
    """Rename the folder to its name. What `latest` will say is on the disk before, when failing is harmless: after a crash
    between the two it tells that this checkpoint, and not the one that `latest` still names, is to go on from."""
    final = root / step_name(step)
    disk.remove(root / NEW_LATEST)
    seal = sealed.seal_of((temporary / MANIFEST).read_bytes())
    assert seal is not None
    disk.write(root / NEW_LATEST, [latest_text(final.name, seal)])
    disk.sync_folder(root)
    disk.sync_folder(root.parent)
    replace(final, temporary, disk)


def replace(final: Path, temporary: Path, disk: Disk) -> None:
    """Give the folder its name; one that has it steps aside, to be removed by `clean`."""
    if final.exists():
        disk.rename(final, final.with_name(REPLACED_PREFIX + final.name))
    disk.rename(temporary, final)


def point_latest(root: Path, disk: Disk) -> None:
    """Replace `latest` once the new folder's name is on the disk."""
    disk.sync_folder(root)
    disk.rename(root / NEW_LATEST, root / LATEST)
    disk.sync_folder(root)


def clean(root: Path, disk: Disk) -> None:
    """Remove what killed or failed saves left; give a checkpoint its name back that was stepping aside for one of them.

    A `latest` that a killed run had yet to point to its last checkpoint is pointed to it. Raises UnreadableError, with nothing
    removed that may be sound.
    """
    if not root.is_dir():
        return
    for path in sorted(root.glob(f"{REPLACED_PREFIX}*")):
        original = root / path.name.removeprefix(REPLACED_PREFIX)
        if damage(path) is None and (not original.exists() or damage(original) is not None):
            disk.remove(original)
            disk.rename(path, original)
        else:
            disk.remove(path)
    if pending(root):
        point_latest(root, disk)
    for prefix in (TEMPORARY_PREFIX, DELETED_PREFIX):
        for path in sorted(root.glob(f"{prefix}*")):
            disk.remove(path)

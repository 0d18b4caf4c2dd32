"""Reading a checkpoint for people: what it holds, whether every byte is what was written, how two of them differ. No torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalm.checkpoint import boxes, sealed
from megalm.checkpoint.find import damage, read_manifest
from megalm.checkpoint.format import MANIFEST, StoredFragment, index_file, inside, open_index
from megalm.checkpoint.sealed import CheckpointError, UnreadableError


@dataclass
class Tensor:
    """One part in one role, over all ranks. `bytes`: of its elements; `pieces`: in how many fragments they are stored."""

    part: str
    role: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    pieces: int


def tensors(folder: Path) -> list[Tensor]:
    """What a checkpoint holds, in the order of its files. Raises CheckpointError."""
    found: dict[tuple[str, str], Tensor] = {}
    for rank in range(read_manifest(folder)["world_size"]):
        for entry in open_index(folder, index_file(rank))[1]:
            new = Tensor(entry.part, entry.role, entry.dtype, entry.full_shape, 0, 0)
            tensor = found.setdefault((entry.part, entry.role), new)
            tensor.bytes += entry.bytes
            tensor.pieces += 1
    return list(found.values())


@dataclass
class Verified:
    """What `verify` has read, and each thing that is wrong, in one line."""

    files: int
    bytes: int
    problems: list[str]


def verify(folder: Path) -> Verified:
    """Read every byte of a checkpoint and compare it with its hash; also whether the parts are complete, and whether the
    safetensors headers say what the indices say. Raises UnreadableError for what this machine can't read now."""
    problem = damage(folder)
    if problem:
        return Verified(0, 0, [problem])
    manifest = read_manifest(folder)
    problems: list[str] = []
    stored: dict[tuple[str, str], list[StoredFragment]] = {}
    for rank in range(manifest["world_size"]):
        try:
            index, entries = open_index(folder, index_file(rank))
            for entry in entries:
                stored.setdefault((entry.part, entry.role), []).append(entry)
            problems += [f"{index['file']}: {line}" for line in _verify_file(inside(folder, index["file"]), index, entries)]
        except UnreadableError:
            raise
        except CheckpointError as error:
            problems.append(str(error))
        except OSError as error:
            found = sealed.unreadable(error, str(folder / index_file(rank)))
            if isinstance(found, UnreadableError):
                raise found from error
            problems.append(str(found))
    for (part, role), entries in stored.items():
        line = boxes.untiled(entries)
        problems += [f"{role} of {part}: {line}"] if line else []
    return Verified(*size(folder, manifest), problems)


def size(folder: Path, manifest: Mapping[str, Any]) -> tuple[int, int]:
    """How many files a checkpoint has, and their bytes, checkpoint.json among them. Raises UnreadableError."""
    own = sealed.size(folder / MANIFEST) or 0
    return len(manifest["files"]) + 1, sum(entry["bytes"] for entry in manifest["files"].values()) + own


def _verify_file(path: Path, index: dict[str, Any], entries: list[StoredFragment]) -> Iterator[str]:
    """Header and every block of one safetensors file. Raises OSError."""
    with open(path, "rb") as file:
        begin = file.read(index["header_bytes"])
        if sealed.digest(begin) != index["header_xxh3"]:
            yield f"its header, bytes 0 to {len(begin):,}, isn't what was written"
            return
        header = json.loads(begin[8:])
        reached = len(begin)
        for entry in entries:
            told = {"dtype": entry.dtype, "shape": [entry.count],
                    "data_offsets": [entry.offset - len(begin), entry.offset - len(begin) + entry.bytes]}
            if header.get(entry.key) != told or entry.offset != reached:
                yield f"{entry.key}: header and index don't say the same"
                return
            for number, expected in enumerate(entry.xxh3):
                start = number * sealed.BLOCK_BYTES
                block = file.read(min(sealed.BLOCK_BYTES, entry.bytes - start))
                if sealed.digest(block) != expected:
                    yield f"{entry.key}: bytes {start:,} to {start + len(block):,} aren't what was written"
            reached += entry.bytes
        if reached != os.fstat(file.fileno()).st_size:
            yield f"{os.fstat(file.fileno()).st_size - reached:,} bytes after its last tensor"

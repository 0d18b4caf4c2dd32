"""The files of a checkpoint: their names, their JSON, and the checks that make them safe to open. README.md has the format.

Nothing here executes what a file says: JSON, and safetensors, whose header is JSON too. A file name found in one is used
only if it stays inside the checkpoint's folder. Nothing here needs torch: the process that writes checkpoints has none.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from megalm.checkpoint import boxes, sealed
from megalm.checkpoint.sealed import CheckpointError, DamagedError

FORMAT = "megalm.checkpoint"
VERSION = 2
MANIFEST = "checkpoint.json"
LATEST = "latest"
CHECKPOINTS = "checkpoints"
TOKENIZER = "tokenizer"
TEMPORARY_PREFIX = ".tmp_"
"""Being written; whatever has this name after a crash is rubbish."""
DELETED_PREFIX = ".deleted_"
"""Being deleted."""
REPLACED_PREFIX = ".old_"
"""A whole checkpoint that steps aside while another of the same step takes its name."""
NEW_LATEST = TEMPORARY_PREFIX + LATEST
"""What `latest` will say; there from before a checkpoint has its name until `latest` names it."""
ALIGNMENT = 64
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Bytes of an element, by the dtypes' names in safetensors."""
ROLES = ("master", "weight", "exp_avg", "exp_avg_sq", "momentum", "ema")


def step_name(step: int) -> str:
    """The folder's name: step_00000100."""
    return f"step_{step:08d}"


def step_of(name: str) -> int | None:
    """The step of a checkpoint folder's name; None for any other name."""
    match = re.fullmatch(r"step_(\d{8,})", name)
    return int(match.group(1)) if match else None


def rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def index_file(rank: int) -> str:
    return f"rank_{rank:05d}.json"


def latest_text(name: str, seal: str) -> bytes:
    """The content of `latest`: the folder's name, and on a second line the xxh3 at the end of its checkpoint.json."""
    return f"{name}\nxxh3 {seal}\n".encode()


def parse_latest(content: bytes) -> tuple[int | None, str | None]:
    """The step that the content of `latest` names, and the xxh3 that its checkpoint.json must end with: None where people
    wrote a name alone. (None, None) when it is neither."""
    match = re.fullmatch(rb"(step_\d{8,})\s*(?:\nxxh3 ([0-9a-f]{16})\n)?", content)
    if match is None:
        return None, None
    return step_of(match[1].decode()), match[2] and match[2].decode()


def inside(folder: Path, name: Any) -> Path:
    """folder/name, for a name that a file supplied. Raises CheckpointError when it would lead out of the folder."""
    pure = PurePosixPath(name) if isinstance(name, str) else None
    if pure is None or not pure.parts or pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name:
        raise CheckpointError(f"{folder}: {name!r} isn't the name of a file inside the checkpoint")
    path = folder / pure
    if not path.resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(f"{folder}: {name!r} leads out of the checkpoint")
    return path


def read_json(path: Path) -> Any:
    """A JSON file's content. Raises DamagedError when it is missing, unreadable or not JSON."""
    return sealed.parse(sealed.read(path), path)


@dataclass(frozen=True)
class StoredFragment:
    """One tensor of a rank's file, and which elements of which part it holds (see Fragment).

    `dtype`: a key of ITEM_BYTES. `offset`: the tensor's first byte in the file. `xxh3`: the hashes of its blocks.
    """

    file: str
    key: str
    part: str
    role: str
    dtype: str
    full_shape: tuple[int, ...]
    dim: int | None
    low: int
    high: int
    start: int
    count: int
    step: int | None
    offset: int = 0
    xxh3: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """How many bytes the tensor has."""
        return self.count * ITEM_BYTES[self.dtype]

    def to_json(self) -> dict[str, Any]:
        """As an entry of the rank's index."""
        return {name: getattr(self, name) for name in FIELDS}


FIELDS = tuple(field.name for field in dataclasses.fields(StoredFragment) if field.name != "file")


def arrange(entries: Sequence[StoredFragment]) -> tuple[bytes, list[StoredFragment]]:
    """The beginning of a safetensors file of these tensors, and the entries in its order, with their offsets.

    The layout (https://github.com/huggingface/safetensors): header length as little-endian u64, a JSON header padded with
    spaces, then the tensors with no gap between them. The sort makes each start at a multiple of its element's size.
    """
    header: dict[str, Any] = {"__metadata__": {"format": FORMAT, "version": str(VERSION)}}
    ordered = sorted(entries, key=lambda entry: -ITEM_BYTES[entry.dtype])
    offsets, end = [], 0
    for entry in ordered:
        header[entry.key] = {"dtype": entry.dtype, "shape": [entry.count], "data_offsets": [end, end + entry.bytes]}
        offsets.append(end)
        end += entry.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    begin = len(text).to_bytes(8, "little") + text
    placed = zip(ordered, offsets, strict=True)
    return begin, [dataclasses.replace(entry, offset=len(begin) + offset) for entry, offset in placed]


def parse_index(folder: Path, name: str, xxh3: str | None = None) -> list[StoredFragment]:
    """The fragments that a rank's JSON index lists, hash and numbers checked. Raises CheckpointError."""
    return list(open_index(folder, name, xxh3)[1])


def open_index(folder: Path, name: str, xxh3: str | None = None) -> tuple[dict[str, Any], list[StoredFragment]]:
    """A rank's index: its content, and the fragments that it lists. `xxh3`: the file's, if known. Raises CheckpointError."""
    path = inside(folder, name)
    text = sealed.read(path)
    content = sealed.unseal(text, path)
    if xxh3 not in (None, sealed.digest(text)):
        raise DamagedError(f"{name} isn't what was written: xxh3 {sealed.digest(text)}, not {xxh3}")
    try:
        file, size = content["file"], content["bytes"]
        inside(folder, file)
        if content["block_bytes"] != sealed.BLOCK_BYTES or type(size) is not int:
            raise ValueError(f"bytes {size!r} in blocks of {content['block_bytes']!r}")
        return content, [_parse_fragment(entry, file, size) for entry in content["fragments"]]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{path}: not the index of a rank's file: {type(error).__name__}: {error}") from error


def _parse_fragment(entry: Mapping[str, Any], file: str, size: int) -> StoredFragment:
    """An entry of an index. `size`: of the file, in bytes: shapes are believed when memory is made for them."""
    key, numbers = entry["key"], {name: entry[name] for name in ("low", "high", "start", "count", "offset")}
    optional = {name: entry[name] for name in ("dim", "step")}
    shape = tuple(entry["full_shape"])
    integers = [*numbers.values(), *shape, *(value for value in optional.values() if value is not None)]
    if any(type(value) is not int for value in integers):
        raise ValueError(f"{key!r}: a number isn't an integer")
    if entry["role"] not in ROLES or not isinstance(entry["part"], str) or not isinstance(key, str):
        raise ValueError(f"{key!r}: role {entry['role']!r} of part {entry['part']!r}")
    if key.split("#")[0] != f"{entry['role']}/{entry['part']}":
        raise ValueError(f"{key!r} names {entry['role']}/{entry['part']}")
    if entry["dtype"] not in ITEM_BYTES:
        raise ValueError(f"{key!r}: dtype {entry['dtype']!r} is none of {', '.join(ITEM_BYTES)}")
    stored = StoredFragment(file, key, entry["part"], entry["role"], entry["dtype"], shape, **optional, **numbers,
                            xxh3=tuple(entry["xxh3"]))
    problem = boxes.fault(stored)
    if problem:
        raise ValueError(f"{key!r}: {problem}")
    if stored.offset < 0 or stored.offset + stored.bytes > size:
        raise ValueError(f"{key!r}: its {stored.bytes:,} bytes from {stored.offset:,} on aren't in a file of {size:,} bytes")
    if len(stored.xxh3) != -(-stored.bytes // sealed.BLOCK_BYTES) or not all(isinstance(value, str) for value in stored.xxh3):
        raise ValueError(f"{key!r}: {len(stored.xxh3)} hashes of {stored.bytes:,} bytes")
    return stored

"""The files of a checkpoint: their names, their JSON, and the checks that make them safe to open. README.md has the format.

Nothing here executes what a file says: JSON, and safetensors, whose header is JSON too. A file name found in one is used
only if it stays inside the checkpoint's folder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from megalm.checkpoint import boxes
from megalm.checkpoint.fragment import ROLES, Fragment

FORMAT = "megalm.checkpoint"
VERSION = 1
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
ALIGNMENT = 64
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class CheckpointError(ValueError):
    """A checkpoint can't be written, found, read or resumed from; the message says which, what is wrong, and where."""


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
    """A JSON file's content. Raises CheckpointError when it is missing, unreadable or not JSON."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error


def json_bytes(value: Any) -> bytes:
    """Compact for machines, a line an entry of the outermost level for people."""
    if isinstance(value, Mapping):
        lines = [f"  {json.dumps(str(key))}: {json.dumps(item)}" for key, item in value.items()]
        return ("{\n" + ",\n".join(lines) + "\n}\n").encode()
    return (json.dumps(value) + "\n").encode()


@dataclass(frozen=True)
class StoredFragment:
    """One tensor of a rank's file, and which elements of which part it holds (see Fragment)."""

    file: str
    key: str
    part: str
    role: str
    dtype: torch.dtype
    full_shape: tuple[int, ...]
    dim: int | None
    low: int
    high: int
    start: int
    count: int
    step: int | None

    def to_json(self) -> dict[str, Any]:
        entry = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "file"}
        return {**entry, "dtype": DTYPE_NAMES[self.dtype]}


def describe(fragments: Sequence[Fragment], file: str) -> list[StoredFragment]:
    """Name the tensors that hold these fragments in a rank's file: role/part, numbered where a part has several."""
    seen: dict[str, int] = {}
    entries = []
    for fragment in fragments:
        assert fragment.role in ROLES, fragment.role
        assert fragment.tensor.dim() == 1 and fragment.tensor.is_contiguous(), f"{fragment}: not a contiguous 1-D tensor"
        assert fragment.tensor.dtype in DTYPE_NAMES, f"{fragment}: {fragment.tensor.dtype}"
        problem = boxes.fault(fragment)
        assert problem is None, f"{fragment}: {problem}"
        key = f"{fragment.role}/{fragment.part}"
        seen[key] = seen.get(key, -1) + 1
        entries.append(StoredFragment(
            file, f"{key}#{seen[key]}" if seen[key] else key, fragment.part, fragment.role, fragment.tensor.dtype,
            tuple(fragment.full_shape), fragment.dim, fragment.low, fragment.high, fragment.start, fragment.count, fragment.step))
    return entries


def parse_index(folder: Path, name: str) -> list[StoredFragment]:
    """The fragments that a rank's JSON index lists, their numbers checked. Raises CheckpointError."""
    path = inside(folder, name)
    content = read_json(path)
    try:
        file = content["file"]
        inside(folder, file)
        return [_parse_fragment(entry, file) for entry in content["fragments"]]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{path}: not the index of a rank's file: {type(error).__name__}: {error}") from error


def _parse_fragment(entry: Mapping[str, Any], file: str) -> StoredFragment:
    numbers = {name: entry[name] for name in ("low", "high", "start", "count")}
    optional = {name: entry[name] for name in ("dim", "step")}
    shape = tuple(entry["full_shape"])
    integers = [*numbers.values(), *shape, *(value for value in optional.values() if value is not None)]
    if any(type(value) is not int for value in integers):
        raise ValueError(f"{entry.get('key')!r}: a number isn't an integer")
    if entry["role"] not in ROLES or not isinstance(entry["part"], str) or not isinstance(entry["key"], str):
        raise ValueError(f"{entry.get('key')!r}: role {entry['role']!r} of part {entry['part']!r}")
    if entry["key"].split("#")[0] != f"{entry['role']}/{entry['part']}":
        raise ValueError(f"{entry['key']!r} names {entry['role']}/{entry['part']}")
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"{entry['key']!r}: dtype {entry['dtype']!r} is none of {', '.join(DTYPES)}")
    dtype = DTYPES[entry["dtype"]]
    stored = StoredFragment(file, entry["key"], entry["part"], entry["role"], dtype, shape, **optional, **numbers)
    problem = boxes.fault(stored)
    if problem:
        raise ValueError(f"{stored.key!r}: {problem}")
    return stored


def safetensors_chunks(tensors: Sequence[tuple[StoredFragment, torch.Tensor]]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, a tensor at a time: no second copy of the rank's state is made.

    The layout (https://github.com/huggingface/safetensors): header length as little-endian u64, a JSON header padded with
    spaces, then the tensors with no gap between them.
    """
    header: dict[str, Any] = {"__metadata__": {"format": FORMAT, "version": str(VERSION)}}
    tensors = sorted(tensors, key=lambda item: -item[1].element_size())  # so that each starts at a multiple of its element's size
    offset = 0
    for entry, tensor in tensors:
        end = offset + tensor.numel() * tensor.element_size()
        header[entry.key] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": [tensor.numel()], "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in tensors:
        flat = tensor.detach().to("cpu")
        flat = flat.as_strided(flat.shape, (1,))  # a tensor of one element is contiguous with any stride, a view as bytes isn't
        yield memoryview(flat.view(torch.uint8).numpy())

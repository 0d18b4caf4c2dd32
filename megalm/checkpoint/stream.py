"""Whole folders of weights written a few rows at a time: no tensor need fit into memory."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megalm.checkpoint.disk import Disk
from megalm.checkpoint.format import ALIGNMENT, FORMAT, TEMPORARY_PREFIX, VERSION, StoredFragment, rank_file
from megalm.checkpoint.fragment import DTYPE_NAMES
from megalm.checkpoint.parts import write_part
from megalm.checkpoint.publish import describe_whole
from megalm.checkpoint.save import versions
from megalm.checkpoint.sealed import CheckpointError

BLOCK_BYTES = 32 << 20
FILE_BYTES = 4 << 30


class Reader(Protocol):
    """Weights by part, a few rows at a time: those of a checkpoint, or another program's."""

    def shape(self, part: str) -> tuple[int, ...]: ...

    def dtype(self, part: str) -> torch.dtype: ...

    def rows(self, part: str, low: int, high: int) -> Tensor: ...

    def release(self) -> None: ...

    def __iter__(self) -> Iterator[str]: ...


@dataclass(frozen=True)
class Streamed:
    """A tensor of a safetensors file, whose elements `blocks` makes in order."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[Tensor]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def blocks_of(weights: Reader, part: str, rows: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """The first `rows` rows of a part in `dtype`, some megabytes at a time."""
    shape = weights.shape(part)
    step = max(1, BLOCK_BYTES // (math.prod(shape[1:]) * weights.dtype(part).itemsize))
    for low in range(0, rows, step):
        yield weights.rows(part, low, min(low + step, rows)).to(dtype)
    weights.release()


def safetensors_bytes(tensors: Sequence[Streamed], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file (https://github.com/huggingface/safetensors), each tensor made when its turn comes."""
    tensors = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)  # so that each is aligned to its elements
    header, offset = {"__metadata__": dict(metadata)}, 0
    for tensor in tensors:
        end = offset + tensor.nbytes
        header[tensor.name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors:
        yield from stretches(tensor)


def stretches(tensor: Streamed) -> Iterator[memoryview]:
    """The tensor's bytes, a block's at a time."""
    written = 0
    for block in tensor.blocks():
        assert block.dtype == tensor.dtype, (tensor.name, block.dtype, tensor.dtype)
        flat = block.contiguous().view(-1)
        flat = flat.as_strided(flat.shape, (1,))  # a tensor of one element may have any stride, a view as bytes may not
        yield memoryview(flat.view(torch.uint8).numpy())
        written += flat.numel() * flat.element_size()
    assert written == tensor.nbytes, (tensor.name, written, tensor.nbytes)


def groups_by_size(tensors: Sequence[Streamed], limit: int = FILE_BYTES) -> list[list[Streamed]]:
    """The tensors in order, as many to a file as `limit` bytes hold, at least one."""
    files: list[list[Streamed]] = []
    left = -1
    for tensor in tensors:
        if tensor.nbytes > left:
            files.append([])
            left = limit
        files[-1].append(tensor)
        left -= tensor.nbytes
    return files


@contextlib.contextmanager
def new_folder(folder: Path, disk: Disk) -> Iterator[Path]:
    """A folder that gets its name when all is in it; whatever stops that leaves nothing.

    Raises CheckpointError when there is something of that name.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise CheckpointError(f"{folder} is there already")
    temporary = folder.parent / f"{TEMPORARY_PREFIX}{folder.name}"
    disk.remove(temporary)
    disk.make_folder(temporary)
    try:
        yield temporary
        disk.sync_folder(temporary)
        disk.rename(temporary, folder)
        disk.sync_folder(folder.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            disk.remove(temporary)
        raise


def write_weights(folder: Path, weights: Reader, documents: Mapping[str, Any], files: Mapping[str, Path],
                  dtype: torch.dtype | None = None, disk: Disk | None = None) -> None:
    """Write a checkpoint at step 0 that holds weights alone. Raises CheckpointError or OSError; then nothing is left.

    `documents`: config.json and plan.json. `files`: {name in the folder: file to copy}. `dtype`: of all weights; default: each
    part's own.
    """
    disk = disk or Disk()
    with new_folder(folder, disk) as temporary:
        ranks = groups_by_size([_stored(weights, part, dtype or weights.dtype(part)) for part in weights])
        for rank, members in enumerate(ranks):
            entries = [_entry(weights, rank, tensor) for tensor in members]
            write_part(temporary, rank, entries, lambda number, members=members: stretches(members[number]), disk)
        layout = {"tp": 1, "pp": 1, "dp": len(ranks), "zero_stage": 0, "sequence_parallel": False}
        manifest = {"format": FORMAT, "version": VERSION, "step": 0, "consumed_samples": 0, "eval_loss": None,
                    "world_size": len(ranks), "layout": layout, "counters": {}, "versions": versions()}
        describe_whole(temporary, manifest, documents, (), disk, files)


def _stored(weights: Reader, part: str, dtype: torch.dtype) -> Streamed:
    """One part as a tensor of a rank's file: 1-D, in the role that its dtype has there."""
    shape, role = weights.shape(part), "weight" if dtype.itemsize < 4 else "master"
    return Streamed(f"{role}/{part}", dtype, (math.prod(shape),), lambda: blocks_of(weights, part, shape[0], dtype))


def _entry(weights: Reader, rank: int, tensor: Streamed) -> StoredFragment:
    role, _, part = tensor.name.partition("/")
    shape = weights.shape(part)
    return StoredFragment(rank_file(rank), tensor.name, part, role, DTYPE_NAMES[tensor.dtype], shape, None, 0, shape[0], 0,
                          tensor.shape[0], None)

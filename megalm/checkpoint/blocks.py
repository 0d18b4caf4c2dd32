"""A checkpoint's tensors, read by blocks: each is checked against its hash and used from the memory in which it was checked."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from megalm.checkpoint import sealed
from megalm.checkpoint.format import ITEM_BYTES, StoredFragment, inside
from megalm.checkpoint.fragment import DTYPES
from megalm.checkpoint.sealed import DamagedError

OPEN_FILES = 16
"""A checkpoint may have thousands; a rank may have few descriptors left."""


def elements(entry: StoredFragment) -> int:
    """How many elements of this tensor a block holds."""
    return sealed.BLOCK_BYTES // ITEM_BYTES[entry.dtype]


class Blocks:
    """Reads blocks of the files of one checkpoint's folder. Holds one block in memory and at most OPEN_FILES descriptors.

    Raises DamagedError where a file is lost, broken or not what its index says, UnreadableError where it can't be read.
    A memory map would be read a second time after it was hashed, and ends the process where a disk fails.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._handles: dict[str, int] = {}
        self._bytes: Tensor | None = None
        self._held: tuple[str, str, int] | None = None

    def __del__(self) -> None:
        self.release()

    def release(self) -> None:
        """Close the files and let go of the memory, until something is read again."""
        while self._handles:
            os.close(self._handles.popitem()[1])
        self._bytes = self._held = None

    def read(self, entry: StoredFragment, number: int) -> Tensor:
        """The elements of block `number` of a stored tensor, 1-D; they stand there until the next block is read."""
        if self._bytes is None:
            self._bytes = torch.empty(sealed.BLOCK_BYTES, dtype=torch.uint8)
        start = number * sealed.BLOCK_BYTES
        length = min(sealed.BLOCK_BYTES, entry.bytes - start)
        if self._held != (entry.file, entry.key, number):
            self._held = None
            content = memoryview(self._bytes.numpy())[:length]
            self._read(entry, entry.offset + start, content)
            if sealed.digest(content) != entry.xxh3[number]:
                raise DamagedError(f"{entry.file}: {entry.key}: bytes {start:,} to {start + length:,} aren't what was written")
            self._held = entry.file, entry.key, number
        return self._bytes[:length].view(DTYPES[entry.dtype])

    def _read(self, entry: StoredFragment, position: int, target: memoryview) -> None:
        """Fill `target` with the file's bytes from `position` on."""
        try:
            handle, done = self._open(entry.file), 0
            while done < len(target):
                count = os.preadv(handle, [target[done:]], position + done)
                if count == 0:
                    size = os.fstat(handle).st_size
                    raise DamagedError(f"{entry.file}: {entry.key} ends beyond the file's {size:,} bytes")
                done += count
        except OSError as error:
            raise sealed.unreadable(error, f"{entry.file}: {entry.key}") from error

    def _open(self, name: str) -> int:
        handle = self._handles.pop(name, None)
        while handle is None and len(self._handles) >= OPEN_FILES:
            os.close(self._handles.pop(next(iter(self._handles))))  # whose turn was longest ago
        if handle is None:
            handle = os.open(inside(self._folder, name), os.O_RDONLY | os.O_CLOEXEC)
        self._handles[name] = handle
        return handle

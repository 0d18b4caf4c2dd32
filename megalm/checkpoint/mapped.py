"""A rank's file, memory-mapped; every block is checked against its hash before anything of it is used."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import torch
from torch import Tensor

from megalm.checkpoint import sealed
from megalm.checkpoint.format import StoredFragment, inside
from megalm.checkpoint.sealed import DamagedError


class MappedFile:
    """Raises DamagedError where the file is lost, broken or not what its index says, CheckpointError where it can't be read.

    A block is read into memory of its own to be hashed: a disk that fails answers that with an error, and a memory map with
    the end of the process.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self._checked: set[tuple[str, int]] = set()
        try:
            self._handle = os.open(inside(folder, name), os.O_RDONLY | os.O_CLOEXEC)
            size = os.fstat(self._handle).st_size
            # A private map is writable, as torch wants its memory, and what nobody writes stays the file's.
            self._map = mmap.mmap(self._handle, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError as error:
            raise sealed.unreadable(error, name) from error
        except ValueError as error:  # it is empty
            raise DamagedError(f"{name}: {error}") from error
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            os.close(self._handle)

    def read(self, entry: StoredFragment, first: int, length: int) -> Tensor:
        """Bytes [first, first + length) of a stored tensor, uint8, as a view of the map."""
        if entry.offset + entry.bytes > len(self._bytes):
            raise DamagedError(f"{self.name}: {entry.key} ends beyond the file's {len(self._bytes):,} bytes")
        for number in range(first // sealed.BLOCK_BYTES, -(-(first + length) // sealed.BLOCK_BYTES)):
            if (entry.key, number) not in self._checked:
                self._check(entry, number)
                self._checked.add((entry.key, number))
        return self._bytes[entry.offset + first: entry.offset + first + length]

    def _check(self, entry: StoredFragment, number: int) -> None:
        start = number * sealed.BLOCK_BYTES
        length = min(sealed.BLOCK_BYTES, entry.bytes - start)
        try:
            content = os.pread(self._handle, length, entry.offset + start)
        except OSError as error:
            raise sealed.unreadable(error, f"{self.name}: {entry.key}") from error
        if sealed.digest(content) != entry.xxh3[number]:
            raise DamagedError(f"{self.name}: {entry.key}: bytes {start:,} to {start + length:,} aren't what was written")

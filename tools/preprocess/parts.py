"""What a worker makes of a piece of the input: one file that appears whole or not at all.

Layout: the tokens, then further arrays, then a JSON object, then its length in bytes (u64). The object has the counts of the
piece, and for each array its dtype, its place and its bytes. A part that is taken in soon is never brought to the disk: it holds
the number of the boot under which it was made, and behind a power cut it is made again.
"""
from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import numpy as np

FOOTER = struct.Struct("<Q")
BUFFER = 1 << 22
SUFFIX = ".part"
Place = tuple[int, int]  # of a part: its unit, and its number in it


def part_path(folder: Path | str, unit: int, part: int = 0) -> Path:
    """Part number `part` of a unit."""
    return Path(folder, f"{unit:08d}-{part:06d}{SUFFIX}")


def place_of(path: Path) -> Place:
    unit, part = path.name.removesuffix(SUFFIX).split("-")
    return int(unit), int(part)


@lru_cache(maxsize=1)
def boot() -> str:
    """What Linux calls this run of the machine; "" where nobody knows."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


class PartWriter:
    """Used as a context: the part appears when `finish` was called, and nothing stays of it when the context is left without."""

    def __init__(self, path: Path, dtype: np.dtype):
        self.path, self.dtype = path, dtype
        self.partial = self.path.with_suffix(f".{os.getpid()}.partial")
        self.arrays: dict[str, list[np.ndarray]] = {}
        self.bytes = 0

    def __enter__(self) -> PartWriter:
        self.file = open(self.partial, "wb", buffering=BUFFER)
        return self

    def __exit__(self, *_) -> None:
        with contextlib.suppress(OSError):  # a full disk can't take the buffered rest of what isn't needed
            self.file.close()
        self.partial.unlink(missing_ok=True)

    def add(self, tokens: Iterable[np.ndarray], **arrays: np.ndarray) -> None:
        """More tokens, in pieces, written at once, and more of the other arrays, kept until the end."""
        for piece in tokens:
            self.file.write(memoryview(np.ascontiguousarray(piece, self.dtype.newbyteorder("<"))).cast("B"))
            self.bytes += piece.nbytes
        for name, array in arrays.items():
            self.arrays.setdefault(name, []).append(array)

    def finish(self, counts: dict) -> None:
        """Write the rest, and give the part its name."""
        places = {"tokens": (self.dtype.str, 0, self.bytes)}
        offset = self.bytes
        for name, pieces in self.arrays.items():
            whole = np.concatenate(pieces)
            self.file.write(whole.tobytes())
            places[name] = (whole.dtype.str, offset, whole.nbytes)
            offset += whole.nbytes
        footer = json.dumps({"counts": counts, "arrays": places, "boot": boot()}).encode()
        self.file.write(footer + FOOTER.pack(len(footer)))
        self.file.flush()
        if not boot():
            os.fsync(self.file.fileno())
        os.replace(self.partial, self.path)


class Part:
    """A part to read: `counts`, and its arrays by name."""

    def __init__(self, path: Path):
        self.path = path
        with open(path, "rb") as file:
            end = file.seek(-FOOTER.size, os.SEEK_END)
            (size,) = FOOTER.unpack(file.read(FOOTER.size))
            file.seek(end - size)
            footer = json.loads(file.read(size))
        self.counts, self.places, self.boot = footer["counts"], footer["arrays"], footer["boot"]

    @property
    def token_bytes(self) -> int:
        return self.places["tokens"][2]

    def array(self, name: str) -> np.ndarray:
        """One array, mapped; empty if there is none."""
        dtype, offset, size = self.places.get(name, ("|u1", 0, 0))
        count = size // np.dtype(dtype).itemsize
        return np.memmap(self.path, dtype, "r", offset, (count,)) if count else np.zeros(0, dtype)


def whole_part(path: Path) -> Part | None:
    """A part, if it is all there after whatever has happened to the machine."""
    try:
        part = Part(path)
    except (OSError, ValueError, KeyError, struct.error):
        return None
    return part if part.boot in ("", boot()) else None

"""Parts, in their order, to one data set: copied inside the kernel where nothing is left out, published as a whole."""
from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from megalm.data.errors import DataError
from megalm.data.indexed import CHUNK, file_paths, index_bytes
from megalm.data.publish import sync_folder, write_atomically

from .cleaning import Cleaning
from .duplicates import append, wanted
from .parts import SUFFIX, Part, Place, part_path, place_of, whole_part
from .report import Totals
from .store import Work

EVERY = 5.0  # seconds between notes of the state
COPY = 1 << 26
FILES = ("tokens", "lengths", "counts")


class Merger:
    """Appends parts to the files of a work folder, and makes the data set of them. Goes on from the state that is noted there."""

    def __init__(self, work: Work, dtype: np.dtype, cleaning: Cleaning, made: Mapping[Place, int]):
        """`made`: the parts that are `waiting`. Not for a complete run, whose files may be published already.

        Raises DataError for files that lack what was noted.
        """
        self.work, self.dtype, self.made = work, dtype, frozenset(made)
        state = work.state() or {"next": (0, 0), "files": {}, "totals": {}}
        self.next, self.totals = tuple(state["next"]), Totals.load(state["totals"])  # unit and number of the next part
        self.files = {name: self._open(name, state["files"].get(name, 0)) for name in FILES}
        self.duplicates = wanted(cleaning)
        for kind in self.duplicates:
            kind.go_on(self._open(kind.name, state["files"].get(kind.name, 0)))
            self.files[kind.name] = kind.file
        self.taken: list[Path] = []  # since the last note
        self.noted_at = time.monotonic()
        self.broken = False

    def _open(self, name: str, size: int):
        path = self.work.folder / name
        there = path.stat().st_size if path.exists() else 0
        if there < size:
            raise DataError(f"{path} has {there} bytes and should have {size}: it is damaged; --restart begins anew")
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0)
        file.truncate(size)
        file.seek(size)
        return file

    def add_all(self) -> Iterator[int]:
        """Take in all parts that are there, as far as none is missing; comes back after each with the bytes of input it is of,
        0 for one that was there from the beginning."""
        while (path := part_path(self.work.folder, *self.next)).exists():
            before, part = self.next in self.made, Part(path)
            self.add(part)
            yield 0 if before else part.counts["bytes_read"]

    def add(self, part: Part) -> None:
        """Take in the next part. Where that fails, some of it may be in the files and the counts: `broken`, never to be noted."""
        self.broken = True
        lengths, counts, sizes = part.array("lengths"), part.array("counts"), part.array("sizes")
        kept = self._kept(part, sizes)
        if kept is None or kept.all():
            copy_bytes(part.path, [(0, part.token_bytes)], self.files["tokens"])
        else:
            copy_bytes(part.path, self._ranges(kept, lengths, counts), self.files["tokens"])
            lengths, counts, sizes = lengths[np.repeat(kept, counts)], counts[kept], sizes[kept]
        append(self.files["lengths"], lengths)
        append(self.files["counts"], counts)
        self.totals.add(part, lengths, counts, sizes)
        self.taken.append(part.path)
        self.next = (self.next[0] + 1, 0) if part.counts["last"] else (self.next[0], self.next[1] + 1)
        self.broken = False
        if time.monotonic() - self.noted_at > EVERY:
            self.note()

    def _ranges(self, kept: np.ndarray, lengths: np.ndarray, counts: np.ndarray) -> list[tuple[int, int]]:
        """(first byte, byte behind the last) of each run of documents that are kept: no token need be in memory."""
        sequences = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        edges = sequences[np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])] * self.dtype.itemsize
        return edges[np.flatnonzero(np.diff(kept, prepend=False, append=False))].reshape(-1, 2).tolist()

    def _kept(self, part: Part, sizes: np.ndarray) -> np.ndarray | None:
        """Which documents of a part are no duplicates, bool [documents]; None where nobody asked."""
        kept = None
        for kind in self.duplicates:
            marks = part.array(kind.name).reshape(-1, kind.width)
            before = np.ones(len(sizes), bool) if kept is None else kept
            kept = kind.first(marks, before)
            self.totals.drop(kind.why, int((before & ~kept).sum()), int(sizes[before & ~kept].sum()))
        return kept

    def note(self) -> None:
        """Bring what was appended to the disk, say so, and remove the parts that are in."""
        for file in self.files.values():
            os.fsync(file.fileno())
        self.work.save({"next": self.next, "totals": self.totals.dump(),
                        "files": {name: os.fstat(file.fileno()).st_size for name, file in self.files.items()}})
        for path in self.taken:
            path.unlink(missing_ok=True)
        self.taken, self.noted_at = [], time.monotonic()

    def close(self) -> None:
        for file in self.files.values():
            file.close()


def waiting(folder: Path, begin: Place) -> dict[Place, int]:
    """The parts that an earlier run has left, from `begin` on, and the bytes of input that each is of; all else goes."""
    found = {}
    for path in folder.glob(f"*{SUFFIX}"):
        part = whole_part(path)
        if part is None or place_of(path) < begin:
            path.unlink()
        else:
            found[place_of(path)] = part.counts["bytes_read"]
    return found


def copy_bytes(path: Path, ranges: Sequence[tuple[int, int]], target) -> None:
    """Append the bytes [start, end) of a file to another, in the kernel where it can. Raises OSError for a full disk."""
    begin = target.tell()
    with open(path, "rb", buffering=0) as source:
        for offset, end in ranges:
            while offset < end:
                offset += os.sendfile(target.fileno(), source.fileno(), offset, min(COPY, end - offset))
    with contextlib.suppress(OSError):  # begin to bring it to the disk: advice, that a file system need not know
        os.posix_fadvise(target.fileno(), begin, target.tell() - begin, os.POSIX_FADV_DONTNEED)


def index_of(folder: Path, dtype: np.dtype) -> Iterator[bytes]:
    """The .idx, from the files `lengths` and `counts`, in bounded memory."""
    lengths, counts = folder / "lengths", folder / "counts"
    return index_bytes(dtype, *(path.stat().st_size // 4 for path in (lengths, counts)),
                       lambda: pieces(lengths), lambda: pieces(counts))


def pieces(path: Path) -> Iterator[np.ndarray]:
    with open(path, "rb") as file:
        while len(piece := np.fromfile(file, "<i4", CHUNK)):
            yield piece


def prepare(work: Work, dtype: np.dtype, description: bytes) -> None:
    """Make the .idx and the description in the work folder, and note that all is there to be renamed."""
    write_atomically(work.folder / "index", index_of(work.folder, dtype))
    write_atomically(work.folder / "description", [description])
    work.save({**work.state(), "complete": True})


def publish(work: Work, prefix: str, description_path: Path) -> None:
    """Rename everything into place, the .idx last, as readers refuse a .bin without one; done again, it does the rest."""
    bin_path, idx_path = file_paths(prefix)
    if (work.folder / "tokens").exists():
        idx_path.unlink(missing_ok=True)  # overwriting: at no moment may the old .idx stand beside the new .bin
    for name, path in (("tokens", bin_path), ("description", description_path), ("index", idx_path)):
        if (work.folder / name).exists():
            os.replace(work.folder / name, path)
    sync_folder(bin_path.parent)
    work.published = True

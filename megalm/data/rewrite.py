"""Data sets made from the documents of other data sets, in memory that depends on neither: parts in order, one after another.

What Megatron-LM's builder would write for the same documents, byte for byte: a .bin without gaps, an .idx with the pointers
recomputed, and the modes of a multimodal data set.
"""
from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .description import description_path
from .errors import DataError
from .indexed import IndexedReader, file_paths, index_bytes, publish_pair
from .publish import PartialFile

DOCUMENTS = 1 << 16  # worked on at a time
COPY_BYTES = 1 << 26  # a call of copy_file_range: between two of them a Ctrl-C is heard
WRITE_BYTES = 1 << 23
NOT_POSSIBLE = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF)
Moved = Callable[[int], None]  # is told the bytes of each piece


@dataclass(frozen=True)
class Part:
    """Documents of one data set. `order()` yields their numbers, int64, in pieces, and is called several times; None: all."""

    reader: IndexedReader
    order: Callable[[], Iterator[np.ndarray]] | None = None

    def documents(self) -> Iterator[np.ndarray]:
        """The numbers of the documents, in order, in pieces of at most DOCUMENTS."""
        return everything(self.reader.num_documents) if self.order is None else self.order()

    def sequences(self) -> Iterator[np.ndarray]:
        """The numbers of their sequences, in pieces."""
        for documents in self.documents():
            yield sequences_of(self.reader, documents)


def everything(count: int) -> Iterator[np.ndarray]:
    """0 to count - 1 in pieces."""
    for low in range(0, count, DOCUMENTS):
        yield np.arange(low, min(count, low + DOCUMENTS), dtype=np.int64)


def sequences_of(reader: IndexedReader, documents: np.ndarray) -> np.ndarray:
    """The numbers of the sequences of these documents, one after another, int64."""
    first = reader.document_indices[documents]
    return ranges(first, reader.document_indices[documents + 1] - first)


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, ... of each, one after another: ([3, 9], [2, 1]) -> [3, 4, 9]."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(ends[-1] if len(ends) else 0)


def without_gaps(reader: IndexedReader) -> bool:
    """Whether the .bin is the sequences in order and nothing else, so that it can be copied as it is."""
    item, end = reader.dtype.itemsize, 0
    for low in range(0, len(reader), DOCUMENTS):
        ends = end + np.cumsum(reader.lengths[low:low + DOCUMENTS], dtype=np.int64) * item
        pointers = reader.pointers[low:low + DOCUMENTS]
        if pointers[0] != end or np.any(pointers[1:] != ends[:-1]):
            return False
        end = int(ends[-1])
    return end == reader.flat.nbytes


def spans(reader: IndexedReader, sequences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where these sequences lie in `flat`, neighbours joined and empty ones left out: (first token, tokens), int64."""
    starts, lengths = reader.pointers[sequences] // reader.dtype.itemsize, reader.lengths[sequences].astype(np.int64)
    starts, lengths = starts[lengths > 0], lengths[lengths > 0]
    if len(starts) == 0:
        return starts, lengths
    breaks = np.flatnonzero(np.append(True, starts[1:] != starts[:-1] + lengths[:-1]))
    return starts[breaks], np.add.reduceat(lengths, breaks)


def token_pieces(part: Part) -> Iterator[np.ndarray]:
    """The tokens of the documents in order, in pieces of about WRITE_BYTES at most."""
    flat, limit = part.reader.flat, WRITE_BYTES // part.reader.dtype.itemsize
    waiting: list[np.ndarray] = []
    held = 0
    for sequences in part.sequences():
        starts, lengths = spans(part.reader, sequences)
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            for low in range(start, start + length, limit):
                waiting.append(flat[low:min(start + length, low + limit)])
                held += len(waiting[-1])
                if held >= limit:
                    yield waiting[0] if len(waiting) == 1 else np.concatenate(waiting)
                    waiting, held = [], 0
    if waiting:
        yield np.concatenate(waiting)


def index_pieces(parts: Sequence[Part]) -> Iterator[bytes]:
    """The .idx of the documents of all parts, piece by piece; each part's order is gone through four or five times."""
    first = parts[0].reader

    def of_sequences(values: Callable[[IndexedReader], np.ndarray]) -> Iterator[np.ndarray]:
        return (values(part.reader)[numbers] for part in parts for numbers in part.sequences())

    def counts() -> Iterator[np.ndarray]:
        for part in parts:
            indices = part.reader.document_indices
            yield from (indices[numbers + 1] - indices[numbers] for numbers in part.documents())

    documents = sum(len(piece) for part in parts for piece in part.documents())
    modes = None if first.modes is None else lambda: of_sequences(lambda reader: reader.modes)
    return index_bytes(first.dtype, sum(map(reader_count, parts)), documents,
                       lambda: of_sequences(lambda reader: reader.lengths), counts, modes)


def reader_count(part: Part) -> int:
    """The number of sequences of a part."""
    if part.order is None:
        return len(part.reader)
    indices = part.reader.document_indices
    return sum(int((indices[numbers + 1] - indices[numbers]).sum()) for numbers in part.documents())


class Rewritten:
    """PREFIX.bin and PREFIX.idx under construction. `publish` lets both appear, `discard` leaves nothing; one must be called."""

    def __init__(self, prefix: str | Path):
        """Raises DataError if another process is writing it."""
        self.prefix = str(prefix)
        bin_path, idx_path = file_paths(prefix)
        bin_path.parent.mkdir(parents=True, exist_ok=True)
        self.bin = PartialFile(bin_path)
        try:
            self.idx = PartialFile(idx_path)
        except BaseException:
            self.bin.discard()
            raise
        self.description: PartialFile | None = None
        self.copied_by: set[str] = set()

    def describe(self, text: bytes) -> None:
        """Write PREFIX.data.json; without one, publishing removes what an older data set has there."""
        self.description = PartialFile(description_path(self.prefix))
        self.description.file.write(text)

    def counts(self, parts: Sequence[Part]) -> dict[str, int]:
        """Documents, sequences and tokens of what was written."""
        item = parts[0].reader.dtype.itemsize
        self.bin.file.flush()
        return {"documents": sum(len(piece) for part in parts for piece in part.documents()),
                "sequences": sum(map(reader_count, parts)), "tokens": os.fstat(self.bin.file.fileno()).st_size // item}

    def write(self, parts: Sequence[Part], moved: Moved) -> None:
        """Write the documents of all parts; tells `moved` the bytes of tokens as they are written."""
        for part in parts:
            if part.order is None and without_gaps(part.reader):
                self.bin.file.flush()
                self.copied_by.add(copy_file(part.reader.bin_path, self.bin.file.fileno(), moved))
            else:
                self.copied_by.add("write")
                for piece in token_pieces(part):
                    self.bin.file.write(piece.data)
                    moved(piece.nbytes)
        self.write_index(parts)

    def write_index(self, parts: Sequence[Part]) -> None:
        """Write the .idx alone, where the .bin is written some other way."""
        for piece in index_pieces(parts):
            self.idx.file.write(piece)

    def sync(self) -> None:
        """A full disk is noticed here, before anything is published."""
        for file in self._files():
            file.sync()

    def publish(self) -> None:
        """Let all files appear; while one of them is an older data set's, there is no .idx, and so no data set."""
        self.sync()
        self.idx.path.unlink(missing_ok=True)
        if self.description is None:
            description_path(self.prefix).unlink(missing_ok=True)
        else:
            self.description.publish()
        publish_pair(self.bin, self.idx)

    def discard(self) -> None:
        """Remove what was not published."""
        for file in self._files():
            file.discard()

    def _files(self) -> list[PartialFile]:
        return [file for file in (self.bin, self.idx, self.description) if file is not None]


def copy_file(path: Path, target: int, moved: Moved) -> str:
    """Append a file to an open one inside the kernel, whose blocks are shared where the file system can. Returns how it was done.

    copy_file_range, else sendfile, else through this process; what one has begun the next goes on with. Raises OSError.
    """
    with open(path, "rb", buffering=0) as source:
        size = os.fstat(source.fileno()).st_size
        done, start, by = 0, os.lseek(target, 0, os.SEEK_END), "copy_file_range"
        for by, copy in COPIES.items():
            try:
                while done < size:
                    os.lseek(target, start + done, os.SEEK_SET)
                    count = copy(source.fileno(), target, done, min(COPY_BYTES, size - done))
                    if count == 0:
                        break  # a file system that can't says so like this, too
                    done += count
                    moved(count)
            except OSError as error:
                if error.errno not in NOT_POSSIBLE:
                    raise OSError(error.errno, error.strerror, str(path)) from error
            if done == size:
                return by
    raise DataError(f"{path} became shorter while it was read: {done} bytes of {size}")


def _through_memory(source: int, target: int, offset: int, count: int) -> int:
    return os.write(target, os.pread(source, min(count, WRITE_BYTES), offset))


COPIES: dict[str, Callable[[int, int, int, int], int]] = {
    "copy_file_range": lambda source, target, offset, count: os.copy_file_range(source, target, count, offset),
    "sendfile": lambda source, target, offset, count: os.sendfile(target, source, offset, count),
    "write": _through_memory,
}

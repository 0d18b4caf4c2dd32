"""Numbers about a token file, exact and in bounded memory: lengths of documents, share of an id, range of ids."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .errors import DataError
from .indexed import IndexedReader
from .rewrite import everything, sequences_of, spans, without_gaps

SMALL = 1 << 20  # lengths below it are counted one by one, longer ones are kept: there are at most tokens / 2^20 of them
SCANNED = 1 << 22  # tokens looked at at a time


class Lengths:
    """The lengths of many documents, of which every percentile can be told."""

    def __init__(self):
        self._counts, self._long = np.zeros(SMALL, np.int64), []
        self.count = self.total = 0

    def add(self, lengths: np.ndarray) -> None:
        """Take in int64 [n]."""
        small = lengths < SMALL
        counted = np.bincount(lengths[small])
        self._counts[:len(counted)] += counted
        self._long.extend(lengths[~small].tolist())
        self.count += len(lengths)
        self.total += int(lengths.sum())

    def percentiles(self, wanted: Sequence[float]) -> list[int]:
        """The least length that so many percent of the documents don't exceed; 0 is the shortest, 100 the longest."""
        if self.count == 0:
            return [0] * len(wanted)
        ends, long = np.cumsum(self._counts), sorted(self._long)
        found = []
        for percent in wanted:
            rank = max(1, int(np.ceil(self.count * percent / 100)))
            found.append(int(np.searchsorted(ends, rank)) if rank <= ends[-1] else long[rank - int(ends[-1]) - 1])
        return found

    def histogram(self) -> list[tuple[int, int, int]]:
        """(from, below, documents) by powers of two, from the first bar to the last that has any; 0 by itself."""
        edges = [0] + [1 << k for k in range(33)]
        long, bars = np.asarray(self._long, np.int64), []
        for low, high in zip(edges, edges[1:], strict=False):
            inside = int(self._counts[low:high].sum()) + int(((long >= low) & (long < high)).sum())
            bars.append((low, high, inside))
        filled = [k for k, bar in enumerate(bars) if bar[2]]
        return bars[filled[0]:filled[-1] + 1] if filled else []


def document_lengths(reader: IndexedReader, documents: np.ndarray) -> np.ndarray:
    """Tokens of consecutive documents, wherever their sequences lie: int64 [documents]."""
    low, high = int(reader.document_indices[documents[0]]), int(reader.document_indices[documents[-1] + 1])
    sums = np.append(0, np.cumsum(reader.lengths[low:high], dtype=np.int64))
    return sums[reader.document_indices[documents + 1] - low] - sums[reader.document_indices[documents] - low]


def last_tokens(reader: IndexedReader, documents: np.ndarray) -> np.ndarray:
    """The last token of each of these documents that has a sequence, if that has a token."""
    after = reader.document_indices[documents + 1]
    last = after[after > reader.document_indices[documents]] - 1
    last = last[reader.lengths[last] > 0]
    return reader.flat[reader.pointers[last] // reader.dtype.itemsize + reader.lengths[last] - 1]


@dataclass
class Summary:
    """What one pass over the .idx and the last token of each document tells."""

    lengths: Lengths
    ends: dict[int, int]  # last token -> documents that end with it, the most frequent ones


def summarize(reader: IndexedReader) -> Summary:
    """Goes through all documents; of the .bin only the pages with their ends are read."""
    lengths, ends = Lengths(), {}
    for documents in everything(reader.num_documents):
        lengths.add(document_lengths(reader, documents))
        ids, counts = np.unique(last_tokens(reader, documents), return_counts=True)
        for token, count in zip(ids.tolist(), counts.tolist(), strict=True):
            ends[token] = ends.get(token, 0) + count
    return Summary(lengths, dict(sorted(ends.items(), key=lambda item: (-item[1], item[0]))[:10]))


@dataclass
class Scan:
    """What a pass over all tokens tells."""

    lowest: int = 0
    highest: int = -1  # below lowest: no token at all
    of_eod: int = 0  # tokens that are the end of a document


def scan(reader: IndexedReader, eod: int | None, moved: Callable[[int], None]) -> Scan:
    """Reads the whole .bin; tells `moved` the bytes."""
    result, flat = Scan(), reader.flat
    for low in range(0, len(flat), SCANNED):
        piece = flat[low:low + SCANNED]
        least, most = int(piece.min()), int(piece.max())
        result.lowest = least if low == 0 else min(result.lowest, least)
        result.highest = max(result.highest, most)
        if eod is not None:
            result.of_eod += int(np.count_nonzero(piece == eod))
        moved(piece.nbytes)
    return result


def document_tokens(reader: IndexedReader, number: int) -> np.ndarray:
    """All tokens of one document. Raises DataError for a number that it doesn't have."""
    if not 0 <= number < reader.num_documents:
        raise DataError(f"document {number} of {reader.prefix}, which has {reader.num_documents:,}, numbered from 0")
    starts, lengths = spans(reader, sequences_of(reader, np.array([number])))
    pieces = [reader.flat[start:start + length] for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)]
    return np.concatenate(pieces) if pieces else reader.flat[:0]


def document_holding(reader: IndexedReader, place: int) -> int:
    """The document whose sequences hold the token at this place of a .bin without gaps."""
    sequence = int(np.searchsorted(reader.pointers, place * reader.dtype.itemsize, side="right")) - 1
    return int(np.searchsorted(reader.document_indices, sequence, side="right")) - 1


def first_outside(reader: IndexedReader, vocab_size: int) -> int | None:
    """The place in `flat` of the first token that isn't in [0, vocab_size), if there is one."""
    for low in range(0, len(reader.flat), SCANNED):
        piece = reader.flat[low:low + SCANNED]
        bad = (piece < 0) | (piece >= vocab_size)
        if bad.any():
            return low + int(np.argmax(bad))
    return None


def check_whole(reader: IndexedReader) -> None:
    """Raises DataError unless the .idx describes each byte of the .bin exactly once and in order.

    The reader has checked the rest: sizes, document indices, and that no sequence leaves the .bin.
    """
    if not without_gaps(reader):
        raise DataError(f"{reader.idx_path}: its sequences don't follow one another in {reader.bin_path.name}: "
                        f"they have {reader.total_tokens * reader.dtype.itemsize:,} bytes of {reader.flat.nbytes:,}, "
                        "or overlap, or are in another order")

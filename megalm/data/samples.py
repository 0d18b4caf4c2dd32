"""Samples of seq_length + 1 tokens, packed from the shuffled documents of one data set.

Each epoch is a permutation of the documents, laid end to end, one epoch after another: a stream without gaps. Sample i of the
stream is its tokens [i * seq_length, (i + 1) * seq_length], so that neighbours share one token: a label here, an input there.
A sample belongs to the epoch of its last token; the samples of each epoch are shuffled among themselves. Both shuffles are
functions of (seed, epoch) alone, so the order doesn't depend on how many samples are asked for: a longer run begins with the
samples of a shorter one.

Both shuffles are computed where they are looked up (permutation.py). All that is kept is how many tokens of an epoch lie before
every STRIDE-th of its documents: an eighth of a byte a document and epoch.
"""
from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from .cache import cached
from .errors import DataError
from .indexed import IndexedReader
from .permutation import Permutation

INDEX_VERSION = 2
DOCUMENTS, SAMPLES = 0, 1  # what a permutation is for
STRIDE = 64
CHUNK = STRIDE << 14  # documents worked on at a time
BLOCKS = 1024  # of STRIDE documents that are remembered, 6 kB each
NEIGHBOURS = 1024  # samples whose places are looked up together, as a run reads them in order


def block_memory() -> Callable[[PackedSamples, int, int], tuple[list[int], list[int]]]:
    """Remembers the BLOCKS blocks that were looked up last, of all data sets that share it."""
    return lru_cache(maxsize=BLOCKS)(PackedSamples.look_up_block)


def epochs_needed(total_tokens: int, seq_length: int, num_samples: int) -> int:
    """The least number of epochs whose tokens hold num_samples samples."""
    return -(-(num_samples * seq_length + 1) // total_tokens)


def samples_in(epochs: int, total_tokens: int, seq_length: int) -> int:
    """The samples that end within the first `epochs` epochs."""
    return max(0, (epochs * total_tokens - 1) // seq_length)


def build_index(count: int, lengths: Callable[[np.ndarray], np.ndarray], epochs: int, seed: int) -> dict[str, np.ndarray]:
    """Where the blocks of STRIDE documents begin in each epoch: `marks`, int64 [epochs, blocks], tokens of the epoch before them.

    Pure: no file is touched. lengths: the tokens, int64 [n], of documents [n] of range(count).
    """
    marks = np.zeros((epochs, -(-count // STRIDE)), np.int64)
    for epoch in range(epochs):
        order, done = Permutation(count, seed, epoch, DOCUMENTS), 0
        for low in range(0, count, CHUNK):
            tokens = lengths(order.item_at(np.arange(low, min(low + CHUNK, count))))
            sums = np.add.reduceat(tokens, np.arange(0, len(tokens), STRIDE), dtype=np.int64)
            block = low // STRIDE
            marks[epoch, block] = done
            marks[epoch, block + 1:block + len(sums)] = done + np.cumsum(sums)[:-1]
            done += int(sums.sum())
    return {"marks": marks}


class PackedSamples:
    """The samples of one data set: an IndexedReader and its sample index."""

    def __init__(self, prefix: str | Path, seq_length: int, num_samples: int, seed: int, cache_dir: Path | None,
                 blocks: Callable | None = None):
        """Opens the data set and maps its index, building that first if `cache_dir` doesn't hold it (None: in memory).

        blocks: a block_memory() that is shared with others; None: one of its own.

        Raises DataError if the data set is damaged or holds no tokens.
        """
        if seq_length < 1:
            raise ValueError(f"seq_length is {seq_length}; it must be at least 1")
        self.reader = IndexedReader(prefix)
        self.prefix, self.seq_length, self.num_samples, self.seed = self.reader.prefix, seq_length, num_samples, seed
        if self.reader.total_tokens == 0:
            raise DataError(f"{prefix} holds no tokens: {self.reader.num_documents} documents, all empty")
        self.total_tokens, fingerprint = _measure(self.reader)
        self._count, self._spans, self._flat = self.reader.num_documents, self.reader.document_spans, self.reader.flat
        epochs = epochs_needed(self.total_tokens, seq_length, max(1, num_samples))
        description = {"version": INDEX_VERSION, "stride": STRIDE, "epochs": epochs, "seed": seed, "tokens": self.total_tokens,
                       "documents": self._count, "lengths": fingerprint}
        index = cached(cache_dir, Path(prefix).name, description,
                       lambda: build_index(self._count, lambda documents: self._spans(documents)[1], epochs, seed))
        self._marks = index["marks"]
        self._order = lru_cache(maxsize=8)(lambda count, epoch, what: Permutation(count, seed, epoch, what))
        self._block = partial(blocks or block_memory(), self)
        self._places = lru_cache(maxsize=2)(self._look_up_places)

    @property
    def epochs(self) -> float:
        """How often num_samples samples go through the data set; each takes seq_length new tokens."""
        return self.epochs_of(self.num_samples)

    def epochs_of(self, num_samples: int) -> float:
        """How often so many samples go through it."""
        return num_samples * self.seq_length / self.total_tokens

    def tokens(self, index: int, out: np.ndarray | None = None) -> np.ndarray:
        """The token ids of one sample, int64 [seq_length + 1], written to `out` if given."""
        out = np.empty(self.seq_length + 1, np.int64) if out is None else out
        for done, start, take in self._pieces(index, len(out)):
            out[done:done + take] = self._flat[start:start + take]
        return out

    def document_starts(self, index: int) -> np.ndarray:
        """Where in its seq_length input tokens a sample's documents begin: int32 [documents], from 0 on, in order.

        The first is what the sample has of a document that may have begun before. Reads the index and no token. A document
        that follows itself, in another epoch, is another one.
        """
        return np.fromiter((done for done, _, _ in self._pieces(index, self.seq_length)), np.int32)

    def _pieces(self, index: int, length: int) -> Iterator[tuple[int, int, int]]:
        """(place in the sample, place in the data set, tokens) of each document's piece of the first `length` tokens."""
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.prefix}, which was built for {self.num_samples}")
        epoch, offset = divmod(self._stream_place(index) * self.seq_length, self.total_tokens)
        block, done = int(self._marks[epoch].searchsorted(offset, "right")) - 1, 0
        offset -= int(self._marks[epoch, block])
        while done < length:
            starts, ends = self._block(epoch, block)
            for place in range(bisect_right(ends, offset), len(ends)):
                take = min(ends[place] - offset, length - done)
                if take:  # not an empty document
                    yield done, starts[place] + offset, take
                    done, offset = done + take, offset + take
                if done == length:
                    return
            block, offset = block + 1, 0
            if block == self._marks.shape[1]:
                epoch, block = epoch + 1, 0

    def _stream_place(self, index: int) -> int:
        """Which sample of the stream is sample `index` of the shuffled order."""
        epoch = epochs_needed(self.total_tokens, self.seq_length, index + 1) - 1
        low = samples_in(epoch, self.total_tokens, self.seq_length)
        near, place = divmod(index - low, NEIGHBOURS)
        return low + int(self._places(epoch, near)[place])

    def _look_up_places(self, epoch: int, near: int) -> np.ndarray:
        """NEIGHBOURS entries of the shuffle of an epoch's samples, or as many as are left of it: int64 [n]."""
        low, high = (samples_in(e, self.total_tokens, self.seq_length) for e in (epoch, epoch + 1))
        places = np.arange(near * NEIGHBOURS, min((near + 1) * NEIGHBOURS, high - low))
        return self._order(high - low, epoch, SAMPLES).item_at(places)

    def look_up_block(self, epoch: int, block: int) -> tuple[list[int], list[int]]:
        """Of STRIDE documents in their order in an epoch: where they end in the block, and where in the data set each would
        start if it had all of the block before itself."""
        places = np.arange(block * STRIDE, min((block + 1) * STRIDE, self._count))
        starts, lengths = self._spans(self._order(self._count, epoch, DOCUMENTS).item_at(places))
        ends = np.cumsum(lengths)
        return (starts - (ends - lengths)).tolist(), ends.tolist()


def _measure(reader: IndexedReader) -> tuple[int, str]:
    """(tokens, fingerprint) of the lengths of all documents. Raises DataError as `check_documents` does."""
    reader.check_documents()
    total, digest = 0, hashlib.blake2b(digest_size=16)
    for low in range(0, reader.num_documents, CHUNK):
        _, lengths = reader.document_spans(np.arange(low, min(low + CHUNK, reader.num_documents)))
        total += int(lengths.sum())
        digest.update(lengths.astype("<i8").data)
    return total, digest.hexdigest()

"""Samples of seq_length + 1 tokens, packed from the shuffled documents of one data set.

Each epoch is a permutation of the documents, laid end to end, one epoch after another: a stream without gaps. Sample i of the
stream is its tokens [i * seq_length, (i + 1) * seq_length], so that neighbours share one token: a label here, an input there.
A sample belongs to the epoch of its last token; the samples of each epoch are shuffled among themselves. Both shuffles are
functions of (seed, epoch) alone, so the order doesn't depend on how many samples are asked for: a longer run begins with the
samples of a shorter one.
"""
from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .cache import cached
from .errors import DataError
from .indexed import IndexedReader

INDEX_VERSION = 1
DOCUMENTS, SAMPLES = 0, 1  # what a permutation is for


def permutation(count: int, seed: int, epoch: int, what: int) -> np.ndarray:
    """A permutation of range(count) that depends on the arguments alone: int32 where it fits, else int64.

    numpy's RandomState is frozen (NEP 19): an upgrade doesn't change the order in which a run sees its data.
    """
    random = np.random.RandomState([seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, epoch & 0xFFFFFFFF, epoch >> 32, what])
    order = np.arange(count, dtype=np.int32 if count < 2**31 else np.int64)
    random.shuffle(order)
    return order


def epochs_needed(total_tokens: int, seq_length: int, num_samples: int) -> int:
    """The least number of epochs whose tokens hold num_samples samples."""
    return -(-(num_samples * seq_length + 1) // total_tokens)


def samples_in(epochs: int, total_tokens: int, seq_length: int) -> int:
    """The samples that end within the first `epochs` epochs."""
    return max(0, (epochs * total_tokens - 1) // seq_length)


def build_index(lengths: np.ndarray, seq_length: int, epochs: int, seed: int) -> dict[str, np.ndarray]:
    """The sample index of documents with these lengths (int [D], in tokens, empty ones allowed) over so many epochs.

    Pure: no file is touched. Returns `documents` [epochs * filled D], the documents in stream order, and for each sample, in
    shuffled order, its first token: `places` [N], a place in `documents`, and `offsets` [N], a token within that document.
    """
    filled = np.flatnonzero(lengths)
    filled = filled.astype(np.int32) if len(lengths) < 2**31 else filled
    lengths = np.asarray(lengths)[filled].astype(np.int64)
    total, number = int(lengths.sum()), len(filled)
    count = samples_in(epochs, total, seq_length)
    documents = np.empty(epochs * number, filled.dtype)
    places = np.empty(count, np.uint32 if epochs * number < 2**32 else np.int64)
    offsets = np.empty(count, np.uint32 if lengths.max() < 2**32 else np.int64)
    low = 0  # the first sample that starts in this epoch
    for epoch in range(epochs):
        order = permutation(number, seed, epoch, DOCUMENTS)
        documents[epoch * number:(epoch + 1) * number] = filled[order]
        ends = np.cumsum(lengths[order])  # [number], tokens of the epoch up to and with each document
        high = min(count, -(-(epoch + 1) * total // seq_length))
        starts = np.arange(low, high, dtype=np.int64) * seq_length - epoch * total
        at = np.searchsorted(ends, starts, side="right")
        places[low:high] = epoch * number + at
        offsets[low:high] = starts - np.where(at > 0, ends[at - 1], 0)
        low = high
    for epoch in range(epochs):
        low, high = samples_in(epoch, total, seq_length), samples_in(epoch + 1, total, seq_length)
        order = permutation(high - low, seed, epoch, SAMPLES)
        places[low:high] = places[low:high][order]
        offsets[low:high] = offsets[low:high][order]
    return {"documents": documents, "places": places, "offsets": offsets}


class PackedSamples:
    """The samples of one data set: an IndexedReader and its sample index."""

    def __init__(self, prefix: str | Path, seq_length: int, num_samples: int, seed: int, cache_dir: Path | None):
        """Opens the data set and maps its index, building that first if `cache_dir` doesn't hold it (None: in memory).

        Raises DataError if the data set is damaged or holds no tokens.
        """
        if seq_length < 1:
            raise ValueError(f"seq_length is {seq_length}; it must be at least 1")
        self.reader = IndexedReader(prefix)
        self.prefix, self.seq_length, self.num_samples = self.reader.prefix, seq_length, num_samples
        if self.reader.total_tokens == 0:
            raise DataError(f"{prefix} holds no tokens: {self.reader.num_documents} documents, all empty")
        self._starts, lengths = self.reader.document_spans()
        self._lengths = lengths
        self.total_tokens = int(lengths.sum())
        epochs = epochs_needed(self.total_tokens, seq_length, max(1, num_samples))
        description = {
            "version": INDEX_VERSION, "seq_length": seq_length, "epochs": epochs, "seed": seed, "tokens": self.total_tokens,
            "documents": len(lengths), "lengths": hashlib.blake2b(lengths.astype("<i8").data, digest_size=16).hexdigest(),
        }
        index = cached(cache_dir, Path(prefix).name, description, lambda: build_index(lengths, seq_length, epochs, seed))
        self._documents, self._places, self._offsets = index["documents"], index["places"], index["offsets"]

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
        flat = self.reader.flat
        for done, start, take in self._pieces(index, len(out)):
            out[done:done + take] = flat[start:start + take]
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
        place, offset, done = int(self._places[index]), int(self._offsets[index]), 0
        while done < length:
            document = self._documents[place]
            take = min(int(self._lengths[document]) - offset, length - done)
            yield done, int(self._starts[document]) + offset, take
            done, place, offset = done + take, place + 1, 0

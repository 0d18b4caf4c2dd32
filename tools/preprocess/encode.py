"""Documents to the arrays of a data set: the tokens of all, the lengths of their sequences, the sequences of each."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megalm.data.errors import DataError

from .backends import Backend

MOST = 2**31 - 1  # tokens of a sequence, with its end: they are counted in an int32
PIECE = 1 << 22  # tokens that are made ready to be written at a time: a document may have 1 GB


@dataclass
class Documents:
    """Some documents: lengths int32 [sequences]; counts int32 [documents], the sequences of each; their tokens, in pieces.

    `ids` [n] of any integer dtype, and behind the first so many of them, for each of `ends`, in order, the token `eod`.
    """

    ids: np.ndarray
    ends: np.ndarray
    eod: int
    dtype: np.dtype
    lengths: np.ndarray
    counts: np.ndarray

    def pieces(self) -> Iterator[np.ndarray]:
        """The tokens [n + ends], in the dtype of the data set."""
        for low in range(0, len(self.ids), PIECE):
            first, after = np.searchsorted(self.ends, (low, low + PIECE), "right")
            yield with_ends(self.ids[low:low + PIECE], (self.ends[first:after] - low).tolist(), self.eod, self.dtype)

    @property
    def tokens(self) -> np.ndarray:
        """All of them."""
        return np.concatenate([np.zeros(0, self.dtype), *self.pieces()])

    def document_lengths(self) -> np.ndarray:
        """Tokens of each document, int64 [documents]."""
        ends = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])
        edges = np.concatenate([[0], np.cumsum(self.counts, dtype=np.int64)])
        return np.diff(ends[edges])

    def keep(self, kept: np.ndarray) -> Documents:
        """Those of a bool mask [documents]."""
        if kept.all():
            return self
        sequences = np.repeat(kept, self.counts)
        return Documents(self.tokens[np.repeat(sequences, self.lengths)], self.ends[:0], self.eod, self.dtype,
                         self.lengths[sequences], self.counts[kept])


def encode(texts: Sequence[str], backend: Backend, eod: int | None, dtype: np.dtype,
           split: Callable[[str], list[str]] | None = None) -> Documents:
    """The documents as Megatron-LM's preprocess_data.py has them.

    One sequence each, or one for each sentence that `split` finds. A sequence without tokens is left out; so an empty text
    makes a document of no sequence, which gets no end of document either; else `eod` is the last token of its last sequence.
    """
    if split is None:
        ids, lengths = backend(texts)
        counts = (lengths > 0).astype(np.int32)
    else:
        sentences = [split(text) for text in texts]
        ids, lengths = backend([sentence for document in sentences for sentence in document])
        edges = np.concatenate([[0], np.cumsum(np.fromiter(map(len, sentences), np.int64, len(sentences)))])
        counts = np.diff(np.concatenate([[0], np.cumsum(lengths > 0)])[edges]).astype(np.int32)
    lengths = lengths[lengths > 0]
    if len(lengths) and int(lengths.max()) >= MOST:
        raise DataError(f"a text of {int(lengths.max()):,} tokens: the format's lengths end below {MOST:,}; cut it, or leave "
                        "it out with --max-characters")
    if len(ids) and int(ids.max()) > np.iinfo(dtype).max:
        raise DataError(f"token id {int(ids.max())} doesn't fit {dtype}: the tokenizer gives ids beyond its vocabulary")
    ends = np.zeros(0, np.int64)
    longer = lengths.astype(np.int32)
    if eod is not None:
        last = np.cumsum(counts, dtype=np.int64)[counts > 0] - 1  # the last sequence of each document that has one
        ends = np.cumsum(lengths, dtype=np.int64)[last]
        longer[last] += 1
    return Documents(ids, ends, eod or 0, dtype, longer, counts)


def with_ends(ids: np.ndarray, ends: list[int], eod: int, dtype: np.dtype) -> np.ndarray:
    """The ids [n] with `eod` put in at each of the ends, in the dtype of the data set."""
    tokens = np.empty(len(ids) + len(ends), dtype)
    start = 0
    for before, end in enumerate(ends):
        tokens[start + before:end + before] = ids[start:end]
        tokens[end + before] = eod
        start = end
    tokens[start + len(ends):] = ids[start:]
    return tokens

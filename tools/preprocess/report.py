"""What became of the documents, added up over the parts: for the line at the end, the description and the report."""
from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field

import numpy as np

from megalm.tools._command import counted
from megalm.tools._progress import Progress

from .parts import Part

SHOWN = 10  # problems that are printed
BINS = 40  # of the histogram: documents of [2^i, 2^(i+1)) tokens


@dataclass
class Totals:
    """Sums over parts. `reasons`: {why: [documents, bytes of text]} of what was left out."""

    bytes_read: int = 0  # of the input files
    documents_in: int = 0
    bytes_in: int = 0
    documents: int = 0
    sequences: int = 0
    tokens: int = 0
    bytes: int = 0  # of text in the documents that stay
    empty: int = 0
    malformed: int = 0
    reasons: dict[str, list[int]] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)  # documents that a filter altered
    histogram: list[int] = field(default_factory=lambda: [0] * BINS)
    problems: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    hashes: list[list] = field(default_factory=list)  # [source, SHA-256 of a part of it], in order

    @classmethod
    def load(cls, values: dict) -> Totals:
        return cls(**values)

    def dump(self) -> dict:
        return asdict(self)

    def drop(self, why: str, documents: int, size: int) -> None:
        """Count what was left out."""
        if documents:
            entry = self.reasons.setdefault(why, [0, 0])
            entry[0] += documents
            entry[1] += size

    def add(self, part: Part, lengths: np.ndarray, counts: np.ndarray, sizes: np.ndarray) -> None:
        """Count a part: lengths of its sequences, sequences and bytes of text of its documents, of those that stay."""
        made = part.counts
        self.bytes_read += made["bytes_read"]
        self.documents_in += made["documents_in"]
        self.bytes_in += made["bytes_in"]
        self.malformed += made["malformed"]
        for why, (documents, size) in made["reasons"].items():
            self.drop(why, documents, size)
        for what, documents in made["changed"].items():
            self.changed[what] = self.changed.get(what, 0) + documents
        self.documents += len(counts)
        self.sequences += len(lengths)
        self.tokens += int(lengths.sum(dtype=np.int64))
        self.bytes += int(sizes.sum())
        self.empty += int((counts == 0).sum())
        self._count_lengths(lengths, counts)
        self.problems += made["problems"][:SHOWN - len(self.problems)]
        self.differences += made["differences"][:SHOWN - len(self.differences)]
        self.hashes += made["hashes"]

    def _count_lengths(self, lengths: np.ndarray, counts: np.ndarray) -> None:
        ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        edges = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        tokens = np.diff(ends[edges])
        bins = np.bincount(np.frexp(tokens[tokens > 0])[1] - 1, minlength=BINS)[:BINS]
        self.histogram = [was + int(more) for was, more in zip(self.histogram, bins, strict=True)]


def summary(prefix: str, totals: Totals, dtype: np.dtype, progress: Progress, tokenizer: str) -> str:
    """The line at the end."""
    text = (f"{prefix}: {counted(totals.documents, 'document')}, {counted(totals.tokens, 'token')} ({dtype}), "
            f"from {progress.done / 1e6:.1f} MB "
            f"at {progress.speed / 1e6:.1f} MB/s, tokenized by {tokenizer}")
    if totals.sequences > totals.documents:
        text += f"; {counted(totals.sequences, 'sentence')}"
    if totals.empty:
        text += f"; {counted(totals.empty, 'empty document')}"
    mended = totals.malformed - totals.reasons.get("not UTF-8", [0])[0]
    if mended:
        text += f"; what isn't UTF-8 replaced in {counted(mended, 'document')}"
    for what, documents in totals.changed.items():
        text += f"; {what} in {counted(documents, 'document')}"
    for why, (documents, _) in totals.reasons.items():
        text += f"; {counted(documents, 'document')} left out: {why}"
    return text


def show_problems(totals: Totals) -> None:
    """The first documents that were left out or mended, on stderr."""
    for problem in totals.problems[:SHOWN]:
        print(problem, file=sys.stderr)
    for document in totals.differences[:SHOWN]:
        print(f"different: {document}; the reference's were taken", file=sys.stderr)

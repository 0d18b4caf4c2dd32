"""What a run is: everything that its output depends on, and the work on one piece of its input."""
from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from megalm.data.tokenizer import Tokenizer, TokenizerSource, load_tokenizer

from .backends import Backend, Reference, failure_of, fast_backend
from .cleaning import Cleaner, Cleaning
from .duplicates import exact_marks, near_marks
from .encode import Documents, encode
from .inputs import Source, Unit, span_hash
from .parts import PartWriter
from .reading import Chunk, read_chunks
from .sentences import split_sentences
from .texts import SHOWN, Found, Policy, texts_of


@dataclass(frozen=True)
class Job:
    """Sent to every worker once. The output depends on these alone, and on the bytes of the sources."""

    tokenizer: TokenizerSource
    policy: Policy
    dtype: str
    folder: str  # for the parts
    sources: tuple[Source, ...]
    append_eod: bool = True
    sentences: bool = False
    fast: bool = False  # the check has allowed the fast backend
    short: bool = False  # as fast_backend has it
    verify: bool = False  # compare it with the reference on every document
    cleaning: Cleaning = Cleaning()


@dataclass
class Counts(Found):
    """What became of the documents of a piece; everything that the report adds up."""

    bytes_in: int = 0  # of the texts that were read
    changed: dict[str, int] = field(default_factory=dict)  # documents that a filter altered
    differences: list[str] = field(default_factory=list)  # documents of which the fast backend gives other ids
    hashes: list[tuple[int, str]] = field(default_factory=list)  # (number of the source, SHA-256 of its part)


class Worker:
    """Makes parts of units: in this process, or one in each worker process."""

    def __init__(self, job: Job, tokenizer: Tokenizer | None = None, fast: Backend | None = None):
        """Loads the tokenizer, and the fast one if the job has it, unless they are given."""
        self.job, self.dtype = job, np.dtype(job.dtype)
        tokenizer = tokenizer or load_tokenizer(job.tokenizer)
        self.eod = tokenizer.eod if job.append_eod else None
        self.reference = Reference(tokenizer)
        self.fast = (fast or fast_backend(tokenizer, job.short)[0]) if job.fast else None
        self.split = split_sentences if job.sentences else None
        self.cleaner = Cleaner(job.cleaning) if job.cleaning.of_text else None

    def __call__(self, number: int, unit: Unit) -> None:
        """Write part `number`. Raises DataError for a document that can't be taken nor left out, OSError for a full disk."""
        counts = Counts()
        with PartWriter(Path(self.job.folder), number, self.dtype) as part:
            for span in unit:
                source = self.job.sources[span.source]
                source.check()
                for chunk in read_chunks(source, span, self.job.policy.field):
                    self._chunk(chunk, counts, part)
                if source.by_bytes or span.start == 0:
                    counts.hashes.append((span.source, span_hash(source, span).hex()))
                source.check()
            part.finish(asdict(counts))

    def _chunk(self, chunk: Chunk, counts: Counts, part: PartWriter) -> None:
        texts, places = texts_of(chunk, self.job.policy, counts)
        counts.bytes_in += sum(map(utf8_size, texts))
        if self.cleaner is not None:
            texts, places = self._clean(texts, places, counts)
        sizes = np.fromiter(map(utf8_size, texts), np.int64, len(texts))
        documents = self._encode(texts, chunk, places, counts)
        cleaning, marks = self.job.cleaning, {}
        if cleaning.of_tokens:
            kept = self._fitting(documents.document_lengths(), sizes, counts)
            documents, sizes = documents.keep(kept), sizes[kept]
            texts = [text for text, stays in zip(texts, kept, strict=True) if stays]
        if cleaning.deduplicate:
            marks["exact"] = exact_marks(texts)
        if cleaning.near_duplicates is not None:
            marks["near"] = near_marks(texts)
        part.add(documents.tokens, lengths=documents.lengths, counts=documents.counts, sizes=sizes, **marks)

    def _clean(self, texts: list[str], places: list[int], counts: Counts) -> tuple[list[str], list[int]]:
        kept_texts, kept_places = [], []
        for text, place in zip(texts, places, strict=True):
            cleaned, why = self.cleaner(text, counts.changed)
            if cleaned is None:
                counts.drop(why, utf8_size(text))
            else:
                kept_texts.append(cleaned)
                kept_places.append(place)
        return kept_texts, kept_places

    def _fitting(self, tokens: np.ndarray, sizes: np.ndarray, counts: Counts) -> np.ndarray:
        """Which documents have as many tokens as asked, bool [documents]."""
        most = self.job.cleaning.max_tokens
        few = tokens < self.job.cleaning.min_tokens
        many = tokens > most if most is not None else np.zeros_like(few)
        for why, mask in (("of too few tokens", few), ("of too many tokens", many)):
            for size in sizes[mask]:
                counts.drop(why, int(size))
        return ~few & ~many

    def _encode(self, texts: list[str], chunk: Chunk, places: list[int], counts: Counts) -> Documents:
        if self.fast is None:
            return encode(texts, self.reference, self.eod, self.dtype, self.split)
        try:
            documents = encode(texts, self.fast, self.eod, self.dtype, self.split)
        except BaseException as error:
            if (why := failure_of(error)) is None:
                raise
            self.fast = fast_backend(self.reference.tokenizer, self.job.short)[0]  # what failed in the middle may be broken
            if len(counts.differences) < SHOWN:
                counts.differences.append(f"{chunk.where(places[0])}, {len(texts)} documents from there on: the fast tokenizer "
                                          f"fails ({why})")
            return encode(texts, self.reference, self.eod, self.dtype, self.split)
        if not self.job.verify:
            return documents
        right = encode(texts, self.reference, self.eod, self.dtype, self.split)
        for place in different(documents, right)[:max(0, SHOWN - len(counts.differences))]:
            counts.differences.append(f"{chunk.where(places[place])}: the fast tokenizer gives other ids")
        return right


def different(documents: Documents, right: Documents) -> list[int]:
    """The documents that aren't the same in both."""
    if np.array_equal(documents.tokens, right.tokens) and np.array_equal(documents.lengths, right.lengths):
        return []
    theirs, ours = (np.split(d.tokens, np.cumsum(d.document_lengths())[:-1]) for d in (documents, right))
    return [place for place, pair in enumerate(zip(theirs, ours, strict=True)) if not np.array_equal(*pair)]


def utf8_size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())

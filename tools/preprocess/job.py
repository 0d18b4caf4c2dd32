"""What a run is: everything that its output depends on, and the work on one piece of its input."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megalm.data.tokenizer import Tokenizer

from .backends import Reference, failure_of, fast_backend
from .checking import Sample, first_difference
from .cleaning import Cleaner, Cleaning
from .duplicates import exact_marks, near_marks
from .encode import Documents, encode
from .inputs import Source, span_hashes, stream_of
from .parts import PartWriter, part_path
from .reading import Chunk, read_chunks, whole_lines
from .sentences import split_sentences
from .streams import TextStream
from .texts import SHOWN, Found, Policy, texts_of

if TYPE_CHECKING:
    from .tasks import Task


@dataclass(frozen=True)
class Job:
    """Known to every worker. The output depends on these and the tokenizer alone, and on the bytes of the sources."""

    policy: Policy
    dtype: str
    folder: str  # for the parts
    sources: tuple[Source, ...]
    unit_bytes: int  # of the text of a compressed file that are a part
    append_eod: bool = True
    sentences: bool = False
    verify: bool = False  # compare the fast backend with the reference on every document
    cleaning: Cleaning = Cleaning()
    check: bool = False  # may a fast backend be compared, and used if it is equal


@dataclass
class Counts(Found):
    """What became of the documents of a part; everything that the report adds up."""

    last: bool = True  # of the parts of its unit
    bytes_read: int = 0  # of the input files
    bytes_in: int = 0  # of the texts that were read
    changed: dict[str, int] = field(default_factory=dict)  # documents that a filter altered
    differences: list[str] = field(default_factory=list)  # documents of which the fast backend gives other ids
    hashes: list[tuple[int, str]] = field(default_factory=list)  # (number of the source, SHA-256 of its part)


class Worker:
    """Makes parts of units: in this process, or one in each worker process."""

    def __init__(self, job: Job, tokenizer: Tokenizer):
        """The reference tokenizes until `use` says otherwise. `why`: there is no fast backend."""
        self.job, self.dtype = job, np.dtype(job.dtype)
        self.eod = tokenizer.eod if job.append_eod else None
        self.reference, self.allowed = Reference(tokenizer), False
        self.fast, self.why = fast_backend(tokenizer) if job.check else (None, "")
        self.split = split_sentences if job.sentences else None
        self.cleaner = Cleaner(job.cleaning) if job.cleaning.of_text else None

    def use(self, fast: bool, short: bool) -> None:
        """`fast`: tokenize with the fast backend, where there is one. `short`: the texts are, as it has it."""
        self.allowed = fast and self.fast is not None
        if self.fast is not None:
            self.fast.short = short

    def compare(self, samples: Sequence[Sample], short: bool) -> str | None:
        """The first of the samples that the fast backend, which must be there, gives other ids for, in words; None for none."""
        self.use(True, short)
        try:
            return first_difference(samples, self.fast, self.reference)
        except BaseException as error:
            if (why := failure_of(error)) is None:
                raise
            return f"nothing: it fails ({why})"

    def __call__(self, task: Task) -> Iterator[None]:
        """Write the parts of a task; it comes back after each.

        Raises DataError for a document that can't be taken nor left out, OSError for a full disk.
        """
        source = stream_of(task.unit, self.job.sources)
        if source is None:
            self._unit(task)
        elif task.piece is None:
            yield from self._stream(task, source)
        else:
            piece, path = task.piece, Path(task.piece.path)
            with open(path, "rb", buffering=0) as text:
                self._lines(task, piece.number, text, piece.first, lambda: (piece.last, piece.digest, piece.bytes_read))
            path.unlink()
        yield

    def _unit(self, task: Task) -> None:
        counts = Counts(bytes_read=sum(span.weight for span in task.unit))
        with PartWriter(part_path(self.job.folder, task.number), self.dtype) as part:
            for span in task.unit:
                source = self.job.sources[span.source]
                source.check()
                for chunk in read_chunks(source, span, self.job.policy.field):
                    self._chunk(chunk, counts, part)
                counts.hashes += [(span.source, digest.hex()) for digest in span_hashes(source, span)]
                source.check()
            part.finish(asdict(counts))

    def _stream(self, task: Task, source: Source) -> Iterator[None]:
        """A compressed file, all of whose parts are made here."""
        with TextStream(source, self.job.unit_bytes) as text:
            for number in text.pieces():
                if number not in task.done:
                    self._lines(task, number, text, text.first, text.end)
                    yield

    def _lines(self, task: Task, number: int, text, first: int, end: Callable[[], tuple[bool, str, int]]) -> None:
        """One part of a compressed file: `text` is read to its end, and then `end` says what TextStream's does."""
        counts, source = Counts(), task.unit[0].source
        with PartWriter(part_path(self.job.folder, task.number, number), self.dtype) as part:
            for offset, lines in whole_lines(text, 0, None):
                self._chunk(Chunk(self.job.sources[source], lines, first + offset), counts, part)
            counts.last, digest, counts.bytes_read = end()
            counts.hashes += [(source, digest)] if counts.last else []
            part.finish(asdict(counts))

    def _chunk(self, chunk: Chunk, counts: Counts, part: PartWriter) -> None:
        texts, places = texts_of(chunk, self.job.policy, counts)
        chunk.let_go()
        sizes = utf8_sizes(texts)
        counts.bytes_in += int(sizes.sum())
        if self.cleaner is not None:
            texts, places = self._clean(texts, places, counts)
            sizes = utf8_sizes(texts)
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
        part.add(documents.pieces(), lengths=documents.lengths, counts=documents.counts, sizes=sizes, **marks)

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
        if not self.allowed:
            return encode(texts, self.reference, self.eod, self.dtype, self.split)
        try:
            documents = encode(texts, self.fast, self.eod, self.dtype, self.split)
        except BaseException as error:
            if (why := failure_of(error)) is None:
                raise
            self.fast = fast_backend(self.reference.tokenizer, self.fast.short)[0]  # what failed in the middle may be broken
            self.allowed = self.fast is not None
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


def utf8_sizes(texts: Sequence[str]) -> np.ndarray:
    """Bytes of each text, int64 [texts]."""
    return np.fromiter(map(utf8_size, texts), np.int64, len(texts))


def utf8_size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())

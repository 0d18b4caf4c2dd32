"""The texts a tokenizer is trained on and those it is measured on, drawn from a corpus in one pass."""
from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence

from megalm.data.errors import DataError
from megalm.data.sample import Sample, share_of
from megalm.tools._command import counted
from megalm.tools._progress import Progress
from megalm.tools.preprocess.inputs import Source, find_sources, spans
from megalm.tools.preprocess.reading import Chunk, read_chunks
from megalm.tools.preprocess.texts import Found, Policy, texts_of

UNIT_BYTES = 64 << 20  # of a file at a time
PIECE = 1 << 20  # characters; a longer document takes part in pieces
MOST_HELD_OUT = 4_000_000  # bytes of each group that are measured
DEFAULT_GROUP = "corpus"


class Corpus:
    """Goes through the input files once: `training` and `held_out` hold what was drawn."""

    def __init__(self, arguments: argparse.Namespace):
        """Raises DataError for files that can't be inputs, or --held-out that isn't NAME=FILE."""
        self.arguments = arguments
        self.sources = find_sources(arguments.input, no_stream)
        self.held_out_files = held_out_files(arguments.held_out)
        self.share = 0.0 if self.held_out_files else arguments.held_out_share
        self.training = Sample(arguments.seed, arguments.sample_bytes, arguments.sample_documents)
        self.held_out: dict[str, Sample] = {}
        self.documents, self.found = 0, Found()

    def read(self) -> None:
        """Draw from all files. Raises DataError for a document that can't be read, and for a corpus without text."""
        known = all(source.by_bytes or source.kind == "txt" and not source.compression for source in self.sources)
        size = sum(source.size for source in self.sources) if known else 0  # else nobody knows how much text there is
        with Progress("read", size, self.arguments.quiet) as progress:
            for text, language in self._texts(self.sources, progress):
                self.documents += 1
                for piece in pieces(text):
                    self._offer(piece.encode(), language)
            for name, source in self.held_out_files:
                for text, _ in self._texts([source], progress):
                    for piece in pieces(text):
                        self._hold_out(name, piece.encode())
        if not self.training.bytes:  # of a very small corpus all may be held out
            for sample in self.held_out.values() if self.share else ():
                for text in sample:
                    self.training.offer(text.encode())
            self.held_out = {} if self.share else self.held_out
        if not self.training.bytes:
            raise DataError(f"no text in {', '.join(self.arguments.input)}: {counted(self.documents, 'document')}")

    def _offer(self, text: bytes, language: str | None) -> None:
        if self.share and share_of(text, self.arguments.seed) < self.share:
            self._hold_out(language or DEFAULT_GROUP, text)
        elif text:
            self.training.offer(text)

    def _hold_out(self, name: str, text: bytes) -> None:
        if name not in self.held_out:
            self.held_out[name] = Sample(self.arguments.seed, MOST_HELD_OUT)
        self.held_out[name].offer(text)

    def _texts(self, sources: Sequence[Source], progress: Progress) -> Iterator[tuple[str, str | None]]:
        """(text, its language by --language-field if it says) of each document that can be read."""
        policy = Policy(self.arguments.field, self.arguments.encoding_errors, self.arguments.skip_invalid)
        for number, source in enumerate(sources):
            for span in spans(number, source, UNIT_BYTES):
                for chunk in read_chunks(source, span, policy.field):
                    texts, places = texts_of(chunk, policy, self.found)
                    for text, place in zip(texts, places, strict=True):
                        yield text, self._language(chunk, place)
                    progress.add(sum(len(raw or b"") for raw in chunk.raw))

    def _language(self, chunk: Chunk, place: int) -> str | None:
        if self.arguments.language_field is None or chunk.source.kind != "jsonl":
            return None
        value = json.loads(chunk.raw[place].decode("utf-8-sig", "replace")).get(self.arguments.language_field)
        return value if isinstance(value, str) else None

    @property
    def skipped(self) -> int:
        """Documents that were left out."""
        return sum(documents for documents, _ in self.found.reasons.values())


def no_stream(name: str) -> Source:
    """Raises DataError: what can be read only once isn't kept."""
    raise DataError(f"input {name} is a stream; write it to a file first")


def held_out_files(words: Sequence[str]) -> list[tuple[str, Source]]:
    """["en=a.jsonl"] -> [("en", "a.jsonl")]; globs and folders as in inputs. Raises DataError for anything else."""
    found = []
    for word in words:
        name, _, path = word.partition("=")
        if not name or not path:
            raise DataError(f"--held-out {word}: NAME=FILE is wanted, such as en=english.jsonl")
        found += [(name, source) for source in find_sources([path], no_stream)]
    return found


def pieces(text: str) -> Iterator[str]:
    """A text, or where it is longer than PIECE, its parts, cut after a line end if there is one in the second half."""
    start = 0
    while len(text) - start > PIECE:
        cut = text.rfind("\n", start + PIECE // 2, start + PIECE) + 1 or start + PIECE
        yield text[start:cut]
        start = cut
    yield text[start:]

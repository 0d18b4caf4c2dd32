"""The texts a tokenizer is trained on and those it is measured on, drawn from a corpus in one pass."""
from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from megalm.data.documents import Batch
from megalm.data.errors import DataError
from megalm.data.inputs import find_files, read_files, text_of
from megalm.data.sample import Sample, share_of
from megalm.tools._progress import Progress

PIECE = 1 << 20  # characters; a longer document takes part in pieces
MOST_HELD_OUT = 4_000_000  # bytes of each group that are measured
DEFAULT_GROUP = "corpus"


class Corpus:
    """Goes through the input files once: `training` and `held_out` hold what was drawn."""

    def __init__(self, arguments: argparse.Namespace):
        """Raises DataError for files that can't be inputs, or --held-out that isn't NAME=FILE."""
        self.arguments = arguments
        self.files = find_files(arguments.input)
        self.held_out_files = held_out_files(arguments.held_out)
        self.share = 0.0 if self.held_out_files else arguments.held_out_share
        self.training = Sample(arguments.seed, arguments.sample_bytes, arguments.sample_documents)
        self.held_out: dict[str, Sample] = {}
        self.documents = self.skipped = 0

    def read(self) -> None:
        """Draw from all files. Raises DataError for a document that can't be read, and for a corpus without text."""
        compressed = any(path.endswith((".gz", ".zst")) for path in self.files)  # then nobody knows how much text there is
        size = 0 if compressed else sum(Path(path).stat().st_size for path in self.files)
        with Progress("read", size, self.arguments.quiet) as progress:
            for text, language in self._texts(self.files, progress):
                self.documents += 1
                for piece in pieces(text):
                    self._offer(piece.encode(), language)
            for name, path in self.held_out_files:
                for text, _ in self._texts([path], progress):
                    for piece in pieces(text):
                        self._hold_out(name, piece.encode())
        if not self.training.bytes:  # of a very small corpus all may be held out
            for sample in self.held_out.values() if self.share else ():
                for text in sample:
                    self.training.offer(text.encode())
            self.held_out = {} if self.share else self.held_out
        if not self.training.bytes:
            raise DataError(f"no text in {', '.join(self.arguments.input)}: {self.documents} documents")

    def _offer(self, text: bytes, language: str | None) -> None:
        if self.share and share_of(text, self.arguments.seed) < self.share:
            self._hold_out(language or DEFAULT_GROUP, text)
        elif text:
            self.training.offer(text)

    def _hold_out(self, name: str, text: bytes) -> None:
        if name not in self.held_out:
            self.held_out[name] = Sample(self.arguments.seed, MOST_HELD_OUT)
        self.held_out[name].offer(text)

    def _texts(self, paths: Sequence[str], progress: Progress) -> Iterator[tuple[str, str | None]]:
        """(text, its language by --language-field if it says) of each document that can be read."""
        for batch in read_files(paths, self.arguments.field):
            for place in range(len(batch.documents)):
                try:
                    text = text_of(batch, place, self.arguments.field, self.arguments.encoding_errors)
                except DataError as error:
                    if not self.arguments.skip_invalid:
                        raise DataError(f"{error}; --skip-invalid leaves such documents out") from error
                    text = None
                if text is None:
                    self.skipped += 1
                else:
                    yield text, self._language(batch, place)
            progress.add(batch.size)

    def _language(self, batch: Batch, place: int) -> str | None:
        if self.arguments.language_field is None or not batch.json_lines:
            return None
        value = json.loads(batch.documents[place].decode("utf-8-sig", "replace")).get(self.arguments.language_field)
        return value if isinstance(value, str) else None


def held_out_files(words: Sequence[str]) -> list[tuple[str, str]]:
    """["en=a.jsonl"] -> [("en", "a.jsonl")]; globs and folders as in inputs. Raises DataError for anything else."""
    found = []
    for word in words:
        name, _, path = word.partition("=")
        if not name or not path:
            raise DataError(f"--held-out {word}: NAME=FILE is wanted, such as en=english.jsonl")
        found += [(name, file) for file in find_files([path])]
    return found


def pieces(text: str) -> Iterator[str]:
    """A text, or where it is longer than PIECE, its parts, cut after a line end if there is one in the second half."""
    start = 0
    while len(text) - start > PIECE:
        cut = text.rfind("\n", start + PIECE // 2, start + PIECE) + 1 or start + PIECE
        yield text[start:cut]
        start = cut
    yield text[start:]

"""Text to tokens: JSON lines or plain text to PREFIX.bin and PREFIX.idx, Megatron-LM's indexed format.

    megalm preprocess --input a.jsonl b.jsonl --output data/wiki --tokenizer data/spm.model --workers 4

The output depends on the input and the tokenizer alone, not on the workers; it appears when it is complete.
"""
from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field

import numpy as np

from megalm.data.documents import Batch, check_inputs, read_batches, read_text
from megalm.data.errors import DataError
from megalm.data.indexed import IndexedWriter, refuse_existing, token_dtype
from megalm.data.tokenizer import TYPES, Tokenizer, TokenizerSource, guess_source, load_tokenizer
from megalm.tools._command import Parser, run

SHOWN_ERRORS = 10


@dataclass(frozen=True)
class Work:
    """What a worker needs to know; sent once."""

    source: TokenizerSource
    field: str
    append_eod: bool
    dtype: np.dtype


@dataclass
class Encoded:
    """The documents of a batch as tokens, and what couldn't be read."""

    tokens: np.ndarray  # dtype [n], all documents
    lengths: np.ndarray  # int32 [sequences]: one of each document that isn't empty
    counts: np.ndarray  # int64 [documents], 1 or 0 sequences
    size: int  # bytes of input
    problems: list[str] = field(default_factory=list)


class Encoder:
    """Turns batches to tokens: in this process, or one in each worker."""

    def __init__(self, work: Work):
        self.work = work
        self.tokenizer: Tokenizer = load_tokenizer(work.source)

    def __call__(self, batch: Batch) -> Encoded:
        """An empty text makes a document of no sequence and gets no end of document, as in Megatron-LM."""
        tokens, lengths, counts, problems = [], [], [], []
        end = [self.tokenizer.eod] if self.work.append_eod else []
        for place in range(len(batch.documents)):
            try:
                ids = self.tokenizer.encode(read_text(batch, place, self.work.field))
            except DataError as error:
                problems.append(str(error))
                continue
            if ids:
                tokens.append(np.asarray(ids + end, self.work.dtype))
                lengths.append(len(tokens[-1]))
            counts.append(1 if ids else 0)
        flat = np.concatenate(tokens) if tokens else np.zeros(0, self.work.dtype)
        return Encoded(flat, np.asarray(lengths, np.int32), np.asarray(counts, np.int64), batch.size, problems)


class _InWorker:
    """The encoder of a worker process, made by the pool's initializer."""

    encoder: Encoder

    @classmethod
    def start(cls, work: Work) -> None:
        cls.encoder = Encoder(work)

    @classmethod
    def encode(cls, batch: Batch) -> Encoded:
        return cls.encoder(batch)


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """A process started inside never hears a Ctrl-C, which a terminal sends to workers too: they end when this one does."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def encode_all(batches: Iterator[Batch], work: Work, workers: int) -> Iterator[Encoded]:
    """The batches encoded, in their order. At most two batches a worker are in memory. Raises DataError if a worker dies."""
    if workers <= 1:
        yield from map(Encoder(work), batches)
        return
    context = multiprocessing.get_context("spawn")  # the tokenizers' own threads don't survive a fork
    with ProcessPoolExecutor(workers, context, _InWorker.start, (work,)) as pool:
        pending: deque = deque()
        try:
            for batch in batches:
                with _without_interrupts():
                    pending.append(pool.submit(_InWorker.encode, batch))
                if len(pending) >= 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise DataError("a worker process died, perhaps for want of memory; try fewer --workers") from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class Report:
    """Counts, and a line of progress where stderr is a terminal."""

    def __init__(self, total_size: int, quiet: bool):
        self.total_size, self.live = total_size, sys.stderr.isatty() and not quiet
        self.started = self.shown = time.monotonic()
        self.size = self.skipped = self.empty = 0

    def add(self, encoded: Encoded) -> None:
        self.size += encoded.size
        self.skipped += len(encoded.problems)
        self.empty += int((encoded.counts == 0).sum())
        now = time.monotonic()
        if self.live and now - self.shown > 0.5:
            self.shown = now
            print(f"\r{self.size / max(1, self.total_size):6.1%}  {self.speed():.1f} MB/s", end="", file=sys.stderr, flush=True)

    def speed(self) -> float:
        """MB of input a second."""
        return self.size / 1e6 / max(1e-9, time.monotonic() - self.started)

    def summary(self, prefix: str, documents: int, tokens: int, dtype: np.dtype) -> str:
        text = (f"{prefix}: {documents:,} documents, {tokens:,} tokens ({dtype}), from {self.size / 1e6:.1f} MB "
                f"at {self.speed():.1f} MB/s")
        if self.empty:
            text += f"; {self.empty:,} empty documents"
        if self.skipped:
            text += f"; {self.skipped:,} invalid documents skipped"
        return text


def preprocess(arguments: argparse.Namespace) -> int:
    """The program, after its arguments. Raises DataError for everything that is wrong with the input; then nothing is written."""
    if arguments.workers < 1:
        raise DataError(f"--workers is {arguments.workers}; it must be at least 1")
    total_size = check_inputs(arguments.input)
    refuse_existing(arguments.output, arguments.force)
    source = guess_source(arguments.tokenizer, arguments.tokenizer_type, arguments.eod)
    tokenizer = load_tokenizer(source)
    if arguments.append_eod and tokenizer.eod is None:
        known = getattr(tokenizer, "eod_candidates", [])
        hint = f"; it has {' and '.join(known)}" if known else ""
        raise DataError(f"{arguments.tokenizer} doesn't say which token ends a document{hint}: name it with --eod, "
                        "or give --no-append-eod")
    work = Work(source, arguments.field, arguments.append_eod, token_dtype(tokenizer.vocab_size))
    report = Report(total_size, arguments.quiet)
    try:
        with IndexedWriter(arguments.output, work.dtype, overwrite=arguments.force) as writer:
            for encoded in encode_all(read_batches(arguments.input), work, arguments.workers):
                if encoded.problems:
                    note_problems(encoded.problems, report.skipped, arguments.skip_invalid)
                writer.append(encoded.tokens, encoded.lengths, encoded.counts)
                report.add(encoded)
            if writer.total_tokens == 0:
                raise DataError(f"no text in {', '.join(arguments.input)}: {writer.num_documents} documents, all empty, "
                                f"and {report.skipped} invalid")
    except OSError as error:
        raise DataError(f"{error.filename or arguments.output}: {error.strerror}; nothing was written") from error
    if report.live:
        print("\r\x1b[K", end="", file=sys.stderr)
    if not arguments.quiet:
        print(report.summary(arguments.output, writer.num_documents, writer.total_tokens, work.dtype))
    return 0


def note_problems(problems: Sequence[str], already: int, skip: bool) -> None:
    """Raise the first problem, or print it if invalid documents are to be skipped: the first ten of a run."""
    if not skip:
        raise DataError(f"{problems[0]}; --skip-invalid leaves such documents out")
    for problem in problems[:max(0, SHOWN_ERRORS - already)]:
        print(f"skipped: {problem}", file=sys.stderr)


def parser() -> Parser:
    """The command line."""
    result = Parser(prog="megalm preprocess", description=__doc__.splitlines()[0])
    add = result.add_argument
    add("--input", nargs="+", required=True, metavar="FILE", help=".jsonl, one JSON object a line, or .txt, one document a file")
    add("--output", required=True, metavar="PREFIX", help="data/wiki writes data/wiki.bin and data/wiki.idx")
    add("--tokenizer", required=True, metavar="PATH|bytes", help="a sentencepiece .model, a tokenizer.json, or the word bytes")
    add("--tokenizer-type", choices=TYPES, help="where the path doesn't say it")
    add("--eod", metavar="TOKEN", help="the token that ends a document: needed for a tokenizer.json (sentencepiece: eos)")
    add("--no-append-eod", dest="append_eod", action="store_false", help="don't end documents with that token")
    add("--field", default="text", help="the JSON field that holds the text (text)")
    add("--workers", type=int, default=1, metavar="N", help="processes; the output doesn't depend on it (1)")
    add("--skip-invalid", action="store_true", help="leave out, report and count what can't be read, instead of stopping")
    add("--force", action="store_true", help="replace an existing data set")
    add("--quiet", action="store_true", help="print nothing but errors")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 with one line on stderr."""
    return run(parser(), preprocess, argv)


if __name__ == "__main__":
    sys.exit(main())
